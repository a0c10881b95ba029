"""Files by name, in a directory or under an s3:// prefix: small enough to be written in one go."""

import os
from pathlib import Path
from shutil import copyfileobj
from typing import BinaryIO

from pyarrow import ArrowInvalid, NativeFile
from pyarrow.fs import FileSelector, FileSystem, FileType, LocalFileSystem, S3FileSystem

from infra.settings import ADDRESS
from infra.storage.local import whole_file


class Files:
    """The files of one place. Names are the caller's own: a name that a stranger chose must not come here.

    S3 is reached with the credentials, region and endpoint of the AWS_ variables, or of the location's query.
    """

    def __init__(self, location: str):
        """ValueError for a location that is neither a path nor s3://BUCKET/PREFIX; nothing is read yet."""
        if not ADDRESS.match(location):
            self.location = os.path.abspath(location)
            self._system: FileSystem = LocalFileSystem()
            self._root = self.location
            return
        self.location = location
        try:
            self._system, self._root = FileSystem.from_uri(location)
        except ArrowInvalid:
            self._root = ""
        if not self._root or not isinstance(self._system, S3FileSystem):
            raise ValueError(f"{location} is neither a directory nor s3://BUCKET/PREFIX.")

    def put(self, name: str, content: BinaryIO) -> None:
        """Write a file, in place of one that is there, all of it or nothing. OSError where that cannot be."""
        path = self.path(name)
        if path is None:
            with self._system.open_output_stream(self._at(name)) as stored:
                copyfileobj(content, stored)
        else:
            with whole_file(path) as aside, open(aside, "wb") as file:
                copyfileobj(content, file)

    def open(self, name: str) -> NativeFile:
        """A file to read, which can seek; FileNotFoundError where there is none."""
        return self._system.open_input_file(self._at(name))

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        if self._system.get_file_info(self._at(name)).type == FileType.File:
            self._system.delete_file(self._at(name))

    def names(self) -> list[str]:
        """Of every file here, sorted."""
        found = self._system.get_file_info(FileSelector(self._root, allow_not_found=True))
        names = sorted(each.base_name for each in found if each.type == FileType.File)
        return [name for name in names if not name.startswith(".")]

    def path(self, name: str) -> Path | None:
        """Where a file lies on this machine; none for S3."""
        return Path(self._root) / name if isinstance(self._system, LocalFileSystem) else None

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"
