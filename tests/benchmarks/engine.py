"""What the engine does without a server around it: how fast, for how many, for how long, and against doing it
the plain way.

Whatever is compared runs side by side, in turns, in one process: a machine's speed changes from minute to
minute.
"""

import gc
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor

from model.schedule import FlowSchedule, clean, interpolate
from workers.streamer import Stream, Streamer

PROMPT = "a seven drifting left"
AHEAD = 2
"""Chunks that a stream may be ahead of its viewer, as in the service, before it waits."""
ON_TIME = 0.99


@dataclass(frozen=True)
class Spread:
    """Seconds."""

    median: float
    p95: float

    @classmethod
    def of(cls, seconds: Sequence[float] | np.ndarray) -> "Spread":
        return cls(float(np.median(seconds)), float(np.quantile(seconds, 0.95)))


@dataclass(frozen=True)
class Latency:
    viewers: int
    first: Spread
    """From a newcomer's request, while all others run, to its first frames."""
    chunk: Spread
    """Between two chunks of a stream."""
    frames_per_s: float
    """Of all streams together."""


@dataclass(frozen=True)
class Batching:
    viewers: int
    batch: float
    """Frames a second of all streams in one batch."""
    interleaved: float
    """Frames a second of the same streams, each alone for one chunk, in turn."""


@dataclass(frozen=True)
class Capacity:
    """How many sessions a replica holds at a frame rate."""

    fps: float
    sessions: int
    """The most that were held, and 0 if not even one was."""
    on_time: float
    """Share of their chunks that were on time; NaN for none."""
    limited: bool
    """Whether one more was tried; else the slots or the search ended first."""


@dataclass(frozen=True)
class Endless:
    frames: int
    early: Spread
    """Chunk time from frame 100 on."""
    late: Spread
    """Chunk time from frame `frames` on."""
    grown: int
    """Bytes that the process's resident memory grew by in between."""


@dataclass(frozen=True)
class Recomputing:
    window: int
    viewers: int
    cached: Spread
    recomputed: Spread


def start(streamer: Streamer, viewers: int) -> list[Stream]:
    """Endless streams whose windows are full, at different steps."""
    streams = []
    for viewer in range(viewers):
        streams.append(streamer.open(PROMPT, viewer))
        streamer.tick()
    while any(stream.rollout.start < 2 * (streamer.config.window or 0) for stream in streams):
        streamer.tick()
    return streams


def finish(streamer: Streamer) -> None:
    for stream in [*streamer.streams.values()]:
        streamer.close(stream)


def make_chunk(streamer: Streamer, stream: Stream) -> float:
    """Seconds for the next chunk of a stream with nobody beside it."""
    others = streamer.streams.keys() - {stream.number}
    began = time.perf_counter()
    while not streamer.tick(paused=others):
        pass
    return time.perf_counter() - began


def make_chunks(streamer: Streamer) -> float:
    """Seconds for one chunk of everybody in one batch."""
    began = time.perf_counter()
    made = 0
    while made < len(streamer.streams):
        made += len(streamer.tick())
    return time.perf_counter() - began


def latency(streamer: Streamer, viewers: int, *, repeats: int, chunks: int) -> Latency:
    """`repeats` newcomers one after the other, then `chunks` chunks of everybody."""
    start(streamer, viewers - 1)
    first = []
    for repeat in range(repeats):
        began = time.perf_counter()
        newcomer = streamer.open(PROMPT, repeat)
        while newcomer.chunks == 0:
            streamer.tick()
        first.append(time.perf_counter() - began)
        streamer.close(newcomer)
    start(streamer, 1)
    finished: dict[int, list[float]] = {number: [] for number in streamer.streams}
    began = time.perf_counter()
    while min(map(len, finished.values())) <= chunks:
        for event in streamer.tick():
            finished[event.stream.number].append(time.perf_counter())
    seconds = time.perf_counter() - began
    finish(streamer)
    made = sum(map(len, finished.values())) * streamer.config.chunk
    gaps = np.concatenate([np.diff(times) for times in finished.values()])
    return Latency(viewers, Spread.of(first), Spread.of(gaps), made / seconds)


def batching(streamer: Streamer, viewers: int, *, repeats: int) -> Batching:
    """One chunk of everybody in a batch, one chunk of everybody in turn, and so on."""
    streams = start(streamer, viewers)
    seconds: dict[str, list[float]] = {"batch": [], "interleaved": []}
    for repeat in range(repeats):
        # Whoever comes first has the warmer cache, so they take turns at that too.
        for way in sorted(seconds, reverse=repeat % 2 == 1):
            seconds[way].append(
                make_chunks(streamer)
                if way == "batch"
                else sum(make_chunk(streamer, stream) for stream in streams)
            )
    finish(streamer)
    frames = viewers * streamer.config.chunk
    batch, interleaved = (frames / float(np.median(seconds[way])) for way in ("batch", "interleaved"))
    return Batching(viewers, batch, interleaved)


class _Sessions:
    """Viewers who come when they come, and look at a chunk when its time has come."""

    def __init__(self, streamer: Streamer, sessions: int, fps: float, seed: int):
        self.streamer = streamer
        self.period = streamer.config.chunk / fps
        arrival = random.Random(seed)
        self.arrivals = sorted(arrival.uniform(0, 10 * self.period) for _ in range(sessions))
        self.finished: dict[int, list[float]] = {}
        self.began = time.perf_counter()

    def now(self) -> float:
        return time.perf_counter() - self.began

    def waits_until(self, made: list[float]) -> float:
        """When a stream may go on: as soon as its viewer looks at a chunk that is `AHEAD` before the next
        one."""
        return made[0] + (len(made) - AHEAD) * self.period if len(made) >= AHEAD else 0.0

    def turn(self) -> None:
        """Let in who has come, and run one tick of all who may go on, or sleep until somebody may."""
        now = self.now()
        while self.arrivals and self.arrivals[0] <= now:
            arrived = self.arrivals.pop(0)
            self.finished[self.streamer.open(PROMPT, int(arrived * 1000)).number] = []
        paused = {number for number, made in self.finished.items() if self.waits_until(made) > now}
        if len(paused) == len(self.finished):
            wakes = [*self.arrivals[:1], *(self.waits_until(made) for made in self.finished.values())]
            time.sleep(max(0.0, min(wakes) - self.now()))
            return
        for event in self.streamer.tick(paused=paused):
            self.finished[event.stream.number].append(self.now())

    def late(self, first: dict[int, int], chunks: int) -> tuple[int, bool]:
        """How many of `chunks` chunks from each session's `first` on were late, and whether all are there."""
        count, done, now = 0, True, self.now()
        for number, made in self.finished.items():
            due = made[0] + np.arange(first[number], first[number] + chunks) * self.period
            there = np.array(made[first[number] : first[number] + chunks])
            count += int((there > due[: len(there)]).sum() + (due[len(there) :] < now).sum())
            done &= len(there) == chunks
        return count, done


def share_on_time(streamer: Streamer, sessions: int, fps: float, *, chunks: int, seed: int = 0) -> float:
    """The share of `chunks` chunks of each of `sessions` endless sessions that are on time, or what it cannot
    exceed any more once it is under `ON_TIME`.

    A session's chunk k is on time if it is finished when k chunks' length has passed since its first one was.
    Sessions arrive at random times that do not depend on how the others fare; what is made before the last
    one is in is warm-up and does not count.
    """
    viewers = _Sessions(streamer, sessions, fps, seed)
    while viewers.arrivals or not all(viewers.finished.values()):
        viewers.turn()
    first = {number: len(made) for number, made in viewers.finished.items()}
    done = False
    while not done:
        viewers.turn()
        late, done = viewers.late(first, chunks)
        done |= 1 - late / (sessions * chunks) < ON_TIME
    finish(streamer)
    return 1 - late / (sessions * chunks)


def capacity(streamer: Streamer, fps: float, guess: int, *, chunks: int) -> Capacity:
    """The most sessions of which `ON_TIME` of the chunks are on time, by bisection around a `guess`; to a
    tenth where it is beyond ten."""
    low, high, share = 0, streamer.slots + 1, float("nan")
    tried = min(max(1, guess), streamer.slots)
    while high - low > max(1, low // 10):
        found = share_on_time(streamer, tried, fps, chunks=chunks)
        if found >= ON_TIME:
            low, share = tried, found
        else:
            high = tried
        if high > streamer.slots:
            tried = min(streamer.slots, math.ceil(1.3 * low))
        elif low == 0:
            tried = max(1, int(high / 1.3))
        else:
            tried = (low + high) // 2
    return Capacity(fps, low, share, high <= streamer.slots)


def endless(streamer: Streamer, *, frames: int, chunks: int) -> Endless:
    """A stream at frame `frames` and one at frame 100, chunk by chunk in turn."""
    chunk = streamer.config.chunk
    old = streamer.open(PROMPT, 0)
    while old.rollout.start < 100:
        make_chunk(streamer, old)
    gc.collect()
    before = psutil.Process().memory_info().rss
    while old.rollout.start < frames:
        make_chunk(streamer, old)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    young = streamer.open(PROMPT, 0)
    while young.rollout.start < 100:
        make_chunk(streamer, young)
    early, late = [], []
    for _ in range(chunks):
        early.append(make_chunk(streamer, young))
        late.append(make_chunk(streamer, old))
    finish(streamer)
    return Endless(old.rollout.start // chunk * chunk, Spread.of(early), Spread.of(late), grown)


def recomputing(streamer: Streamer, viewers: int, *, chunks: int) -> Recomputing:
    """A chunk of everybody with the cache, then one for which every step runs the whole window again, and so
    on."""
    streams = start(streamer, viewers)
    config = streamer.config
    schedule = FlowSchedule(config.shift)
    timesteps = schedule.few_steps(config.steps)
    sigmas = schedule.sigma(torch.tensor(timesteps)).tolist()
    past = torch.cat([torch.cat([frames for _, frames in stream.rollout.past], 1) for stream in streams])
    context = torch.cat([stream.context for stream in streams])
    assert config.window == past.shape[1] + config.chunk, "the windows are full"
    cached, recomputed = [], []
    for _ in range(chunks):
        cached.append(make_chunks(streamer))
        began = time.perf_counter()
        _recompute(streamer, past, context, timesteps, sigmas)
        recomputed.append(time.perf_counter() - began)
    finish(streamer)
    return Recomputing(config.window, viewers, Spread.of(cached), Spread.of(recomputed))


@torch.inference_mode()
def _recompute(
    streamer: Streamer, past: Tensor, context: Tensor, timesteps: Sequence[float], sigmas: Sequence[float]
) -> Tensor:
    """Chunks without a cache: every step runs the clean frames of the window and the noisy chunk through the
    network."""
    x = torch.randn_like(past[:, :1].expand(-1, streamer.config.chunk, -1, -1, -1))
    seen = past.shape[1]
    for step, timestep in enumerate(timesteps):
        both = torch.cat([past, x], 1)
        at = torch.zeros(both.shape[:2], device=x.device)
        at[:, seen:] = timestep
        x = clean(x, streamer.network(both, at, context).velocity[:, seen:], sigmas[step])
        if step + 1 < len(timesteps):
            x = interpolate(x, torch.randn_like(x), sigmas[step + 1])
    return x
