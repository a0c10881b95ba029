"""Directories in an object store, each published by one object, under s3://BUCKET/PREFIX.

A directory is one object, `manifest.json`, which names the folder beside it that holds the files. Writers
upload into a folder of their own; publishing puts the manifest, in place of the one before and at once. A
reader has a copy on its node, found by the manifest's digest, whose files were hashed as they came.
"""

import json
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.storage.each import each
from infra.storage.local import FOREIGN_LEFTOVER_S, StorageError, explained
from infra.storage.manifest import MANIFEST, check_manifest, file_digest, new_manifest
from infra.storage.s3 import (
    THREADS,
    Place,
    at,
    children,
    copy,
    delete,
    digest,
    download,
    get,
    keys,
    put,
    upload,
)  # fmt: skip

_PARTS = re.compile(r"\.files-(\d+)-[0-9a-f]{8}")
"""The folder of a directory's files, with the second in which it was begun."""


def files(place: Place) -> tuple[Place, dict[str, int]]:
    """Where the files of a place lie, and their sizes by name from there.

    That is the folder that its manifest names, or the place itself where it has none.
    """
    found = keys(place)
    if MANIFEST not in found:
        return place, found
    folder = read_manifest(place)["folder"]
    return place / folder, keys(place / folder)


def within(place: Place) -> Place:
    """Where a file of a published directory lies; `place` itself where its parent is none."""
    content = get(place.parent / MANIFEST)
    if content is None:
        return place
    folder = check_manifest(content, str(place.parent))["folder"]
    return place.parent / folder / place.key.rpartition("/")[2]


def read_manifest(place: Place) -> dict[str, Any]:
    """The manifest of a published directory; StorageError where there is none, or it is damaged."""
    content = get(place / MANIFEST)
    if content is None:
        if not keys(place):
            raise StorageError(f"{place} does not exist.")
        raise StorageError(f"{place} was never finished: it has no {MANIFEST}.")
    return check_manifest(content, str(place))


def check_complete(place: Place) -> dict[str, Any]:
    """The manifest of a directory all of whose files are there with their sizes."""
    manifest = read_manifest(place)
    there = keys(place / manifest["folder"])
    for name, expected in manifest["files"].items():
        if name not in there:
            raise StorageError(f"{place} is damaged: {name} is missing.")
        if there[name] != expected["size"]:
            raise StorageError(
                f"{place} is damaged: {name} has {there[name]} bytes instead of {expected['size']}."
            )
    return manifest


def begin(place: Place) -> str:
    """A new folder for the files of `place`; what was begun a day ago and never published is removed."""
    clean(place)
    return str(place / f".files-{int(time.time())}-{secrets.token_hex(4)}")


@contextmanager
def writing(staging: Place, last: str | None = None) -> Iterator[Path]:
    """A local directory, whose files are in `staging` once the block is left, the `last` one after others."""
    with tempfile.TemporaryDirectory(prefix="self-forcing-") as folder:
        directory = Path(folder)
        with explained(directory):
            yield directory
        names = [file.relative_to(directory).as_posix() for file in directory.rglob("*") if file.is_file()]
        for batch in ([name for name in names if name != last], [name for name in names if name == last]):
            each(lambda name: upload(directory / name, staging / name), batch, THREADS)


def publish(staging: Place, place: Place, metadata: Mapping[str, Any]) -> None:
    """Put the manifest of what was uploaded into `staging`, and remove what was published before."""
    try:
        sizes = keys(staging)

        hashes = dict(zip(sizes, each(lambda name: digest(staging / name), sizes, THREADS), strict=True))
        files = {name: {"sha256": hashes[name], "size": size} for name, size in sorted(sizes.items())}
        sequence = 1 + max((number for number, _ in complete_children(place.parent)), default=0)
        folder = staging.key.rpartition("/")[2]
        before = get(place / MANIFEST)
        body = new_manifest(files, sequence, metadata, folder=folder)
        put(place / MANIFEST, json.dumps(body, indent=1, allow_nan=False).encode())
    except BaseException:
        with suppress(StorageError):
            delete(staging, list(keys(staging)))
        raise
    if before is not None:
        old = json.loads(before).get("folder")
        if old and old != folder:
            delete(place / old, list(keys(place / old)))


def complete_children(place: Place) -> list[tuple[int, Place]]:
    """(sequence, child) of what is complete directly below a place, in the order of publishing."""

    def look(name: str) -> tuple[int, Place] | None:
        with suppress(StorageError):
            return check_complete(place / name)["sequence"], place / name
        return None

    names = [name for name in children(place) if not _PARTS.fullmatch(name)]
    return sorted(filter(None, each(look, names, THREADS)), key=lambda found: found[0])


def remove(place: Place) -> bool:
    """Remove a directory, its manifest first, so that nobody sees it half deleted; whether there was one."""
    there = keys(place)
    if MANIFEST in there:
        delete(place, [MANIFEST])
    delete(place, [name for name in there if name != MANIFEST])
    return bool(there)


def clean(place: Place) -> list[str]:
    """Remove folders of files of `place` that were begun a day ago and more and never published."""
    manifest = get(place / MANIFEST)
    named = None if manifest is None else json.loads(manifest).get("folder")
    left = []
    for name in children(place):
        match = _PARTS.fullmatch(name)
        if match and name != named and time.time() - int(match[1]) > FOREIGN_LEFTOVER_S:
            delete(place / name, list(keys(place / name)))
            left.append(str(place / name))
    return left


def move(source: Place, place: Place) -> None:
    """Copy a complete directory within the store, and remove it where it was."""
    manifest = check_complete(source)
    staging = at(begin(place))
    assert staging is not None

    files, folder = manifest["files"], source / manifest["folder"]
    each(lambda name: copy(folder / name, staging / name, files[name]["sha256"]), files, THREADS)
    publish(staging, place, manifest["metadata"])
    remove(source)


def fetch(place: Place, manifest: Mapping[str, Any], directory: Path) -> None:
    """Download a directory's files; StorageError where one is not what the manifest says."""

    def one(name: str) -> None:
        file = directory / name
        file.parent.mkdir(parents=True, exist_ok=True)
        download(place / manifest["folder"] / name, file)
        if file_digest(file) != manifest["files"][name]["sha256"]:
            raise StorageError(f"{place} is damaged: the content of {name} is not what was written.")

    free, needed = shutil.disk_usage(directory).free, sum(file["size"] for file in manifest["files"].values())
    if needed > free:
        raise StorageError(
            f"{place} takes {needed / 2**30:.1f} GiB, and {directory.parent} has {free / 2**30:.1f} left; "
            "free some, or name another place in SELF_FORCING_CACHE."
        )
    each(one, manifest["files"], THREADS)
