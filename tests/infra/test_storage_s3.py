"""Directories in an object store are whole or not there, whatever the store and the way to it do."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.storage import cache, s3, s3_directories
from tests.s3_server import S3Server, reached

RUN = "s3://runs/a b/é/run"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    server.create("runs")
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def here(server: S3Server, tmp_path: Path) -> Iterator[None]:
    server.fails, server.down, server.cuts = 0.0, False, 0
    with reached(server, SELF_FORCING_CACHE=str(tmp_path / "cache")):
        yield
        storage.discard("s3://runs/a b")


def publish_one(path: str, content: str = "weights", **metadata: object) -> None:
    staging = storage.begin(path)
    for rank in range(2):
        with storage.writing(staging) as directory:
            (directory / "nested").mkdir(exist_ok=True)
            (directory / "nested" / f"{rank}.bin").write_text(content * (rank + 1))
    storage.publish(staging, path, metadata)


def objects() -> set[str]:
    return set(s3.keys(s3.Place("runs", "a b")))


def test_what_is_published_is_read_whole_and_replaced_at_once(server: S3Server) -> None:
    assert not storage.is_complete(RUN) and storage.newest_complete("s3://runs/a b/é") is None
    with pytest.raises(storage.StorageError, match=r"s3://runs/a b/é/run does not exist\."):
        storage.read_metadata(RUN)
    publish_one(RUN, number=1)
    storage.verify(RUN)
    assert storage.is_complete(RUN) and storage.read_metadata(RUN) == {"number": 1}
    with storage.reading(RUN) as directory:
        assert (directory / "nested" / "1.bin").read_text() == "weightsweights"
        # Whoever reads goes on with what it found.
        publish_one(RUN, "other", number=2)
        assert (directory / "nested" / "0.bin").read_text() == "weights"
        with storage.reading(RUN) as other:
            assert (other / "nested" / "0.bin").read_text() == "other"
    assert len(objects()) == 3  # two files and the manifest: what was before is gone
    assert set(storage.digests(RUN)) == {"nested/0.bin", "nested/1.bin"}


def test_children_are_ordered_pruned_moved_and_cleaned(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (3, 1, 2):
        publish_one(f"{RUN}/{number}", number=number)
    assert storage.newest_complete(RUN) == f"{RUN}/2"
    assert storage.prune(RUN, keep=2) == [f"{RUN}/3"] and storage.newest_sound(RUN) == (f"{RUN}/2", [])
    storage.move(f"{RUN}/2", f"{RUN}-aside/2")
    assert storage.newest_complete(RUN) == f"{RUN}/1" and storage.is_complete(f"{RUN}-aside/2")
    with storage.reading(f"{RUN}-aside/2") as directory:
        assert (directory / "nested" / "0.bin").read_text() == "weights"

    # A writer that was killed is left alone for a day.
    with storage.writing(storage.begin(f"{RUN}/4")) as directory:
        (directory / "a.bin").write_text("a")
    assert storage.clean(RUN) == [] and storage.newest_complete(RUN) == f"{RUN}/1"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 25 * 3600)
    (left,) = storage.clean(RUN)
    assert left.startswith(f"{RUN}/4/.files-")
    assert storage.discard(f"{RUN}/1") and not storage.discard(f"{RUN}/1")
    assert all(name.startswith("é/run-aside/2/") for name in objects())


def test_files_are_listed_as_those_of_a_directory_are(tmp_path: Path) -> None:
    for name in ("a.bin", "deep/b.bin", ".hidden/c.bin", "deep/.d.bin", ".e.bin"):
        s3.put(s3.Place("runs", f"a b/files/{name}"), name.encode())
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for place in ("s3://runs/a b/files", str(tmp_path)):
        assert [file.name for file in storage.stored(place, ".bin") or ()] == ["a.bin"]
        below = storage.stored_below(place) or []
        assert [file.location.removeprefix(place) for file in below] == ["/a.bin", "/deep/b.bin"]
        with below[1].open() as file:
            file.seek(5)
            assert bytes(file.read(3)) == b"b.b" and file.size() == 10
        assert storage.stored(f"{place}/nothing", ".bin") is storage.stored_below(f"{place}/nothing") is None
    assert storage.stored("s3://runs/a b/files/a.bin", ".bin") == storage.stored(
        "s3://runs/a b/files", ".bin"
    )
    # What is published lies in the folder that its manifest names; what was never finished is not there.
    with storage.writing(storage.begin(RUN)) as directory:
        (directory / "dead.bin").write_text("dead")
    assert storage.stored(RUN, ".bin") is None
    staging = storage.begin(RUN)
    with storage.writing(staging) as directory:
        (directory / "alive.bin").write_text("alive")
    storage.publish(staging, RUN, {})
    assert [file.name for file in storage.stored(RUN, ".bin") or ()] == ["alive.bin"]


def test_more_objects_than_a_page_are_listed_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "PAGE", 10)  # a store's own is 1,000
    staging = storage.begin(RUN)
    with storage.writing(staging) as directory:
        for number in range(32):
            (directory / f"{number}").write_text(str(number))
    storage.publish(staging, RUN, {})
    assert len(storage.digests(RUN)) == 32 and storage.is_complete(RUN)
    assert storage.discard(RUN) and not objects()


def test_a_large_file_goes_in_parts(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    content = os.urandom(11 * 2**20)
    monkeypatch.setattr(s3._transfer, "multipart_threshold", 5 * 2**20)
    monkeypatch.setattr(s3._transfer, "multipart_chunksize", 5 * 2**20)
    staging, before = storage.begin(RUN), server.asked["PUT large.bin"]
    with storage.writing(staging) as directory:
        (directory / "large.bin").write_bytes(content)
    storage.publish(staging, RUN, {})
    assert server.asked["PUT large.bin"] - before == 3
    storage.move(RUN, f"{RUN} aside")  # within the store
    with storage.reading(f"{RUN} aside") as directory:
        assert (directory / "large.bin").read_bytes() == content


def test_what_is_damaged_or_missing_is_named_and_never_taken_for_whole(server: S3Server) -> None:
    publish_one(RUN)
    place = s3.Place("runs", "a b/é/run")
    folder = s3_directories.read_manifest(place)["folder"]
    good = s3.get(place / folder / "nested/1.bin")
    assert good is not None
    s3.put(place / folder / "nested/1.bin", b"x" * len(good))
    for _ in range(2):
        with (
            pytest.raises(
                storage.StorageError, match=r"the content of nested/1\.bin is not what was written"
            ),
            storage.reading(RUN),
        ):
            pass
    assert not [each for each in cache.root().iterdir() if each.is_dir()]
    s3.put(place / folder / "nested/1.bin", good[:-1])
    with pytest.raises(storage.StorageError, match="has 13 bytes instead of 14"):
        storage.verify(RUN)
    s3.delete(place / folder, ["nested/1.bin"])
    with pytest.raises(storage.StorageError, match=r"nested/1\.bin is missing"):
        storage.verify(RUN)
    assert storage.newest_complete("s3://runs/a b/é") is None
    content = s3.get(place / "manifest.json")
    assert content is not None
    for damaged in (content[:50], content.replace(b'"size": 14', b'"size": 15')):
        s3.put(place / "manifest.json", damaged)
        with pytest.raises(storage.StorageError, match="is damaged"):
            storage.read_metadata(RUN)


def test_a_store_that_fails_now_and_then_is_asked_again(server: S3Server) -> None:
    server.fails = 0.3
    for number in range(3):
        publish_one(f"{RUN}/{number}", f"content {number}")
    storage.prune(RUN, keep=2)
    with storage.reading(str(storage.newest_complete(RUN))) as directory:
        assert (directory / "nested" / "0.bin").read_text() == "content 2"
    server.fails = 0.0
    assert len(objects()) == 2 * 3


def test_a_store_that_fails_for_long_is_asked_as_patiently_as_at_first(
    server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """botocore's own modes give a client a quota of retries, which would be used up here."""
    monkeypatch.setattr(s3, "LONGEST_WAIT_S", 0.001)
    monkeypatch.setattr(s3, "ATTEMPTS", 40)
    server.fails = 0.5
    place = s3.Place("runs", "often")
    for number in range(200):
        s3.put(place / str(number), b"content")
    assert len(s3.keys(place)) == 200


def test_a_content_that_breaks_off_is_asked_for_again(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "LONGEST_WAIT_S", 0.001)
    place = s3.Place("runs", "broken off")
    s3.put(place, bytes(range(256)))
    server.cuts = 3
    assert s3.get(place) == bytes(range(256))
    server.cuts = 3
    assert s3.get_range(place, 16, 32) == bytes(range(16, 32))
    server.cuts = 3
    s3.download(place, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == bytes(range(256))
    assert server.cuts == 0


@pytest.mark.parametrize(
    ("environment", "path", "says"),
    [
        ({"AWS_ACCESS_KEY_ID": ""}, RUN, "there are no credentials; set AWS_ACCESS_KEY_ID"),
        ({}, "s3://nowhere/run", "there is no such bucket"),
        ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, RUN, "Could not connect to the endpoint URL"),
        ({}, "s3://runs", "names no place in a bucket; use s3://BUCKET/PREFIX"),
    ],
    ids=["no credentials", "no bucket", "no store", "no key"],
)
def test_what_cannot_be_reached_is_one_sentence(
    environment: dict[str, str], path: str, says: str, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 2)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with reached(server, **environment):
        if not environment.get("AWS_ACCESS_KEY_ID", "key"):
            del os.environ["AWS_ACCESS_KEY_ID"], os.environ["AWS_SECRET_ACCESS_KEY"]
        for ask in (storage.read_metadata, lambda path: publish_one(path)):
            with pytest.raises(storage.StorageError) as caught:
                ask(path)
            assert says in str(caught.value) and path in str(caught.value)
            assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "code", ["AccessDenied", "ExpiredToken", "RequestTimeTooSkewed", "PermanentRedirect"]
)
def test_what_the_store_refuses_is_one_sentence_with_advice(code: str) -> None:
    from botocore.exceptions import ClientError

    with (
        pytest.raises(storage.StorageError, match=r"^s3://runs/a: .*\.$") as caught,
        s3.asking(s3.Place("runs", "a")),
    ):
        raise ClientError({"Error": {"Code": code, "Message": "no"}}, "GetObject")
    assert s3._ADVICE[code] in str(caught.value)


def read_it(path: str, done: "multiprocessing.Queue[int]") -> None:
    with storage.reading(path) as directory:
        done.put(len((directory / "nested" / "0.bin").read_bytes()))


def test_processes_of_a_node_download_once_and_one_that_is_killed_leaves_nothing(server: S3Server) -> None:
    publish_one(RUN, "w" * 2**20)
    context = multiprocessing.get_context("spawn")
    before, done = server.asked["GET 0.bin"], context.Queue()
    readers = [context.Process(target=read_it, args=(RUN, done)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(60)
    assert [done.get(timeout=10) for _ in readers] == [2**20] * 3
    assert server.asked["GET 0.bin"] - before == 1

    publish_one(RUN, "v" * 2**20)
    server.down = True  # so that it is killed while it downloads
    victim = context.Process(target=read_it, args=(RUN, done))
    victim.start()
    asked = sum(server.asked.values())
    while sum(server.asked.values()) == asked:
        time.sleep(0.01)
    os.kill(victim.pid, signal.SIGKILL)
    victim.join()
    server.down = False
    with storage.reading(RUN) as directory:
        assert (directory / "nested" / "0.bin").read_text() == "v" * 2**20
    assert len([each for each in cache.root().iterdir() if each.is_dir()]) == 2


def test_what_is_replaced_while_it_is_read_is_read_as_it_is_now(monkeypatch: pytest.MonkeyPatch) -> None:
    publish_one(RUN, "before")
    fetch, fetched = s3_directories.fetch, []

    def slow(place: s3.Place, manifest: Mapping[str, Any], directory: Path) -> None:
        if not fetched:
            publish_one(RUN, "after")
        fetched.append(manifest)
        fetch(place, manifest, directory)

    monkeypatch.setattr(s3_directories, "fetch", slow)
    with storage.reading(RUN) as directory:
        assert (directory / "nested" / "0.bin").read_text() == "after" and len(fetched) == 2


def test_a_copy_that_is_taken_away_while_it_is_read_is_fetched_anew(server: S3Server) -> None:
    publish_one(RUN, "content")
    with storage.reading(RUN) as first:
        shutil.rmtree(first)
        with storage.reading(RUN) as again:
            assert (again / "nested" / "0.bin").read_text() == "content"


def test_what_was_not_read_for_longest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(4):
        publish_one(f"{RUN}/{number}", str(number) * 100_000)  # 300 kB each
    monkeypatch.setenv("SELF_FORCING_CACHE_GB", "0.0007")

    def copies() -> int:
        return len([each for each in cache.root().iterdir() if each.is_dir()])

    with storage.reading(f"{RUN}/0") as first:
        for number in (1, 2, 3):
            with storage.reading(f"{RUN}/{number}"):
                assert copies() <= 2 and (first / "nested" / "0.bin").exists()
    monkeypatch.setenv("SELF_FORCING_CACHE_GB", "0.0001")
    too_large = pytest.raises(storage.StorageError, match=r"more than SELF_FORCING_CACHE_GB, 0\.0001; raise")
    with too_large, storage.reading(f"{RUN}/1"):
        pass
    monkeypatch.setenv("SELF_FORCING_CACHE_GB", "much")
    with (
        pytest.raises(storage.StorageError, match="must be a number of gigabytes"),
        storage.reading(f"{RUN}/2"),
    ):
        pass
