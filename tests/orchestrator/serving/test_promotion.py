"""A registered model whose alias moves while viewers watch."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from infra.registry import Registry, Version
from orchestrator.serving import models
from orchestrator.serving.client import Client, ReceivedChunk
from orchestrator.serving.messages import Done, VideoStart
from tests.fixtures import write_model
from tests.mlflow_server import Server
from tests.orchestrator.serving.conftest import CONFIG, ROLLOUT, SIZES, eventually, write_student
from workers.model_directory import VideoConfig

pytestmark = pytest.mark.slow
SIX = "a six drifting left"


def register(registry: Registry, name: str, path: Path) -> Version:
    return registry.register(name, path, experiment="promotion", params={}, metrics={}, lineage={})


@pytest.mark.parametrize("on_promotion", [pytest.param("finish", marks=pytest.mark.by_hand), "move"])
def test_no_stream_is_cut_when_the_alias_moves(
    on_promotion: str, deploy: Callable, mlflow_server: Server, tmp_path: Path
) -> None:
    registry, name = Registry(mlflow_server.uri), f"digits-{on_promotion}"
    first = register(registry, name, write_student(tmp_path / "first"))
    second = register(registry, name, write_student(tmp_path / "second", seed=2))
    registry.promote(first, "serving", before=None)
    config = replace(
        CONFIG, model=f"models:/{name}@serving", registry=mlflow_server.uri, on_promotion=on_promotion
    )
    with deploy(name, config) as url:
        client = Client(url)
        with client.stream(SIX, frames=6, model=name) as frames:
            old = list(frames)
        with client.session() as watching:
            watching.start(SIX, format="jpeg")
            assert watching.wait_for(VideoStart).config.version == "1"
            watching.wait_for(ReceivedChunk)
            registry.promote(second, "serving", before=first)
            eventually(lambda: client.get("/healthz")["version"] == "2")
            with client.stream(SIX, frames=6) as frames:
                assert list(frames) != old
            if on_promotion == "move":
                eventually(lambda: client.get("/healthz")["retiring"] == [])
            else:
                assert client.get("/healthz")["retiring"] == ["1"]
            # Whatever has been sent meanwhile, and the prompt can change still.
            watching.change_prompt("a two drifting up", "turn")
            numbers, turned = [0], False
            while not (numbers[-1] >= 20 and turned):
                chunk = watching.wait_for(ReceivedChunk)
                numbers.append(chunk.about.generation_chunk_index)
                turned |= "turn" in chunk.about.started_event_ids
            assert numbers == list(range(len(numbers)))
            watching.control("stop")
            assert watching.wait_for(Done).stopped
        eventually(lambda: client.get("/healthz")["retiring"] == [])
        # Back to the first, and then to one that cannot stream: the first goes on.
        registry.roll_back(name, "serving")
        eventually(lambda: client.get("/healthz")["version"] == "1")
        endless, video = replace(ROLLOUT, window=None), VideoConfig(frames=6)
        write_model(tmp_path / "endless", SIZES, seed=1, rollout=endless, video=video)
        unfit = register(registry, name, tmp_path / "endless")
        registry.promote(unfit, "serving", before=first)
        eventually(lambda: client.get("/healthz")["refused"] == str(unfit.version))
        with client.stream(SIX, frames=6) as frames:
            assert list(frames) == old
        assert client.get("/healthz")["version"] == "1"


def test_a_look_at_the_registry_that_fails_ends_nothing(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = write_student(tmp_path / "second", seed=2)
    faults = [PermissionError("registry.db"), KeyError("transformer"), json.JSONDecodeError("half", "{", 1)]

    class Faulty:
        def __init__(self, uri: str) -> None:
            """Of whatever registry."""

        def resolve(self, model: str) -> Version:
            if faults:
                raise faults.pop(0)
            return SimpleNamespace(version=2)  # type: ignore[return-value]

        def fetch(self, version: Version, cache: Path) -> Path:
            return second

    monkeypatch.setattr(models, "Registry", Faulty)
    monkeypatch.setattr(models, "locate", lambda config: ("1", student))
    served = models.Models(replace(CONFIG, model="models:/digits@serving", refresh_s=0.001), None)

    async def follow() -> list[str | None]:
        served.start()
        seen: list[str | None] = []
        following = asyncio.create_task(served.follow())
        async with asyncio.timeout(60):
            while served.active.version != "2" or served.stale is not None:
                seen += [served.stale] if seen[-1:] != [served.stale] else []
                await asyncio.sleep(0)
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await served.stop()
        return seen

    seen = asyncio.run(follow())
    assert [each and each.split(":")[0] for each in seen] == [
        None,
        "PermissionError",
        "KeyError",
        "JSONDecodeError",
    ]
