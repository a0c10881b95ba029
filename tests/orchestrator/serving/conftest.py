"""A real Serve on a real port, and the applications that tests deploy on it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from ray import serve

from model.rollout_plan import RolloutConfig
from model.transformer import TransformerConfig
from orchestrator.serving.app import application
from orchestrator.serving.client import Client, ReceivedChunk, StreamSession
from orchestrator.serving.config import AccessConfig, ServeConfig, VideosConfig
from orchestrator.serving.messages import Done
from tests.cluster import free_ports
from tests.fixtures import write_model
from workers.model_directory import VideoConfig

SIZES = TransformerConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, text_len=8, text_dim=16, freq_dim=32)
ROLLOUT = RolloutConfig(steps=(1000, 500), chunk=2, window=6, positions="relative")
# Tests ask more often than people do.
FRIEND = "https://friend.example"
OFTEN = AccessConfig(requests_per_minute=100_000, origins=(FRIEND,))
CONFIG = ServeConfig(
    slots=2, queue=1, cpus=0.1, drain_s=1, start_s=5, reconnect_s=5, refresh_s=0.2, access=OFTEN
)


def write_student(path: Path, *, seed: int = 1, fps: int = 100) -> Path:
    """A tiny student that can stream."""
    video = VideoConfig(frames=6, fps=fps, pixel_mean=-0.85, pixel_std=0.5)
    write_model(path, SIZES, seed=seed, rollout=ROLLOUT, video=video)
    return path


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def play(session: StreamSession) -> tuple[list[ReceivedChunk], Done]:
    """What comes until the end."""
    chunks = []
    while True:
        message = session.receive()
        if isinstance(message, ReceivedChunk):
            chunks.append(message)
        if isinstance(message, Done):
            return chunks, message


class Clock:
    """Time that passes when a test says so."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(scope="session")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_student(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture(scope="session")
def serve_url(ray_cluster: object) -> Iterator[str]:
    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture(scope="session")
def deploy(serve_url: str, student: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """A context manager that deploys an application and gives its URL."""

    @contextmanager
    def deployed(name: str, config: ServeConfig = CONFIG) -> Iterator[str]:
        if config.model == ServeConfig.model:
            config = replace(config, model=str(student))
        if config.videos == VideosConfig():
            config = replace(config, videos=VideosConfig(storage=str(tmp_path_factory.mktemp("videos"))))
        serve.run(application(config), name=name, route_prefix=f"/{name}")
        url = f"{serve_url}/{name}"
        try:
            # The proxy may take a moment to learn of a replica.
            eventually(lambda: requests.get(f"{url}/healthz", timeout=30).status_code == 200)
            yield url
        finally:
            serve.delete(name)

    return deployed


@pytest.fixture(scope="session")
def shared_url(deploy: Callable) -> Iterator[str]:
    """An application that several modules look at, with the settings of CONFIG."""
    with deploy("shared") as url:
        yield url


@pytest.fixture
def client(shared_url: str) -> Iterator[Client]:
    """A client of the shared application; whatever a test began there has ended when the next one comes."""
    client = Client(shared_url)
    yield client
    for video in client.get("/v1/videos", limit=100)["data"]:
        requests.delete(f"{shared_url}/v1/videos/{video['id']}", timeout=30)
    eventually(lambda: (health := client.get("/healthz"))["streams"] + health["queue"] == 0)
