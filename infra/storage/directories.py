"""Directories that are whole or do not exist: what checkpoints and artifacts need from a file system.

A directory is filled aside, in a hidden sibling, and published by one process, which hashes every file,
writes a manifest last and renames. Whoever sees the final name sees all of it, however many processes wrote
it and whenever one of them was killed.

    staging = begin(path)                         # one process; the name is sent to all ranks
    with writing(staging) as directory: ...       # every rank writes its own files
    publish(staging, path, metadata)              # one process, when all ranks are done
    with reading(newest_complete(parent)) as directory: ...

Locations are strings (or `os.PathLike`) and are handed back as strings: paths of a local or shared file
system, or s3://BUCKET/PREFIX, which `s3_directories` and `cache` answer. This module does not know what the
files mean.
"""

import errno
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from infra.storage import s3, s3_directories
from infra.storage.cache import cached
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
from infra.storage.manifest import MANIFEST, check_manifest, file_digest, hash_json, new_manifest

_HASHING_THREADS = min(8, os.cpu_count() or 1)


def begin(path: Location) -> str:
    """Makes an empty staging directory beside `path`; its location is to be shared with every writer.

    What killed writers left beside `path` is removed. The calling process must live until `publish`.
    StorageError where `path` is a file, or cannot be written.
    """
    if (there := s3.at(path)) is not None:
        return s3_directories.begin(there)
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
    if (there := s3.at(staging)) is not None:
        with s3_directories.writing(there) as directory:
            yield directory
        return
    directory = local(staging)
    with explained(directory):
        yield directory


def publish(staging: Location, path: Location, metadata: Mapping[str, Any]) -> None:
    """Turns `staging` into `path` atomically, replacing what was there. Called once, after every writer.

    `staging` is what `begin(path)` returned; it is gone afterwards, whether this succeeds or fails.
    `metadata` is JSON-serialisable and finite, and what `read_metadata` returns. StorageError where `staging`
    does not exist, holds something that is neither file nor directory, or cannot be written.
    """
    if (there := s3.at(path)) is not None:
        aside = s3.at(staging)
        assert aside is not None, "begin(path) made it"
        return s3_directories.publish(aside, there, metadata)
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
    if (there := s3.at(path)) is not None:
        with cached(there) as target:
            yield target
        return
    target = local(path)
    _check_complete(target)
    yield target


def is_complete(path: Location) -> bool:
    """Whether `path` was published and every file has its size. Cheap: it hashes no file (see `verify`)."""
    try:
        _check_complete(path)
    except StorageError:
        return False
    return True


def verify(path: Location) -> None:
    """Hashes every file of `path` against its manifest; StorageError names the first that fails.

    What an object store holds is hashed when it is read: here its files are only looked for.
    """
    if s3.at(path) is not None:
        _check_complete(path)
        return
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
    return _read_manifest(path)["metadata"]


def digests(path: Location) -> dict[str, str]:
    """SHA-256 of every file of a complete directory, by name; StorageError as `read_metadata`."""
    return {name: file["sha256"] for name, file in _read_manifest(path)["files"].items()}


def manifest_digest(path: Location) -> str:
    """SHA-256 of all names and digests of files and the metadata; StorageError as `read_metadata`."""
    body = _read_manifest(path)
    body.pop("folder", None)  # which says where it lies, not what it is
    return hash_json(body)


def newest_complete(parent: Location) -> str | None:
    """The complete child of `parent` that was published last, or `None`, also where there is no `parent`."""
    children = _complete_children(parent)
    return str(children[-1][1]) if children else None


def newest_sound(parent: Location) -> tuple[str | None, list[str]]:
    """The last child of `parent` whose content is what was written, and what is wrong with others."""
    published, passed_over = [], []
    for child in _children(parent):
        try:
            published.append((_read_manifest(child)["sequence"], child))
        except StorageError as error:
            passed_over.append(str(error))
    for _, child in sorted(published, key=lambda found: found[0], reverse=True):
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
    if (there := s3.at(path)) is not None and (here := s3.at(source)) is not None:
        return s3_directories.move(here, there)
    target = local(path)
    _check_complete(local(source))
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        if replaced := patiently(lambda: _exchange(local(source), target)):
            remove(replaced)


def prune(parent: Location, *, keep: int, spare: Callable[[str], bool] = lambda name: False) -> list[str]:
    """Removes all but the `keep` newest complete children of `parent`; returns those, oldest first.

    Children whose name is to be spared stay, and those that are not complete are left for a person to look
    at. ValueError for a `keep` below 1.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, so that the newest complete one stays; got {keep}.")
    older = [str(child) for _, child in _complete_children(parent)[:-keep]]
    return [child for child in older if not spare(child.rpartition("/")[2]) and _prune(child)]


def discard(path: Location) -> bool:
    """Removes the directory `path`, which nobody sees half deleted; whether it went by our hand."""
    return _prune(path)


def clean(parent: Location) -> list[str]:
    """Removes what killed processes left behind in `parent`; what a living one is writing there stays."""
    if (there := s3.at(parent)) is not None:
        return [left for name in s3.children(there) for left in s3_directories.clean(there / name)]
    return [str(leftover) for leftover in leftovers(local(parent)) if remove(leftover)]


def _write_manifest(source: Path, target: Path, metadata: Mapping[str, Any]) -> None:
    names = _file_names(source)
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        hashes = list(pool.map(lambda name: file_digest(source / name, sync=True), names))
    files = {
        name: {"sha256": digest, "size": (source / name).stat().st_size}
        for name, digest in zip(names, hashes, strict=True)
    }
    sequence = 1 + max((sequence for sequence, _ in _complete_children(target.parent)), default=0)
    with open(source / MANIFEST, "w", encoding="utf-8") as file:
        json.dump(new_manifest(files, sequence, metadata), file, indent=1, allow_nan=False)
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


def _prune(location: Location) -> bool:
    """Whether it went by our hand. It is renamed first: nobody sees it half deleted under its own name."""
    if (there := s3.at(location)) is not None:
        return s3_directories.remove(there)
    child = local(location)
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


def _children(parent: Location) -> list[Location]:
    """Directories in `parent` that were published, or are in the place of one, by name."""
    if (there := s3.at(parent)) is not None:
        return [str(there / name) for name in sorted(s3.children(there)) if not name.startswith(".")]
    directory = local(parent)
    children = sorted(directory.iterdir()) if directory.is_dir() else ()
    return [child for child in children if child.is_dir() and not is_aside(child)]


def _complete_children(parent: Location) -> list[tuple[int, Location]]:
    """(sequence, child), in the order of publishing."""
    if (there := s3.at(parent)) is not None:
        return [(sequence, str(child)) for sequence, child in s3_directories.complete_children(there)]
    complete = []
    for child in _children(parent):
        with suppress(StorageError):
            complete.append((_check_complete(child)["sequence"], child))
    return sorted(complete, key=lambda found: found[0])


def _file_names(root: Path) -> list[str]:
    names = []
    for entry in sorted(root.rglob("*")):
        if entry.is_symlink() or not (entry.is_file() or entry.is_dir()):
            raise StorageError(f"Cannot publish {entry}: only plain files and directories can be published.")
        if entry.is_file() and entry != root / MANIFEST:
            names.append(entry.relative_to(root).as_posix())
    return names


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_manifest(location: Location) -> dict[str, Any]:
    if (there := s3.at(location)) is not None:
        return s3_directories.read_manifest(there)
    target = local(location)
    if not target.is_dir():
        raise StorageError(f"{target} does not exist.")
    try:
        content = (target / MANIFEST).read_bytes()
    except FileNotFoundError:
        raise StorageError(f"{target} was never finished: it has no {MANIFEST}.") from None
    except OSError as error:
        raise StorageError(f"{target / MANIFEST} cannot be read: {error.strerror}.") from error
    return check_manifest(content, str(target))


def _check_complete(location: Location) -> dict[str, Any]:
    if (there := s3.at(location)) is not None:
        return s3_directories.check_complete(there)
    target, manifest = local(location), _read_manifest(location)
    for name, expected in manifest["files"].items():
        try:
            size = (target / name).stat().st_size
        except OSError:
            raise StorageError(f"{target} is damaged: {name} is missing.") from None
        if size != expected["size"]:
            raise StorageError(f"{target} is damaged: {name} has {size} bytes instead of {expected['size']}.")
    return manifest
