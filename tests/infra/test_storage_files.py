"""Files by name, in a directory and on a real S3 server."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.storage import Files


@pytest.fixture(params=["directory", "s3"])
def files(request: pytest.FixtureRequest, tmp_path: Path, s3_bucket: Callable[[str], str]) -> Files:
    return Files(str(tmp_path / "new" / "files") if request.param == "directory" else s3_bucket("new/files"))


def test_what_is_put_can_be_read_replaced_and_deleted(files: Files) -> None:
    assert files.names() == []
    for name, content in (("b", b"bytes"), ("a", b"old"), ("a", b"newer")):
        files.put(name, io.BytesIO(content))
    assert files.names() == ["a", "b"]
    with files.open("a") as file:
        assert (file.size(), file.read()) == (5, b"newer")
        file.seek(3)
        assert file.read() == b"er"
    for _ in range(2):
        files.delete("a")
    assert files.names() == ["b"]
    with pytest.raises(FileNotFoundError):
        files.open("a")


class Broken(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError("the disk is gone")


def test_a_file_that_could_not_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    files = Files(str(tmp_path))
    files.put("a", io.BytesIO(b"old"))
    with pytest.raises(OSError, match="the disk is gone"):
        files.put("a", Broken())
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and files.open("a").read() == b"old"


@pytest.mark.parametrize("location", ["gs://bucket/videos", "s3://", "s3:/bucket", "https://example.com/a"])
def test_another_kind_of_location_is_refused_in_one_sentence(location: str) -> None:
    with pytest.raises(ValueError, match="neither a directory nor s3://BUCKET/PREFIX"):
        Files(location)
