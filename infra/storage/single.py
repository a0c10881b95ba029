"""Single files and folders of a place, in a file system or an object store."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.storage import cache, s3, s3_directories
from infra.storage.local import Location, StorageError, local, write_local_file


@contextmanager
def write_file(path: Location) -> Iterator[Path]:
    """A path to write one file at, which becomes `path` when the block is left, and is removed if it fails.

    It has the suffix of `path`. StorageError where the file cannot be written: a full or read-only disk, a
    directory in the way, or a store that refuses.
    """
    if (there := s3.at(path)) is None:
        with write_local_file(path) as aside:
            yield aside
        return
    with tempfile.TemporaryDirectory(prefix="self-forcing-") as folder:
        file = Path(folder) / there.key.rpartition("/")[2]
        yield file
        s3.upload(file, there)


def write_text(path: Location, text: str) -> None:
    """Write a file in UTF-8, whole or not at all; StorageError as `write_file`."""
    write_bytes(path, text.encode())


def write_bytes(path: Location, content: bytes) -> None:
    """Write a file, whole or not at all; StorageError as `write_file`."""
    with write_file(path) as aside:
        aside.write_bytes(content)


def read_bytes(path: Location) -> bytes | None:
    """A file's content, None where there is none; OSError or StorageError where it cannot be read.

    In S3 it may also be a file of a published directory, by its name there.
    """
    if (there := s3.at(path)) is not None:
        return s3.get(there) or s3.get(s3_directories.within(there))
    target = local(path)
    return target.read_bytes() if target.exists() else None


@contextmanager
def fetched(path: Location) -> Iterator[Path]:
    """A file or directory of others as one of this node, in S3 a copy for as long as the block lasts.

    StorageError where it cannot be had; what is not there locally is for the caller to find out.
    """
    if (there := s3.at(path)) is None:
        yield local(path)
        return
    base, sizes = s3_directories.files(there)
    with tempfile.TemporaryDirectory(prefix="self-forcing-") as folder:
        copy = Path(folder) / there.key.rpartition("/")[2]
        if not sizes:
            s3.download(s3_directories.within(there), copy)
        for name in sizes:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            s3.download(base / name, copy / name)
        yield copy


@contextmanager
def uploading(path: Location, *, last: str) -> Iterator[Path]:
    """A local directory whose files lie at `path`, which is in S3, by their own names once the block is left.

    For other tools, which know no manifest: the file `last` comes after the others, and says that all is
    there. StorageError where `path` is no place in S3, or the store refuses.
    """
    there = s3.at(path)
    if there is None:
        raise StorageError(f"{path} is no place in S3.")
    with s3_directories.writing(there, last) as directory:
        yield directory


def copy_file(file: Location, staging: Location, name: str) -> None:
    """Have a stored file be part of `staging` too, of the same kind of place; its content is not moved."""
    if (there := s3.at(file)) is not None:
        target = s3.at(staging)
        assert target is not None, "both are in one place"
        s3.copy(there, target / name)
        return
    try:
        os.link(local(file), local(staging) / name)
    except OSError:  # a file system without links
        shutil.copyfile(local(file), local(staging) / name)


def exists(path: Location) -> bool:
    """Whether there is a directory at `path`, whole or not."""
    if (there := s3.at(path)) is not None:
        return bool(s3.keys(there))
    return local(path).is_dir()


def folders(path: Location) -> list[str]:
    """Names of the directories in `path`, but hidden ones."""
    if (there := s3.at(path)) is not None:
        names = s3.children(there)
    else:
        place = local(path)
        names = [each.name for each in place.iterdir() if each.is_dir()] if place.is_dir() else []
    return sorted(name for name in names if not name.startswith("."))


def scratch(path: Location) -> Path:
    """A directory of this node for what belongs to `path` and is no part of it: where it is local, itself."""
    if s3.at(path) is None:
        return local(path)
    return cache.root().parent / "runs" / hashlib.sha256(str(path).encode()).hexdigest()[:16]


def on_disk(path: Location) -> Path:
    """A file as one of this node, downloaded into the scratch of its folder where it is none.

    StorageError where it cannot be.
    """
    if (there := s3.at(path)) is None:
        return local(path)
    file = scratch(str(there.parent)) / there.key.rpartition("/")[2]
    with write_local_file(file) as aside:
        s3.download(there, aside)
    return file
