"""Files that are read in place, from a file system or an object store, a part at a time."""

import io
import tarfile
from dataclasses import dataclass

import pyarrow as pa

from infra.storage import s3, s3_directories
from infra.storage.local import Location, local


@dataclass(frozen=True, order=True)
class Stored:
    """A file that others wrote, or a member of an archive of theirs."""

    location: str
    size: int
    start: int = 0  # where it begins in the file at `location`
    member: str = ""
    """Its name in the archive, if it is in one."""

    @property
    def name(self) -> str:
        return (self.member or self.location).rpartition("/")[2]

    def __str__(self) -> str:
        return f"{self.location}/{self.member}" if self.member else self.location

    def open(self) -> pa.NativeFile:
        """A file to read that can seek: mapped into memory, or asked of the store range by range.

        OSError where it is gone or cannot be reached.
        """
        if (there := s3.at(self.location)) is not None:
            return pa.PythonFile(_Ranges(there, self.size, self.start), mode="r")
        whole = pa.memory_map(self.location)
        if not self.member:
            return whole
        whole.seek(self.start)
        return pa.BufferReader(whole.read_buffer(self.size))

    def members(self) -> list["Stored"]:
        """The files in it, where it is a tar that is not compressed; ValueError where it is none, or ends
        early. Headers alone are read."""
        try:
            with self.open() as opened, tarfile.open(fileobj=opened, mode="r:") as archive:
                return [
                    Stored(self.location, each.size, each.offset_data, each.name)
                    for each in archive
                    if each.isfile()
                ]
        except tarfile.TarError as error:
            raise ValueError(f"{self} is no whole tar ({error})") from None


def stored_file(location: Location) -> Stored | None:
    """The file at a place; None where there is none."""
    if (there := s3.at(location)) is not None:
        size = s3.size(there)
        return None if size is None else Stored(str(there), size)
    place = local(location)
    return Stored(str(place), place.stat().st_size) if place.is_file() else None


def stored(location: Location, suffix: str) -> list[Stored] | None:
    """The files with this suffix in a directory, by name, but hidden ones; or the file at `location` itself.

    None where there is neither. StorageError where a store cannot be asked.
    """
    if (there := s3.at(location)) is None:
        place = local(location)
        if not place.exists():
            return None
        files = [place] if place.is_file() else [each for each in place.iterdir() if each.is_file()]
        found = {str(file): file.stat().st_size for file in files}
    else:
        base, sizes = s3_directories.files(there)
        found = {f"{base}/{name}": size for name, size in sizes.items() if "/" not in name}
        if not found:
            size = s3.keys(there.parent).get(there.key.rpartition("/")[2])
            if size is None:
                return None
            found = {str(there): size}
    files_ = (Stored(name, size) for name, size in found.items() if name.endswith(suffix))
    return sorted(file for file in files_ if not file.name.startswith("."))


def stored_below(location: Location) -> list[Stored] | None:
    """All files below a directory, at any depth, by name, but hidden ones; None where there is none."""
    if (there := s3.at(location)) is None:
        place = local(location)
        if not place.is_dir():
            return None
        base: object = place
        files = [each for each in place.rglob("*") if each.is_file()]
        sizes = {each.relative_to(place).as_posix(): each.stat().st_size for each in files}
    else:
        base, sizes = s3_directories.files(there)
        if not sizes:
            return None
    shown = {name: size for name, size in sizes.items() if not f"/{name}".count("/.")}
    return sorted(Stored(f"{base}/{name}", size) for name, size in shown.items())


class _Ranges(io.RawIOBase):
    """An object, read by ranges."""

    def __init__(self, place: s3.Place, size: int, start: int):
        self.place, self.total, self.start, self.at = place, size, start, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def size(self) -> int:
        return self.total

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.total}[whence]
        return self.at

    def read(self, count: int | None = -1) -> bytes:
        stop = self.total if count is None or count < 0 else min(self.at + count, self.total)
        first, last = self.start + self.at, self.start + stop
        content = s3.get_range(self.place, first, last) if last > first else b""
        self.at += len(content)
        return content
