"""Directories that are whole or do not exist: what checkpoints and artifacts need from a file system.

A directory is filled aside, in a hidden sibling, and published by one process, which hashes every file, writes a
manifest last and renames. Whoever sees the final name sees all of it, however many processes wrote it and whenever
one of them was killed.

    staging = begin(path)                         # one process; the name is sent to all ranks
    with writing(staging) as directory: ...       # every rank writes its own files
    publish(staging, path, metadata)              # one process, when all ranks are done
    with reading(newest_complete(parent)) as directory: ...

Locations are strings (or `os.PathLike`) and are handed back as strings, so that an object store, which has no
directories to rename, can be put behind the same functions. This module knows local and shared file systems.
It does not know what the files mean.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1
"""Version of the manifest's layout; a newer one is refused, not guessed at."""

MANIFEST = "manifest.json"
"""Name of the file whose presence says that a directory was finished."""

Location = str | os.PathLike[str]

_STAGING = re.compile(r"\..+\.tmp-[0-9a-f]{32}")
_HASHING_THREADS = min(8, os.cpu_count() or 1)


class StorageError(ValueError):
    """A directory is missing, unfinished or damaged; the message names it, and the file where there is one."""


def begin(path: Location) -> str:
    """Makes an empty staging directory beside `path` and returns its location, to be shared with every writer.

    Raises:
        ValueError: `path` is not a local or shared file system path.
    """
    target = _local(path)
    staging = _aside(target)
    staging.mkdir(parents=True)
    return str(staging)


@contextmanager
def writing(staging: Location) -> Iterator[Path]:
    """A local directory whose content, once the block is left, is part of `staging`.

    Several processes may write into the same staging location, each its own file names.
    """
    yield _local(staging)


def publish(staging: Location, path: Location, metadata: Mapping[str, Any]) -> None:
    """Turns `staging` into `path` atomically, replacing what was there. Called once, after every writer is done.

    Args:
        staging: what `begin(path)` returned.
        path: the final location.
        metadata: JSON-serialisable and finite; `read_metadata` returns it.

    Raises:
        StorageError: `staging` does not exist, or holds something that is neither file nor directory.
    """
    source, target = _local(staging), _local(path)
    if not source.is_dir():
        raise StorageError(f"Cannot publish {target}: its staging directory {source} does not exist.")
    names = _file_names(source)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: _hash(source / name, sync=True), names))
    body = {
        "format_version": FORMAT_VERSION,
        # A logical clock, so that "newest" depends neither on names nor on the clocks of different machines.
        "sequence": 1 + max((sequence for sequence, _ in _complete_children(target.parent)), default=0),
        "files": {
            name: {"sha256": digest, "size": (source / name).stat().st_size}
            for name, digest in zip(names, hashes, strict=True)
        },
        "metadata": dict(metadata),
    }
    with open(source / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**body, "sha256": _hash_json(body)}, file, indent=1, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    for directory in [source, *(entry for entry in source.rglob("*") if entry.is_dir())]:
        _sync_directory(directory)
    replaced = _aside(target) if target.exists() else None
    if replaced:  # a rename cannot replace a directory with files in it, so the old one steps aside first
        os.rename(target, replaced)
    os.rename(source, target)
    _sync_directory(target.parent)
    if replaced:
        shutil.rmtree(replaced)


@contextmanager
def reading(path: Location) -> Iterator[Path]:
    """A local directory with the content of the complete directory `path`, for as long as the block lasts.

    Raises:
        StorageError: `path` is not complete.
    """
    target = _local(path)
    _check_complete(target)
    yield target


def write_file(path: Location, content: bytes) -> None:
    """Writes a file, whole or not at all, and makes the directories above it.

    Raises:
        StorageError: the file system does not take it; nothing is left behind, and what was there stays.
    """
    target = _local(path)
    aside = _aside(target)
    try:
        if target.is_dir():  # which `os.replace` would report of the name aside
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(
            f"{target} cannot be written: {error.strerror or error}; name another place, or make room."
        ) from error


def is_complete(path: Location) -> bool:
    """Whether `path` was published and every file still has its size. Cheap: it hashes no file (see `verify`)."""
    target = _local(path)
    try:
        _check_complete(target)
    except StorageError:
        return False
    return True


def verify(path: Location) -> None:
    """Hashes every file of `path` against its manifest.

    Raises:
        StorageError: names the first missing or damaged file.
    """
    target = _local(path)
    files = _check_complete(target)["files"]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for name, digest in zip(files, pool.map(lambda name: _hash(target / name), files), strict=True):
            if digest != files[name]["sha256"]:
                raise StorageError(f"{target} is damaged: the content of {name} is not what was written.")


def read_metadata(path: Location) -> dict[str, Any]:
    """The metadata that `path` was published with.

    Raises:
        StorageError: `path` does not exist, was never finished, or its manifest is damaged.
    """
    return _read_manifest(_local(path))["metadata"]


def digests(path: Location) -> dict[str, str]:
    """SHA-256 of every file of a complete directory, as it was published, by name.

    Raises:
        StorageError: as `read_metadata`.
    """
    return {name: file["sha256"] for name, file in _read_manifest(_local(path))["files"].items()}


def newest_complete(parent: Location) -> str | None:
    """The complete child of `parent` that was published last, or `None` (also where `parent` does not exist)."""
    children = _complete_children(_local(parent))
    return str(children[-1][1]) if children else None


def prune(parent: Location, *, keep: int) -> list[str]:
    """Removes all but the `keep` newest complete children of `parent`; returns what was removed, oldest first.

    Children that are not complete are left for a person to look at.

    Raises:
        ValueError: `keep` is below 1: the newest complete one is never removed.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, so that the newest complete one stays; got {keep}.")
    removed = [child for _, child in _complete_children(_local(parent))[:-keep]]
    for child in removed:
        aside = _aside(
            child
        )  # renamed first, so that nobody sees a half-deleted directory under its final name
        os.rename(child, aside)
        shutil.rmtree(aside)
    return [str(child) for child in removed]


def clean(parent: Location) -> list[str]:
    """Removes what killed processes left behind in `parent`. Call it while nobody else is publishing there."""
    root = _local(parent)
    leftovers = sorted(child for child in _children(root) if _STAGING.fullmatch(child.name))
    for leftover in leftovers:
        shutil.rmtree(leftover)
    return [str(leftover) for leftover in leftovers]


def _local(location: Location) -> Path:
    text = os.fspath(location)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", text):  # `Path` turns s3://bucket into s3:/bucket
        raise ValueError(
            f"{text!r} is not supported as a location; give a local path or a path on a shared file system."
        )
    return Path(text).absolute()


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.tmp-{uuid.uuid4().hex}")


def _children(parent: Path) -> list[Path]:
    return [child for child in parent.iterdir() if child.is_dir()] if parent.is_dir() else []


def _complete_children(parent: Path) -> list[tuple[int, Path]]:
    """(sequence, child), in the order of publishing."""
    complete = []
    for child in _children(parent):
        if not _STAGING.fullmatch(child.name):
            with suppress(StorageError):
                complete.append((_check_complete(child)["sequence"], child))
    return sorted(complete)


def _file_names(root: Path) -> list[str]:
    names = []
    for entry in sorted(root.rglob("*")):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise StorageError(f"Cannot publish {entry}: only plain files and directories can be published.")
        if entry.is_file() and entry != root / MANIFEST:
            names.append(entry.relative_to(root).as_posix())
    return names


def _hash(file_path: Path, *, sync: bool = False) -> str:
    with open(file_path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hash_json(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(target: Path) -> dict[str, Any]:
    if not target.is_dir():
        raise StorageError(f"{target} does not exist.")
    try:
        manifest = json.loads((target / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
        version = manifest["format_version"]
    except FileNotFoundError:
        raise StorageError(f"{target} was never finished: it has no {MANIFEST}.") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        raise StorageError(f"{target} is damaged: {MANIFEST} is not a manifest.") from None
    if version != FORMAT_VERSION:
        raise StorageError(
            f"{target} has format version {version}, and this installation reads {FORMAT_VERSION}; "
            "use the release that wrote it."
        )
    if digest != _hash_json(manifest):
        raise StorageError(f"{target} is damaged: the content of {MANIFEST} is not what was written.")
    return manifest


def _check_complete(target: Path) -> dict[str, Any]:
    manifest = _read_manifest(target)
    for name, expected in manifest["files"].items():
        file_path = target / name
        if not file_path.is_file():
            raise StorageError(f"{target} is damaged: {name} is missing.")
        if (size := file_path.stat().st_size) != expected["size"]:
            raise StorageError(f"{target} is damaged: {name} has {size} bytes instead of {expected['size']}.")
    return manifest
