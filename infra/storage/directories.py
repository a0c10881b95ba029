"""Directories that are whole or do not exist: what checkpoints and artifacts need from a file system.

A directory is filled aside, in a hidden sibling, and published by one process, which hashes every file,
writes a manifest last and renames. Whoever sees the final name sees all of it, however many processes wrote
it and whenever one of them was killed.

    staging = begin(path)                         # one process; the name is sent to all ranks
    with writing(staging) as directory: ...       # every rank writes its own files
    publish(staging, path, metadata)              # one process, when all ranks are done
    with reading(newest_complete(parent)) as directory: ...

Locations are strings (or `os.PathLike`) and are handed back as strings, so that an object store, which has no
directories to rename, can be put behind the same functions. This module does not know what the files mean.
"""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.storage.local import (
    Location,
    StorageError,
    explained,
    is_aside,
    leftovers,
    local,
    new_aside,
    patiently,
    remove,
    warn_left,
)

FORMAT_VERSION = 1
"""Version of the manifest's layout; a newer one is refused, not guessed at."""

MANIFEST = "manifest.json"
"""Name of the file whose presence says that a directory was finished."""

_HASHING_THREADS = min(8, os.cpu_count() or 1)


def begin(path: Location) -> str:
    """Makes an empty staging directory beside `path`; its location is to be shared with every writer.

    What killed writers left beside `path` is removed. The calling process must live until `publish`.
    StorageError where `path` is not a local or shared file system path, is a file, or cannot be written.
    """
    target = local(path)
    clean(target.parent)
    with explained(target):
        _refuse_file(target)
        staging = new_aside(target)
        staging.mkdir(parents=True)
    return str(staging)


@contextmanager
def writing(staging: Location) -> Iterator[Path]:
    """A local directory whose content, once the block is left, is part of `staging`.

    Several processes may write into the same staging location, each its own file names. StorageError where
    the file system refuses what is written.
    """
    directory = local(staging)
    with explained(directory):
        yield directory


def publish(staging: Location, path: Location, metadata: Mapping[str, Any]) -> None:
    """Turns `staging` into `path` atomically, replacing what was there. Called once, after every writer.

    `staging` is what `begin(path)` returned; it is gone afterwards, whether this succeeds or fails.
    `metadata` is JSON-serialisable and finite, and what `read_metadata` returns. StorageError where `staging`
    does not exist, holds something that is neither file nor directory, or cannot be written.
    """
    source, target = local(staging), local(path)
    if not source.is_dir():
        raise StorageError(f"Cannot publish {target}: its staging directory {source} does not exist.")
    try:
        with explained(target):
            _write_manifest(source, target, metadata)
            replaced = patiently(lambda: _exchange(source, target))
            _sync_directory(target.parent)
    except BaseException:
        remove(source)
        raise
    if replaced:
        remove(replaced)


def place(source: Location, path: Location) -> None:
    """Turns a complete directory on the same file system into `path`, unless another process was first.

    StorageError where `source` is not complete, or is damaged; OSError where it cannot be moved.
    """
    verify(source)
    try:
        os.rename(local(source), local(path))
    except OSError:
        if not is_complete(path):
            raise


@contextmanager
def reading(path: Location) -> Iterator[Path]:
    """A local directory with the content of the complete directory `path`, for as long as the block lasts.

    StorageError where `path` is not complete.
    """
    target = local(path)
    _check_complete(target)
    yield target


def is_complete(path: Location) -> bool:
    """Whether `path` was published and every file has its size. Cheap: it hashes no file (see `verify`)."""
    try:
        _check_complete(local(path))
    except StorageError:
        return False
    return True


def verify(path: Location) -> None:
    """Hashes every file of `path` against its manifest; StorageError names the first that fails."""
    target = local(path)
    files = _check_complete(target)["files"]
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        for name, digest in zip(files, pool.map(lambda name: file_digest(target / name), files), strict=True):
            if digest != files[name]["sha256"]:
                raise StorageError(f"{target} is damaged: the content of {name} is not what was written.")


def read_metadata(path: Location) -> dict[str, Any]:
    """The metadata that `path` was published with.

    StorageError where `path` does not exist, was never finished, or its manifest is damaged.
    """
    return _read_manifest(local(path))["metadata"]


def digests(path: Location) -> dict[str, str]:
    """SHA-256 of every file of a complete directory, by name; StorageError as `read_metadata`."""
    return {name: file["sha256"] for name, file in _read_manifest(local(path))["files"].items()}


def manifest_digest(path: Location) -> str:
    """SHA-256 of all names and digests of files and the metadata; StorageError as `read_metadata`."""
    return _hash_json(_read_manifest(local(path)))


def newest_complete(parent: Location) -> str | None:
    """The complete child of `parent` that was published last, or `None`, also where there is no `parent`."""
    children = _complete_children(local(parent))
    return str(children[-1][1]) if children else None


def newest_sound(parent: Location) -> tuple[str | None, list[str]]:
    """The last child of `parent` whose content is what was written, and what is wrong with others."""
    published, passed_over = [], []
    for child in sorted(_children(local(parent))):
        try:
            published.append((_read_manifest(child)["sequence"], child))
        except StorageError as error:
            passed_over.append(str(error))
    for _, child in sorted(published, reverse=True):
        try:
            verify(child)
            return str(child), passed_over
        except StorageError as error:
            passed_over.append(str(error))
    return None, passed_over


def move(source: Location, path: Location) -> None:
    """Renames the complete directory `source` to `path` on the same file system, replacing what was there.

    Raises:
        StorageError: `source` is not complete, or the file system refuses.
    """
    target = local(path)
    _check_complete(local(source))
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if replaced := patiently(lambda: _exchange(local(source), target)):
            remove(replaced)


def prune(parent: Location, *, keep: int) -> list[str]:
    """Removes all but the `keep` newest complete children of `parent`; returns those, oldest first.

    Children that are not complete are left for a person to look at. ValueError for a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, so that the newest complete one stays; got {keep}.")
    removed = [child for _, child in _complete_children(local(parent))[:-keep]]
    return [str(child) for child in removed if _prune(child)]


def discard(path: Location) -> bool:
    """Removes the directory `path`, which nobody sees half deleted; whether it went by our hand."""
    return _prune(local(path))


def clean(parent: Location) -> list[str]:
    """Removes what killed processes left behind in `parent`; what a living one is writing there stays."""
    return [str(leftover) for leftover in leftovers(local(parent)) if remove(leftover)]


def _write_manifest(source: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    names = _file_names(source)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: file_digest(source / name, sync=True), names))
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


def _exchange(source: Path, target: Path) -> Path | None:
    """Rename `source` to `target`, and what was there aside: no rename replaces a directory with files."""
    _refuse_file(target)
    replaced = new_aside(target)
    try:
        os.rename(target, replaced)
        there = True
    except FileNotFoundError:
        there = False
    try:
        os.rename(source, target)
    except OSError:
        if there:  # another writer was faster, or the file system is slow: as it was, and once more
            with suppress(OSError):
                os.rename(replaced, target)
        raise
    return replaced if there else None


def _prune(child: Path) -> bool:
    """Whether it went by our hand. It is renamed first: nobody sees it half deleted under its own name."""
    aside = new_aside(child)
    try:
        patiently(lambda: os.rename(child, aside))
    except FileNotFoundError:  # another process pruned it
        return False
    except OSError as error:
        warn_left(child, error)
        return False
    return remove(aside)


def _refuse_file(target: Path) -> None:
    if target.is_file():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target))


def _children(parent: Path) -> list[Path]:
    """Directories in `parent` that were published, or are in the place of one."""
    children = parent.iterdir() if parent.is_dir() else ()
    return [child for child in children if child.is_dir() and not is_aside(child)]


def _complete_children(parent: Path) -> list[tuple[int, Path]]:
    """(sequence, child), in the order of publishing."""
    complete = []
    for child in _children(parent):
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


def file_digest(file_path: Path, *, sync: bool = False) -> str:
    """SHA-256 of a file; with `sync`, of what is on the disk."""
    with open(file_path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def files_digest(files: Iterable[Path]) -> str:
    """SHA-256 that tells what a set of files holds, by their names."""
    return _hash_json({file.name: file_digest(file) for file in files})


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
    except OSError as error:
        raise StorageError(f"{target / MANIFEST} cannot be read: {error.strerror}.") from error
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
        try:
            size = (target / name).stat().st_size
        except OSError:
            raise StorageError(f"{target} is damaged: {name} is missing.") from None
        if size != expected["size"]:
            raise StorageError(f"{target} is damaged: {name} has {size} bytes instead of {expected['size']}.")
    return manifest
