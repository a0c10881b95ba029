"""What a local or shared file system is asked for: names that appear whole, and leftovers that go.

Everything is written aside, under a hidden name that says which process writes it, and renamed. A hidden name
whose process is gone is a leftover; it is removed by whoever next writes in the same place.
"""

import errno
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TypeVar

from infra.settings import ADDRESS

Location = str | os.PathLike[str]
T = TypeVar("T")

FOREIGN_LEFTOVER_S = 24 * 3600.0
"""Another machine's processes cannot be asked for: what they write counts as left at this age."""

_log = logging.getLogger(__name__)
_ASIDE = re.compile(
    r"\.(?P<name>.+)\.tmp-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-[0-9a-f]{16}(\.\w+)?"
)
_BUSY = frozenset((errno.EBUSY, errno.ENOTEMPTY, errno.EEXIST))
_REFUSED = _BUSY | {
    *(errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EIO, errno.EFBIG),
}
"""What a file system says of a place or a disk, rather than of a program."""
_WAITS_S = (0.05, 0.1, 0.2, 0.4)


class StorageError(ValueError):
    """Something is missing, unfinished, damaged or cannot be written; the message names it."""


def local(location: Location) -> Path:
    """`location` as an absolute path of a local or shared file system.

    StorageError for an address: where s3:// can be, it is asked for first.
    """
    text = os.fspath(location)
    if ADDRESS.match(text):  # `Path` turns s3://bucket into s3:/bucket
        advice = "give a local path or a path on a shared file system"
        raise StorageError(f"{text!r} is not supported as a location here yet; {advice}.")
    return Path(text).absolute()


@contextmanager
def write_local_file(path: Location) -> Iterator[Path]:
    """A path to write one file at, which becomes `path` when the block is left, and is removed if it fails.

    It has the suffix of `path` and lies in the same directory, which is made where there is none.
    StorageError where the file cannot be written: a full or read-only disk, or a directory in the way.
    """
    target = local(path)
    with explained(target), whole_file(target) as aside:
        yield aside


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """`write_local_file`, with the errors of the operating system as they are."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # which says less than what it means here
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from None
    aside = new_aside(target, target.suffix)
    try:
        yield aside
        with open(aside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, target)
    except BaseException:
        with suppress(OSError):
            aside.unlink()
        raise


@contextmanager
def explained(target: Path) -> Iterator[None]:
    """Turns what the file system refuses inside the block into a StorageError that names `target`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        if (writer := _ASIDE.fullmatch(target.name)) is not None:
            target = target.with_name(writer["name"])  # the name that the user knows
        raise StorageError(f"{target} cannot be written: {os.strerror(error.errno).lower()}.") from error


def new_aside(target: Path, suffix: str = "") -> Path:
    """A new hidden name beside `target`; what killed writers of `target` left beside it is removed."""
    for leftover in leftovers(target.parent, target.name):
        remove(leftover)
    writer = f"{host()}-{os.getpid()}-{started(os.getpid())}"
    return target.with_name(f".{target.name}.tmp-{writer}-{secrets.token_hex(8)}{suffix}")


def is_aside(path: Path) -> bool:
    """Whether `new_aside` made the name."""
    return _ASIDE.fullmatch(path.name) is not None


def leftovers(parent: Path, name: str | None = None) -> list[Path]:
    """Hidden names in `parent`, or of its entry `name`, whose writers are gone, sorted."""
    if not parent.is_dir():
        return []
    beginning = "." if name is None else f".{name}.tmp-"
    hidden = sorted(each for each in os.listdir(parent) if each.startswith(beginning))
    return [parent / each for each in hidden if _is_left(parent / each)]


def remove(path: Path) -> bool:
    """Remove a file or directory that nobody needs; if it is gone already, that is as good.

    What the file system does not let go yet is tried again for a moment and then left, with a warning.
    """
    try:
        patiently(lambda: _remove(path))
    except OSError as error:
        warn_left(path, error)
        return False
    return True


def warn_left(path: Path, error: OSError) -> None:
    """Say that something stays which should have gone; no run has to end for that."""
    _log.warning("%s cannot be removed yet (%s); delete it when nothing uses it.", path, error.strerror)


def patiently(action: Callable[[], T]) -> T:
    """The action's result; repeated for a moment while the file system says that something is in use."""
    for wait in _WAITS_S:
        try:
            return action()
        except OSError as error:
            if error.errno not in _BUSY:
                raise
            time.sleep(wait)
    return action()


def _remove(path: Path) -> None:
    while os.path.lexists(path):
        with suppress(FileNotFoundError):  # another process removes it too
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _is_left(path: Path) -> bool:
    writer = _ASIDE.fullmatch(path.name)
    if writer is None:
        return False
    if writer["host"] == host():
        return started(int(writer["pid"])) != int(writer["start"])
    try:
        newest = max(entry.lstat().st_mtime for entry in [path, *path.rglob("*")])
    except OSError:  # it changes while we look
        return False
    return time.time() - newest > FOREIGN_LEFTOVER_S


@cache
def host() -> str:
    """Whose process numbers these are: containers may share a machine's name, but not its processes."""
    try:
        processes = os.readlink("/proc/self/ns/pid")
    except OSError:
        processes = ""
    return hashlib.sha256(f"{socket.gethostname()} {processes}".encode()).hexdigest()[:8]


def started(pid: int) -> int:
    """When a process started, in ticks, as numbers are used again; −1: there is none, 0: unknown."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        pass
    return 0
