"""Directories are whole or do not exist, whoever wrote them and whoever was killed."""

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest

from infra import storage


def publish_one(path: Path, content: str = "weights", **metadata: object) -> None:
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        (directory / "nested").mkdir()
        (directory / "nested" / "a.bin").write_text(content)
        (directory / "b.bin").write_text(content * 2)
    storage.publish(staging, path, metadata)


def write_rank(staging: str, rank: int) -> None:
    with storage.writing(staging) as directory:
        (directory / f"rank-{rank}.bin").write_bytes(bytes([rank]) * 100_000)


def publish_for_ever(parent: str, start: int) -> None:
    for number in range(start, 1_000_000):
        path = Path(parent) / f"update-{number}"
        staging = storage.begin(path)
        for rank in range(3):
            write_rank(staging, rank)
        storage.publish(staging, path, {"update": number})
        storage.prune(parent, keep=3)


def test_several_processes_write_one_directory(tmp_path: Path) -> None:
    path = tmp_path / "run" / "update-1"
    staging = storage.begin(path)
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=write_rank, args=(staging, rank)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert not path.exists() and storage.newest_complete(path.parent) is None
    storage.publish(staging, path, {"update": 1, "role": {"student": [1, 2]}})
    storage.verify(path)
    assert storage.read_metadata(path) == {"update": 1, "role": {"student": [1, 2]}}
    with storage.reading(path) as directory:
        assert sorted(os.listdir(directory)) == ["manifest.json", "rank-0.bin", "rank-1.bin", "rank-2.bin"]
        assert (directory / "rank-2.bin").read_bytes() == bytes([2]) * 100_000
    assert os.listdir(path.parent) == ["update-1"]


def test_killed_at_any_moment_leaves_only_whole_directories(tmp_path: Path) -> None:
    generator = random.Random(0)
    context = multiprocessing.get_context("forkserver")
    newest = 0
    for _ in range(8):
        process = context.Process(target=publish_for_ever, args=(str(tmp_path), newest + 1))
        process.start()
        deadline = time.monotonic() + 20
        while storage.newest_complete(tmp_path) in (None, str(tmp_path / f"update-{newest}")):
            assert time.monotonic() < deadline, "nothing was published"
        time.sleep(generator.uniform(0, 0.02))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        visible = [child for child in tmp_path.iterdir() if not child.name.startswith(".")]
        assert visible
        for child in visible:
            storage.verify(child)
        newest = storage.read_metadata(storage.newest_complete(tmp_path))["update"]
        assert newest == max(storage.read_metadata(child)["update"] for child in visible)
        storage.publish(storage.begin(tmp_path / "update-0"), tmp_path / "update-0", {})  # as a new run does
        shutil.rmtree(tmp_path / "update-0")
        assert not [child for child in tmp_path.iterdir() if child.name.startswith(".")]


def damage_content(path: Path) -> None:
    (path / "nested" / "a.bin").write_text("weighty")


def damage_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text.replace('"update": 7', '"update": 8'))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_content, r"nested/a\.bin is not what was written"),
        (lambda path: (path / "b.bin").write_text("x"), r"b\.bin has 1 bytes instead of 14"),
        (lambda path: (path / "b.bin").unlink(), r"b\.bin is missing"),
        (damage_manifest, r"manifest\.json is not what was written"),
        (lambda path: (path / "manifest.json").write_text('{"for'), r"manifest\.json is not a manifest"),
        (lambda path: (path / "manifest.json").unlink(), r"never finished: it has no manifest\.json"),
        (lambda path: path.rename(path.with_name("moved")), r"does not exist"),
    ],
)
def test_verify_names_what_is_wrong(tmp_path: Path, damage, message: str) -> None:
    path = tmp_path / "update-7"
    publish_one(path, update=7)
    storage.verify(path)
    damage(path)
    with pytest.raises(storage.StorageError, match=message) as error:
        storage.verify(path)
    assert "\n" not in str(error.value)
    # A flipped byte of the same length is for `verify` alone; the cheap check sees all the rest.
    assert storage.is_complete(path) == (damage is damage_content)


def test_newer_format_is_refused(tmp_path: Path) -> None:
    publish_one(tmp_path / "one")
    manifest = json.loads((tmp_path / "one" / "manifest.json").read_text())
    (tmp_path / "one" / "manifest.json").write_text(json.dumps({**manifest, "format_version": 2}))
    with pytest.raises(storage.StorageError, match="format version 2, and this installation reads 1"):
        storage.read_metadata(tmp_path / "one")


def test_prune_keeps_the_newest_by_order_of_publishing(tmp_path: Path) -> None:
    # Resumed from 10 after 100 had been written: 20 is newer than 100, whatever the names say.
    for name in ("update-10", "update-9", "update-100", "update-20"):
        publish_one(tmp_path / name)
    (tmp_path / "not-ours").mkdir()
    (tmp_path / "update-20" / "b.bin").unlink()  # damaged: neither newest nor counted, and left alone
    assert storage.newest_complete(tmp_path) == str(tmp_path / "update-100")
    assert storage.prune(tmp_path, keep=2, spare=lambda name: name == "update-10") == []
    assert storage.prune(tmp_path, keep=2) == [str(tmp_path / "update-10")]
    assert storage.prune(tmp_path, keep=1) == [str(tmp_path / "update-9")]
    assert sorted(os.listdir(tmp_path)) == ["not-ours", "update-100", "update-20"]
    with pytest.raises(ValueError, match="keep must be at least 1"):
        storage.prune(tmp_path, keep=0)


def test_publish_replaces_and_refuses(tmp_path: Path) -> None:
    publish_one(tmp_path / "one", "old")
    publish_one(tmp_path / "one", "new")
    storage.verify(tmp_path / "one")
    assert (tmp_path / "one" / "b.bin").read_text() == "newnew"
    assert os.listdir(tmp_path) == ["one"]
    with pytest.raises(storage.StorageError, match=r"staging directory .* does not exist"):
        storage.publish(tmp_path / "nowhere", tmp_path / "two", {})
    staging = storage.begin(tmp_path / "two")
    (Path(staging) / "link").symlink_to(tmp_path / "one")
    with pytest.raises(storage.StorageError, match="only plain files"):
        storage.publish(staging, tmp_path / "two", {})
    assert os.listdir(tmp_path) == ["one"]  # what cannot be published leaves nothing behind
    assert storage.newest_complete(tmp_path / "absent") is None and storage.clean(tmp_path / "absent") == []


@pytest.mark.parametrize("location", ["gs://bucket/run", Path("s3://bucket/run")])
def test_other_locations_are_one_clear_sentence(location) -> None:
    with pytest.raises(ValueError, match="give a local path or a path on a shared file system"):
        storage.begin(location)


def refuse(monkeypatch: pytest.MonkeyPatch, function: str, code: int, times: int = 1000) -> None:
    """`os.<function>` fails with the error number `code`, as many times, and then works."""
    works, left = getattr(os, function), [times]

    def fails(*arguments, **settings):
        if left[0]:
            left[0] -= 1
            raise OSError(code, os.strerror(code))
        return works(*arguments, **settings)

    monkeypatch.setattr(os, function, fails)


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("function", ["replace", "fsync"])
def test_a_disk_that_takes_no_file_is_one_sentence_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, code: int
) -> None:
    storage.write_text(tmp_path / "report.md", "old")
    refuse(monkeypatch, function, code)
    with pytest.raises(storage.StorageError) as error:
        storage.write_text(tmp_path / "report.md", "new")
    assert str(error.value) == f"{tmp_path}/report.md cannot be written: {os.strerror(code).lower()}."
    assert os.listdir(tmp_path) == ["report.md"] and (tmp_path / "report.md").read_text() == "old"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path, reason in (
        (tmp_path / "file" / "a", "not a directory"),
        (tmp_path / "folder", "is a directory"),
    ):
        with pytest.raises(storage.StorageError, match=f"{path} cannot be written: {reason}"):
            storage.write_bytes(path, b"x")
    for path in (tmp_path / "file", tmp_path / "file" / "a"):
        with pytest.raises(storage.StorageError, match=f"{path} cannot be written: not a directory"):
            storage.begin(path)
    with pytest.raises(RuntimeError), storage.write_file(tmp_path / "a.mp4") as aside:
        assert aside.suffix == ".mp4"
        aside.write_text("half")
        raise RuntimeError("whatever ends the writer")
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC])
def test_a_full_disk_names_the_directory_that_was_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    publish_one(tmp_path / "model", "old")
    staging = storage.begin(tmp_path / "model")
    says = f"^{tmp_path}/model cannot be written: {os.strerror(code).lower()}\\.$"
    with pytest.raises(storage.StorageError, match=says), storage.writing(staging):
        raise OSError(code, os.strerror(code))
    with monkeypatch.context() as patch:
        refuse(patch, "fsync", code)
        with pytest.raises(storage.StorageError, match=says):
            storage.publish(staging, tmp_path / "model", {})
    storage.verify(tmp_path / "model")
    assert os.listdir(tmp_path) == ["model"]


def test_what_a_living_writer_writes_is_not_cleaned_and_what_a_dead_one_left_is(tmp_path: Path) -> None:
    mine = storage.begin(tmp_path / "one")
    context = multiprocessing.get_context("forkserver")
    for name in ("one", "two"):
        process = context.Process(target=storage.begin, args=(tmp_path / name,))
        process.start()
        process.join()
    assert len(os.listdir(tmp_path)) == 2  # the second writer removed what the first one left
    assert storage.begin(tmp_path / "one") != mine and Path(mine).is_dir()
    assert len(os.listdir(tmp_path)) == 2
    elsewhere = (
        tmp_path / ".one.tmp-00000000-1-1-0123456789abcdef"
    )  # whether its writer lives nobody here knows
    elsewhere.mkdir()
    assert storage.clean(tmp_path) == []
    os.utime(elsewhere, (0, 0))
    assert storage.clean(tmp_path) == [str(elsewhere)]
    (tmp_path / ".report.md.tmp-mine").write_text("a name that is not ours stays")
    assert storage.clean(tmp_path) == []


def test_two_writers_of_one_place_prune_and_publish_without_an_error(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    writers = [context.Process(target=publish_some, args=(str(tmp_path), 40)) for _ in range(2)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
    for child in tmp_path.iterdir():
        storage.verify(child)


def publish_some(parent: str, count: int) -> None:
    for number in range(count):
        publish_one(Path(parent) / f"update-{number}", update=number)
        storage.prune(parent, keep=1)


def test_a_child_that_another_process_prunes_first_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(3):
        publish_one(tmp_path / f"update-{number}")
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        shutil.rmtree(source)
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    assert storage.prune(tmp_path, keep=1) == []
    assert os.listdir(tmp_path) == ["update-2"]


@pytest.mark.parametrize("code", [errno.EBUSY, errno.ENOTEMPTY])
@pytest.mark.parametrize("function", ["rename", "rmdir"])
def test_what_a_slow_file_system_holds_on_to_ends_no_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    function: str,
    code: int,
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for number in range(3):
        publish_one(tmp_path / f"update-{number}")
    with monkeypatch.context() as patch:
        refuse(patch, function, code, times=2)
        assert storage.prune(tmp_path, keep=2) == [f"{tmp_path}/update-0"] and not caplog.records
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        refuse(patch, function, code)
        assert storage.prune(tmp_path, keep=1) == []
    assert "cannot be removed yet" in caplog.text
    storage.verify(tmp_path / "update-2")
    assert storage.newest_complete(tmp_path) == f"{tmp_path}/update-2"
