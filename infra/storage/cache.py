"""A node's copies of directories in an object store, one of each, whoever on the node reads it.

A copy is named by its manifest's digest and appears when it is whole. Who reads one holds its lock, so that
it stays; the ones that were not read for longest make room for others.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from infra.storage import s3, s3_directories
from infra.storage.local import StorageError, explained, leftovers, new_aside, remove
from infra.storage.manifest import MANIFEST, check_manifest, hash_json


def root() -> Path:
    """SELF_FORCING_CACHE, or `~/.cache/self-forcing`."""
    return Path(os.environ.get("SELF_FORCING_CACHE") or "~/.cache/self-forcing").expanduser() / "objects"


def limit() -> float:
    """Bytes that copies may take together: SELF_FORCING_CACHE_GB, 200 where unset."""
    given = os.environ.get("SELF_FORCING_CACHE_GB") or "200"
    try:
        return float(given) * 1e9
    except ValueError:
        raise StorageError(f"SELF_FORCING_CACHE_GB is {given!r}; it must be a number of gigabytes.") from None


@contextmanager
def cached(place: s3.Place) -> Iterator[Path]:
    """A whole local copy of the directory at `place`, which stays for as long as the block lasts.

    StorageError where that is not complete or damaged, or does not fit here.
    """
    with ExitStack() as held:
        while True:
            manifest = s3_directories.read_manifest(place)
            try:
                target = held.enter_context(_held(place, manifest))
                break
            except StorageError:
                if s3_directories.read_manifest(place) == manifest:
                    raise
                # It was replaced while it was read, and what it was before is gone.
        yield target


@contextmanager
def _held(place: s3.Place, manifest: dict[str, Any]) -> Iterator[Path]:
    target = root() / hash_json(manifest)
    with explained(target):
        root().mkdir(parents=True, exist_ok=True)
    with open(f"{target}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not target.is_dir():
            # A lock of its own: whoever still reads a copy that was taken away keeps nobody from another.
            with open(f"{target}.download", "w") as download:
                fcntl.flock(download, fcntl.LOCK_EX)
                if not target.is_dir():
                    _download(place, manifest, target)
        os.utime(target)
        yield target


def _download(place: s3.Place, manifest: dict[str, Any], target: Path) -> None:
    for leftover in leftovers(target.parent):
        remove(leftover)
    _make_room(sum(file["size"] for file in manifest["files"].values()), place)
    aside = new_aside(target)
    with explained(target):
        aside.mkdir()
        try:
            s3_directories.fetch(place, manifest, aside)
            content = s3.get(place / MANIFEST)
            if content is None or hash_json(check_manifest(content, str(place))) != target.name:
                raise StorageError(f"{place} was replaced while it was read; try again.")
            (aside / MANIFEST).write_bytes(content)
            os.rename(aside, target)
        except BaseException:
            remove(aside)
            raise


def _make_room(needed: int, place: s3.Place) -> None:
    """Remove the copies that were not read for longest until `needed` bytes more stay below the limit."""
    if needed > limit():
        raise StorageError(
            f"{place} takes {needed / 1e9:.1f} GB, more than SELF_FORCING_CACHE_GB, {limit() / 1e9:g}; raise "
            "that."
        )
    copies = sorted(
        (each for each in root().iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime
    )
    sizes = {copy: sum(f.stat().st_size for f in copy.rglob("*") if f.is_file()) for copy in copies}
    total = sum(sizes.values())
    for copy in copies:
        if total + needed <= limit():
            return
        with open(f"{copy}.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:  # it is being read
                continue
            if remove(copy):
                total -= sizes[copy]
