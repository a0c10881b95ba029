"""Two processes never own one place; a dead one's is taken over, and a living one's is not."""

import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from infra.storage import StorageError, lock, s3
from pipelines import cli
from tests.fixtures import TINY_RECIPE, furnished
from tests.mlflow_server import wait_for
from tests.s3_server import S3Server

pytestmark = pytest.mark.slow


def own(place: str, ready: Any) -> None:
    with storage.owned(place, "distill", print):
        ready.set()
        signal.pause()


@contextmanager
def another(place: str) -> Iterator[multiprocessing.Process]:
    """A process that owns `place`."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=own, args=(place, ready))
    process.start()
    try:
        assert ready.wait(60)
        yield process
    finally:
        process.kill()
        process.join()


@pytest.fixture(params=["local", "S3"])
def place(request: pytest.FixtureRequest, s3_server: S3Server, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield f"{tmp_path}/my run"
        return
    yield "s3://bucket/my run"
    storage.discard("s3://bucket/my run")


def content(place: str) -> dict[str, Any] | None:
    found = storage.read_bytes(f"{place}/{lock.NAME}")
    return None if found is None else json.loads(found)


def test_a_living_owner_is_named_and_a_killed_one_is_followed(place: str) -> None:
    with another(place) as process:
        with pytest.raises(StorageError) as refused, storage.owned(place, "pretrain", print):
            pass
        assert f"{place} is in use: distill of " in str(refused.value)
        assert f"process {process.pid} on " in str(refused.value)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        with storage.owned(place, "pretrain", print):
            assert (told := content(place)) is not None and told["pid"] == os.getpid()
            with (
                pytest.raises(StorageError, match="is in use: pretrain of"),
                storage.owned(place, "a", print),
            ):
                pass
    assert content(place) is None
    if s3.at(place) is None:
        assert os.listdir(place) == []


def test_an_owner_elsewhere_is_dead_when_it_gives_no_sign_of_life(
    place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_S", 0.1)
    monkeypatch.setattr(lock, "PATIENCE_S", 3.0)
    lost: list[str] = []
    with storage.owned(place, "distill", lost.append):
        # As seen from another machine: it watches signs of life, and cannot ask for the process.
        real = lock.host
        monkeypatch.setattr(lock, "host", lambda: "another machine")
        with pytest.raises(StorageError, match="is in use: distill of"), storage.owned(place, "a", print):
            pass
        monkeypatch.setattr(lock, "host", real)
    foreign = {"token": "x", "host": "elsewhere", "machine": "m", "pid": 1, "start": 1, "beats": 7}
    storage.write_text(f"{place}/{lock.NAME}", json.dumps(foreign))
    with storage.owned(place, "distill", lost.append):
        assert (told := content(place)) is not None and told["what"] == "distill"
        # Somebody took it all the same: its owner is told, and leaves the other's lock alone.
        storage.write_text(f"{place}/{lock.NAME}", json.dumps(foreign))
        wait_for(lambda: lost, "the loss to be noticed")
        assert lost == [f"{place} was taken over by process 1 on m"]
    assert (told := content(place)) is not None and told["token"] == "x"


def test_a_second_run_in_an_output_is_refused_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = furnished(tmp_path)
    capfd.readouterr()
    for command in ("pretrain", "initialize", "distill"):
        output = getattr(config, command).output
        with another(output):
            asked = [command, str(TINY_RECIPE), f"--root={tmp_path}", f"--data.train={config.data.train}"]
            assert cli.main(asked) == 2
            said = capfd.readouterr().err
            assert f"{output} is in use: distill of" in said and said.count("\n") == 1
