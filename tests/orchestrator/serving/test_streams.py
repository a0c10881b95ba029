"""Streams over plain HTTP: on real sockets, with viewers who behave well or badly."""

import io
import socket
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import av
import cv2
import pytest
import requests
from PIL import Image

from orchestrator.serving.client import Client, ServerError
from pipelines import cli
from tests.fixtures import random_weights, write_model
from tests.orchestrator.serving.conftest import FRIEND, ROLLOUT, SIZES, eventually

pytestmark = pytest.mark.slow
SIX = "a six drifting left"


def test_a_bounded_stream_is_read_by_pyav(client: Client) -> None:
    def body(**query: Any) -> bytes:
        return requests.get(
            f"{client.url}/v1/streams", {"prompt": SIX, "frames": 8, **query}, timeout=60
        ).content

    seen = body()
    with av.open(io.BytesIO(seen), format="mpjpeg") as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 8 and {frame.shape for frame in frames} == {(256, 256, 3)}
    assert all((a != b).any() for a, b in pairwise(frames))
    # The same seed, the same video; another, another.
    assert body() == seen != body(seed=1)


def test_a_stream_is_read_by_opencv(client: Client) -> None:
    capture = cv2.VideoCapture(f"{client.url}/v1/streams?prompt=a%20two&frames=4", cv2.CAP_FFMPEG)
    frames = [capture.read() for _ in range(4)]
    capture.release()
    assert all(read and frame.shape == (256, 256, 3) for read, frame in frames)


def test_a_stream_goes_on_from_a_frame_of_its_seed(client: Client) -> None:
    with client.stream(SIX, frames=7) as whole, client.stream(SIX, frames=7, first_frame=3) as rest:
        shown = list(whole)
        assert len(shown) == 7  # whole chunks would be 8
        assert shown[3:] == list(rest)


def test_whom_there_is_no_slot_for_is_told_to_come_again(client: Client) -> None:
    with client.stream(SIX) as first, client.stream(SIX) as second:
        assert all(Image.open(io.BytesIO(next(each))).size == (256, 256) for each in (first, second))
        with pytest.raises(ServerError, match="all 2 slots are taken") as refused, client.stream(SIX):
            pass
        assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "no_slot", 5)
        # Neither of those who were there has noticed.
        assert all(next(each) for each in (first, second))


@pytest.mark.parametrize(
    ("query", "names"),
    [({"prompt": ""}, "prompt"), ({"prompt": "  "}, "prompt"), ({"prompt": "x" * 1001}, "prompt"),
     ({"prompt": "a two " * 9}, "shorten it"), ({"seed": -1}, "seed"), ({"frames": 0}, "frames"),
     ({"frames": 2, "first_frame": 2}, "first_frame")],
)  # fmt: skip
def test_a_bad_request_is_one_sentence_in_one_shape(
    client: Client, query: dict[str, Any], names: str
) -> None:
    with pytest.raises(ServerError, match=names) as refused, client.stream(**{"prompt": SIX, **query}):
        pass
    assert refused.value.status == 422
    assert set(requests.get(f"{client.url}/nothing", timeout=30).json()) == {"error"}


def test_an_unknown_model_is_not_found(client: Client) -> None:
    with pytest.raises(ServerError, match="no model 'other'") as refused, client.stream(SIX, model="other"):
        pass
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")
    assert client.get("/v1/models")["data"][0]["id"] == "self-forcing"


def test_viewers_who_vanish_or_never_read_harm_nobody(client: Client) -> None:
    where = urlsplit(client.url)
    request = f"GET {where.path}/v1/streams?prompt=a%20two HTTP/1.1\r\nHost: {where.netloc}\r\n\r\n".encode()
    with (
        socket.create_connection((where.hostname, where.port)) as silent,
        socket.create_connection((where.hostname, where.port)) as gone,
    ):
        silent.sendall(request)
        gone.sendall(request)
        gone.recv(4096)
        gone.close()
        eventually(lambda: client.get("/healthz")["streams"] == 1)
        with client.stream(SIX, frames=20) as frames:
            assert len(list(frames)) == 20


def test_what_there_is_to_count_is_for_prometheus(client: Client) -> None:
    def text() -> str:
        return requests.get(f"{client.url}/metrics", timeout=30).text

    with client.stream(SIX, frames=4) as frames:
        assert len(list(frames)) == 4
    eventually(lambda: 'self_forcing_chunks_total{on_time="true",replica="' in text())
    assert "self_forcing_slots{" in text() and "self_forcing_first_chunk_seconds_bucket{" in text()


def test_the_page_is_there_and_the_interface_described(client: Client) -> None:
    page = requests.get(f"{client.url}/", timeout=30)
    assert page.headers["content-type"].startswith("text/html")
    assert "/v1/streams" in client.get("/openapi.json")["paths"]


def test_what_cannot_be_served_is_named_before_anything_starts(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_model(tmp_path / "teacher", SIZES, seed=1)
    (tmp_path / "short").write_text("secret")
    wide = random_weights(replace(SIZES, ffn_dim=64), seed=1)
    write_model(tmp_path / "mixed", SIZES, seed=1, rollout=ROLLOUT, weights=wide)
    for arguments, says in (
        (["--model", str(tmp_path / "none")], "there is no complete model at"),
        (["--model", str(tmp_path / "teacher")], "is no few-step student; streaming needs one."),
        (["--model", str(tmp_path / "mixed")], "blocks.0.ffn.0.bias [64] instead of [48]"),
        (["--slots", "0"], "slots is 0; it must be at least 1."),
        (["--ports", "1"], "ports"),
        (["--host", "0.0.0.0"], "there are no tokens; set access.tokens"),
        (["--certificate", "there.pem"], "give both or neither"),
        (["--access.tokens", str(tmp_path / "none")], "cannot be read"),
        (["--access.tokens", str(tmp_path / "short")], "fewer than 16 characters"),
    ):
        assert cli.main(["serve", *arguments]) == 2
        assert says in capfd.readouterr().err


def test_pages_of_allowed_origins_may_read_the_answers(client: Client) -> None:
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    for origin, allowed in ((FRIEND, FRIEND), ("https://evil.example", None)):
        headers = {"Origin": origin}
        preflight = requests.options(f"{client.url}/v1/tickets", headers={**headers, **asks}, timeout=60)
        answer = requests.post(f"{client.url}/v1/tickets", headers=headers, timeout=60)
        assert (preflight.ok, answer.ok) == (allowed is not None, allowed is not None)
        for each in (preflight, answer):
            assert each.headers.get("access-control-allow-origin") == allowed


def test_what_a_typed_client_leaves_empty_is_the_default(client: Client) -> None:
    with client.stream(SIX, frames=3) as frames:
        expected = list(frames)
    query = f"prompt={SIX}&frames=3&seed=&first_frame=&model="
    answer = requests.get(f"{client.url}/v1/streams?{query}", timeout=60)
    assert answer.ok and answer.content.count(b"Content-Length") == len(expected)
    assert all(frame in answer.content for frame in expected)
    video = {"prompt": SIX, "seconds": None, "size": "", "seed": None, "model": "", "input_reference": None}
    made = requests.post(f"{client.url}/v1/videos", json=video, timeout=60)
    assert made.ok and (made.json()["seconds"], made.json()["seed"]) == ("4", 0)
    assert requests.get(f"{client.url}/v1/videos?after=&limit=&order=", timeout=60).ok
