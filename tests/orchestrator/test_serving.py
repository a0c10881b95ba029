"""The streaming endpoint: a real Serve application on real sockets, and viewers who behave well or badly."""

import io
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import pytest
import requests
from PIL import Image
from ray import serve
from websockets.sync.client import ClientConnection, connect

from model.rollout import RolloutConfig
from model.transformer import TransformerConfig
from orchestrator.serving.app import HOST, ServeConfig, build
from pipelines import cli
from tests.cluster import free_ports
from tests.fixtures import write_model
from workers.model_directory import VideoConfig

pytestmark = pytest.mark.slow
SIZES = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_len=8, text_dim=16, freq_dim=32)
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=2, window=6, positions="relative")
SLOTS = 2


@pytest.fixture(scope="module")
def url(ray_cluster: object, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("serving") / "model"
    video = VideoConfig(frames=6, fps=100, pixel_mean=-0.85, pixel_std=0.5)
    write_model(path, SIZES, seed=1, rollout=ROLLOUT, video=video)
    (port,) = free_ports(1)
    config = ServeConfig(model=str(path), port=port, slots=SLOTS, cpus=0.1, drain_s=1)
    serve.start(http_options={"host": HOST, "port": port})
    try:
        serve.run(build(asdict(config)), name="test")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def nobody_is_left(url: str) -> Iterator[None]:
    yield
    eventually(lambda: requests.get(f"{url}/healthz", timeout=30).json()["streams"] == 0)


def images(response: requests.Response) -> Iterator[bytes]:
    """JPEG files of a multipart stream."""
    body = b""
    for part in response.iter_content(None):
        body += part
        while (end := body.find(b"\xff\xd9\r\n")) >= 0:
            yield body[body.index(b"\xff\xd8") : end + 2]
            body = body[end + 4 :]


def stream(url: str, **query: Any) -> requests.Response:
    return requests.get(
        f"{url}/v1/streams", {"prompt": "a six drifting left", **query}, stream=True, timeout=60
    )


@pytest.fixture
def session(url: str) -> Iterator[ClientConnection]:
    with connect(f"{url.replace('http', 'ws')}/v1/realtime/video", open_timeout=60) as connection:
        yield connection


def say(session: ClientConnection, kind: str, **values: Any) -> None:
    session.send(json.dumps({"type": kind, **values}))


def hear(session: ClientConnection, kind: str) -> dict[str, Any]:
    """The next message of a kind; whatever comes before it is passed over."""
    while True:
        message = session.recv(timeout=60)
        if isinstance(message, str) and json.loads(message)["type"] == kind:
            return json.loads(message)


def test_a_bounded_stream_is_read_by_pyav(url: str, tmp_path: Path) -> None:
    with stream(url, frames=8) as response:
        assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
        body = response.content
    with av.open(io.BytesIO(body), format="mpjpeg") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and {frame.shape for frame in frames} == {(256, 256, 3)}
    assert all((a != b).any() for a, b in pairwise(frames))
    # The same seed, the same video; another, another.
    with stream(url, frames=8) as again, stream(url, frames=8, seed=1) as other:
        assert again.content == body != other.content


def test_whom_there_is_no_slot_for_is_told_to_come_again(url: str) -> None:
    with stream(url) as first, stream(url) as second:
        seen = [images(response) for response in (first, second)]
        assert all(Image.open(io.BytesIO(next(each))).size == (256, 256) for each in seen)
        refused = stream(url)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "5")
        assert "all 2 slots are taken" in refused.json()["error"]["message"]
        # Neither of those who were there has noticed.
        assert all(next(each) for each in seen)


@pytest.mark.parametrize(
    ("query", "names"),
    [({"prompt": ""}, "prompt"), ({"prompt": "  "}, "prompt"), ({"prompt": "x" * 1001}, "prompt"),
     ({"prompt": "a two " * 9}, "shorten it"), ({"seed": -1}, "seed"), ({"frames": 0}, "frames")],
)  # fmt: skip
def test_a_bad_request_is_one_sentence_in_one_shape(url: str, query: dict[str, Any], names: str) -> None:
    answer = stream(url, **query)
    assert answer.status_code == 422
    error = answer.json()["error"]
    assert names in error["message"] and error["type"] == "invalid_request_error"
    assert set(requests.get(f"{url}/nothing", timeout=30).json()) == {"error"}


def test_viewers_who_vanish_or_never_read_harm_nobody(url: str) -> None:
    host, port = url.removeprefix("http://").split(":")
    request = f"GET /v1/streams?prompt=a%20two HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()
    with (
        socket.create_connection((host, int(port))) as silent,
        socket.create_connection((host, int(port))) as gone,
    ):
        silent.sendall(request)
        gone.sendall(request)
        gone.recv(4096)
        gone.close()
        eventually(lambda: requests.get(f"{url}/healthz", timeout=30).json()["streams"] == 1)
        with stream(url, frames=20) as response:
            assert len(list(images(response))) == 20


def test_a_session_changes_its_prompt_while_it_plays(session: ClientConnection) -> None:
    say(session, "session.ping")
    hear(session, "session.pong")
    say(session, "session.start", prompt="a six drifting left", seed=3)
    assert hear(session, "video.start") == {"type": "video.start", "fps": 100, "format": "jpeg"}
    first = hear(session, "video.chunk_metadata")
    frames = session.recv(timeout=60)
    assert (
        first["chunk_index"] == 0
        and len(frames) == sum(first["frame_bytes"])
        and len(first["frame_bytes"]) == 2
    )
    say(session, "session.interaction", prompt="a two drifting up", event_id="turn")
    assert hear(session, "session.interaction.queued")["event_id"] == "turn"
    applied = hear(session, "session.interaction.applied")
    assert applied["event_id"] == "turn" and applied["chunk_index"] >= 1
    assert hear(session, "video.chunk_metadata")["chunk_index"] == applied["chunk_index"]
    say(session, "session.interaction", prompt="a two " * 9, event_id="long")
    assert "shorten it" in hear(session, "session.interaction.rejected")["message"]
    say(session, "session.stop")
    assert hear(session, "session.done")["reason"] == "stopped"


def test_a_paused_session_waits_and_a_bounded_one_ends(session: ClientConnection) -> None:
    say(session, "session.start", prompt="a six drifting left", frames=12)
    hear(session, "video.chunk_metadata")
    say(session, "session.pause")
    say(session, "session.ping")
    hear(session, "session.pong")
    say(session, "session.resume")
    indices = []
    while True:
        message = session.recv(timeout=60)
        if isinstance(message, bytes):
            continue
        body = json.loads(message)
        if body["type"] == "session.done":
            break
        indices.append(body["chunk_index"])
    assert body["reason"] == "finished" and indices[-1] == 5


@pytest.mark.parametrize(
    ("message", "says"),
    [("{", "must be JSON"), ("[]", "an object with a type"), ('{"type": "session.jump"}', "has not started"),
     (b"\x00", "must be JSON text"), ("x" * 20_000, "at most 16384 bytes"),
     ('{"type": "session.start"}', "prompt must be text"),
     ('{"type": "session.start", "prompt": "a two", "seed": 1.5}', "seed must be an integer"),
     ('{"type": "session.start", "prompt": "a two", "frames": -1}', "frames must be an integer")],
)  # fmt: skip
def test_a_bad_message_is_refused_and_the_session_goes_on(
    session: ClientConnection, message: str | bytes, says: str
) -> None:
    session.send(message)
    assert says in hear(session, "error")["message"]
    say(session, "session.start", prompt="a six drifting left", frames=2)
    assert hear(session, "session.done")["reason"] == "finished"


def test_the_page_is_there_and_the_interface_described(url: str) -> None:
    page = requests.get(url, timeout=30)
    assert page.headers["content-type"].startswith("text/html") and "<canvas" in page.text
    assert "/v1/streams" in requests.get(f"{url}/openapi.json", timeout=30).json()["paths"]


def test_what_cannot_be_served_is_named_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "teacher", SIZES, seed=1)
    for arguments, says in (
        (["--model", str(tmp_path / "none")], "there is no complete model at"),
        (["--model", str(tmp_path / "teacher")], "is no few-step student; streaming needs one."),
        (["--slots", "0"], "slots is 0; it must be at least 1."),
        (["--ports", "1"], "ports"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        assert says in capfd.readouterr().err
