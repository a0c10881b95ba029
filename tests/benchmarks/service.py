"""What Serve, HTTP and WebSocket add to the engine, and what viewers notice when a new version is promoted.

Viewers, proxy and replica share the machine, as they would not in production.
"""

import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
from ray import serve
from websockets.exceptions import ConnectionClosed

from infra.registry import Registry
from orchestrator.cluster import connect
from orchestrator.serving.app import application
from orchestrator.serving.client import Client, ReceivedChunk, ServerError
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.messages import Format
from tests.benchmarks import engine
from tests.benchmarks.engine import PROMPT, Spread
from tests.mlflow_server import Server, free_port, wait_for
from workers.streamer import Streamer

PATIENCE_S = 600.0
FORMATS: tuple[Format, ...] = ("jpeg", "m4s")
Proxy = Literal["serve", "haproxy"]
PROXIES: tuple[Proxy, ...] = ("serve", "haproxy")
TOKEN = secrets.token_hex(32)
TURNS = 3
"""Of engine and service, for their comparison."""


@dataclass(frozen=True)
class Overhead:
    viewers: int
    format: Format
    proxy: Proxy
    """What stands before the replica: Ray Serve's own proxy, or HAProxy, which Ray Serve starts where
    RAY_SERVE_ENABLE_HA_PROXY=1."""
    engine: Spread
    """Between two chunks of a stream, the engine alone."""
    service: Spread
    """The same, as viewers get them over WebSocket."""
    first: Spread
    """From a viewer's request, while others come too, to its first frames."""


@dataclass(frozen=True)
class Promotion:
    on_promotion: str
    viewers: int
    cut: int
    """Streams that ended."""
    usual: float
    """Seconds between two chunks before the promotion, the median."""
    longest: float
    """Most seconds between two chunks of a stream from the promotion on."""


@contextmanager
def serving(proxy: Proxy) -> Iterator[str]:
    """Ray Serve on a port of this machine."""
    port = free_port()
    os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1" if proxy == "haproxy" else "0"
    os.environ["SELF_FORCING_TOKENS"] = TOKEN
    # Ray gives its workers a low priority by default, and the engine that they are compared with has the
    # usual one.
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (as Ray spells it)
    with connect("local"):
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()


@contextmanager
def deployed(url: str, config: ServeConfig) -> Iterator[str]:
    """The application below a Serve's URL."""
    serve.run(application(config), name="benchmark", route_prefix="/benchmark")
    try:
        client = Client(f"{url}/benchmark", TOKEN)
        # The proxy may take a moment to learn of a replica.
        wait_for(lambda: _answers(client), "the application")
        yield client.url
    finally:
        serve.delete("benchmark")


def _answers(client: Client) -> bool:
    try:
        return bool(client.get("/healthz"))
    except (ServerError, ValueError, KeyError):
        return False


@dataclass
class Watched:
    """What one viewer saw."""

    times: list[float] = field(default_factory=list)
    """When it asked, and when each chunk was there."""
    cut: bool = False
    """Whether the stream ended before the viewer had enough."""


@contextmanager
def watching(url: str, viewers: int, format: Format = "m4s") -> Iterator[list[Watched]]:
    """Viewers who come at once and read whatever comes."""
    seen = [Watched() for _ in range(viewers)]
    enough = threading.Event()

    def watch(seed: int, watched: Watched) -> None:
        with Client(url, TOKEN, timeout_s=PATIENCE_S).session() as session:
            watched.times.append(time.perf_counter())
            session.start(PROMPT, seed=seed, format=format)
            try:
                while not enough.is_set():
                    session.wait_for(ReceivedChunk)
                    watched.times.append(time.perf_counter())
            except (ServerError, ConnectionClosed, TimeoutError):
                watched.cut = True
            else:
                session.control("stop")

    with ThreadPoolExecutor(viewers) as pool:
        ended = [pool.submit(watch, seed, watched) for seed, watched in enumerate(seen)]
        try:
            yield seen
        finally:
            enough.set()
    for each in ended:
        each.result()


def wait_for_chunks(seen: list[Watched], chunks: int) -> None:
    """Until everybody whose stream was not cut has as many."""
    wait_for(lambda: all(each.cut or len(each.times) > chunks for each in seen), "chunks", PATIENCE_S)


def overhead(
    url: str, streamer: Streamer, viewers: int, format: Format, proxy: Proxy, *, repeats: int, chunks: int
) -> Overhead:
    """`chunks` chunks of everybody from the engine in this process, then as many from `url`, and so on,
    `repeats` times.

    The model at `url` is `streamer`'s, at a frame rate that never makes it wait.
    """
    alone: list[float] = []
    gaps: list[float] = []
    first: list[float] = []
    engine.start(streamer, viewers)
    for _ in range(repeats):
        alone += [engine.make_chunks(streamer) for _ in range(chunks)]
        with watching(url, viewers, format) as seen:
            wait_for_chunks(seen, chunks + 2)
        # The first two came while others were still arriving.
        gaps += [gap for each in seen for gap in np.diff(each.times[3 : chunks + 3])]
        first += [each.times[1] - each.times[0] for each in seen]
    engine.finish(streamer)
    return Overhead(viewers, format, proxy, Spread.of(alone), Spread.of(gaps), Spread.of(first))


def promotion(url: str, config: ServeConfig, registry: Registry, viewers: int, *, chunks: int) -> Promotion:
    """What `viewers` notice when the alias that `config` names moves from its version to another one of the
    same model."""
    reference = config.model.removeprefix("models:/")
    name, alias = reference.split("@")
    before = registry.resolve(config.model)
    after = registry.resolve(f"models:/{name}/{before.version + 1}")
    with deployed(url, config) as served:
        client = Client(served, TOKEN)
        with watching(served, viewers) as seen:
            wait_for_chunks(seen, chunks)
            began = time.perf_counter()
            registry.promote(after, alias, before=before)
            wait_for(
                lambda: client.get("/healthz")["version"] == str(after.version), "the new version", PATIENCE_S
            )
            wait_for_chunks(seen, max(len(each.times) for each in seen) + chunks)
    usual = np.median([gap for each in seen for gap in np.diff(each.times[1 : chunks + 1])])
    gaps = [until - since for each in seen for since, until in pairwise(each.times) if until > began]
    return Promotion(config.on_promotion, viewers, sum(each.cut for each in seen), float(usual), max(gaps))


def measure(
    name: str,
    hurried: str,
    watched: str,
    streamer: Streamer,
    scratch: Path,
    *,
    viewers: Sequence[int],
    loaded: int,
    chunks: int,
    threads: int,
) -> tuple[list[Overhead], list[Promotion]]:
    """The overhead for each number of `viewers`, of a model that never makes them wait, and what `loaded`
    viewers notice of a promotion."""
    config = ServeConfig(model=hurried, slots=max([*viewers, loaded]), cpus=threads, drain_s=1, refresh_s=0.5)
    overheads = []
    for proxy in PROXIES:
        with serving(proxy) as url, deployed(url, config) as served:
            overheads += [
                overhead(served, streamer, each, format, proxy, repeats=TURNS, chunks=chunks // TURNS + 1)
                for format in FORMATS
                for each in viewers
            ]
    with serving("serve") as url:
        server = Server(scratch)
        server.launch()
        try:
            server.wait()
            registry = Registry(server.uri)
            promotions = [
                promotion(
                    url, _registered(name, config, registry, watched, what), registry, loaded, chunks=chunks
                )
                for what in ("finish", "move")
            ]
        finally:
            server.kill()
    return overheads, promotions


def _registered(
    name: str, config: ServeConfig, registry: Registry, model: str, on_promotion: Literal["finish", "move"]
) -> ServeConfig:
    """With a model of two versions, of which the first one is served."""
    name = f"{name}-{on_promotion}"
    first, _ = (
        registry.register(name, Path(model), experiment="benchmark", params={}, metrics={}, lineage={})
        for _ in range(2)
    )
    registry.promote(first, "serving", before=None)
    return replace(config, model=f"models:/{name}@serving", registry=registry.uri, on_promotion=on_promotion)
