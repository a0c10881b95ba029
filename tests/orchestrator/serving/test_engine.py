"""Streams that move from one engine to another, while either engine or the viewer does something else."""

import asyncio
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator.serving.encoders import jpegs
from orchestrator.serving.engine import Engine, StreamEnded, Viewer
from workers.streamer import Streamer

SIX, TWO = "a six drifting left", "a two drifting up"


@asynccontextmanager
async def moving(student: Path) -> AsyncIterator[tuple[Engine, Engine, Viewer, Viewer, threading.Event]]:
    """Two engines, a viewer in each; the first one's stream is on its way to the second, which waits."""
    decoder, gate = ThreadPoolExecutor(1), threading.Event()
    before, after = (Engine(Streamer(str(student), 2), 0, decoder) for _ in range(2))
    for engine in (before, after):
        engine.start()
    viewer, other = await before.open(SIX, 0, None, jpegs), await after.open(TWO, 0, None, jpegs)
    assert viewer.stream.number == other.stream.number
    after._model.submit(gate.wait)
    before.move_to(after)
    async with asyncio.timeout(60):
        while viewer.engine is before:
            await asyncio.sleep(0.005)  # not 0, which would keep the model's thread from its turn
        yield before, after, viewer, other, gate
        gate.set()
        for engine in (before, after):
            await engine.stop()
    decoder.shutdown()


async def reads(viewer: Viewer, chunks: int) -> None:
    seen = viewer.chunks()
    for _ in range(chunks):
        await anext(seen)


async def until_free(engine: Engine) -> None:
    while (engine.free, len(engine.streamer.free)) != (1, 1):
        await asyncio.sleep(0.005)  # not 0, which would keep the model's thread from its turn


def test_who_leaves_on_the_way_ends_nobody_else(student: Path) -> None:
    async def leaves() -> None:
        async with moving(student) as (_, after, viewer, other, gate):
            viewer.close()
            assert list(after.viewers.values()) == [other]
            gate.set()
            await reads(other, 4)
            await until_free(after)

    asyncio.run(leaves())


def test_an_engine_is_not_idle_while_a_stream_is_on_its_way_and_loses_none_if_it_stops(student: Path) -> None:
    async def stops() -> None:
        async with moving(student) as (before, after, viewer, other, gate):
            assert before.viewers == {} and not before.idle
            await before.stop()
            with pytest.raises(StreamEnded):
                await reads(viewer, 4)
            gate.set()
            await reads(other, 4)
            await until_free(after)

    asyncio.run(stops())
