"""Viewers of one model: a thread that ticks, a thread that decodes, a queue for slots, and a bounded outbox for each viewer.

A viewer who reads slowly pauses only its own stream. Whatever changes streams happens on the ticking thread, between two ticks.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np

from model.codec import enlarge, to_uint8
from workers.streamer import Event, NoSlot, Stream, Streamer

BUFFERED = 2
"""Chunks that may wait for a viewer before its stream pauses."""
STUCK_S = 120.0
"""Seconds after which a tick that has not come back counts as a failure."""

T = TypeVar("T")
Encode = Callable[[np.ndarray, bool], Any]
"""Frames uint8 [f, height, width, 3] of one chunk, and whether it is the last → what the viewer is sent."""


class StreamEnded(RuntimeError):
    """A stream cannot go on; the message says why."""


@dataclass(frozen=True)
class Chunk:
    """Frames on their way to a viewer."""

    index: int
    """From 0, within the stream."""
    data: Any
    """What the viewer's `Encode` made of the frames."""
    frames: int
    new_prompt: bool
    """Whether this is the first chunk under a new prompt."""
    ready: float
    """When it could be sent, in seconds of `time.monotonic`."""


class Viewer:
    """One viewer's side of a stream."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        encode: Encode,
        first_frame: int,
        read: "Callable[[Viewer], None]",
    ):
        self.stream: Stream
        """Set by `Viewers`, once there is a slot."""
        self.encode = encode
        self.first_frame = first_frame
        """Frames before this one are made and not shown."""
        self.waiting = 0
        """Chunks made and not read yet; `Viewers` counts, under its lock."""
        self.paused = False
        """Whether the viewer asked for a pause; the ticking thread's."""
        self._loop = loop
        self._read = read
        self._outbox: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()

    def put(self, item: Chunk | Exception | None) -> None:
        """From any thread: a chunk, why there will be none, or the end."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Chunks until the stream ends; StreamEnded where it cannot go on."""
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            self._read(self)


@dataclass
class Waiter:
    """Somebody who waits for a slot."""

    start: Callable[[], Any]
    """Takes the slot."""
    done: Future
    told: Callable[[int], None]
    """Called from the ticking thread with the place in the queue, from 1, whenever it changes."""
    place: int = 0


@dataclass
class Viewers:
    """All viewers of one `Streamer`."""

    streamer: Streamer
    queue: int = 0
    """How many may wait for a slot."""
    viewers: dict[int, Viewer] = field(default_factory=dict)
    failure: BaseException | None = None
    """What ended the ticking thread, if anything did."""

    def __post_init__(self) -> None:
        codec = self.streamer.card.video.make_codec()
        if codec is None:
            raise ValueError(
                f"the model at {self.streamer.model} has video.codec none; its latents cannot be shown."
            )
        self.codec = codec
        self._commands: list[tuple[Callable[[], Any], Future]] = []
        self._queue: deque[Waiter] = deque()
        self._wake = threading.Condition()
        self._stopped = False
        self._ticking_since: float | None = None
        # One thread, so that a stream's chunks stay in order.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, name="tick", daemon=True)
        self._thread.start()

    @property
    def idle(self) -> bool:
        return not self.viewers and not self._queue

    @property
    def waiting(self) -> int:
        """Viewers in the queue."""
        return len(self._queue)

    def check(self) -> None:
        """RuntimeError where no chunk can be made."""
        if self.failure is not None:
            raise RuntimeError(f"the model failed: {self.failure}")
        if self._ticking_since is not None and time.monotonic() - self._ticking_since > STUCK_S:
            raise RuntimeError(f"a step of the model has not come back for {STUCK_S:.0f} s")

    async def open(
        self,
        prompt: str,
        seed: int,
        frames: int | None,
        encode: Encode,
        *,
        first_frame: int = 0,
        told: Callable[[int], None] | None = None,
    ) -> Viewer:
        """A viewer of a new stream, as `Streamer.open`; close it when the viewer is gone.

        With `told`, it waits in the queue where no slot is free, and is told its place. NoSlot where it would not or cannot wait.
        """
        viewer = Viewer(asyncio.get_running_loop(), encode, first_frame, self._read)

        def opened() -> Viewer:
            viewer.stream = self.streamer.open(prompt, seed, frames)
            self.viewers[viewer.stream.number] = viewer
            return viewer

        done: Future[Viewer] = Future()
        self._post(lambda: self._enter(Waiter(opened, done, told or _nothing), waits=told is not None), done)
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            # The viewer left while the stream was being opened.
            done.add_done_callback(self._close_unseen)
            raise

    def _close_unseen(self, done: "Future[Viewer]") -> None:
        if not done.cancelled() and done.exception() is None:
            self.close(done.result())

    def close(self, viewer: Viewer) -> None:
        """End a viewer's stream; also from a task that is being cancelled, so there is nothing to wait for."""

        def closed() -> None:
            self.streamer.close(viewer.stream)
            self.viewers.pop(viewer.stream.number, None)

        self._post(closed)

    async def change_prompt(self, viewer: Viewer, prompt: str, *, reencode: bool = True) -> None:
        """As `Streamer.change_prompt`."""
        await asyncio.wrap_future(
            self._post(lambda: self.streamer.change_prompt(viewer.stream, prompt, reencode=reencode))
        )

    async def pause(self, viewer: Viewer) -> None:
        """Stop making chunks. The slot is given up where somebody waits for one, and the stream kept in host memory."""

        def paused() -> None:
            viewer.paused = True

        await asyncio.wrap_future(self._post(paused))

    async def resume(self, viewer: Viewer, told: Callable[[int], None] | None = None) -> None:
        """Go on; first in the queue where the slot was given up."""

        def resumed() -> None:
            if viewer.paused and viewer.stream.parked is not None:
                self._enter(Waiter(unparked, done, told or _nothing), waits=True, first=True)
            else:
                viewer.paused = False
                done.set_result(None)

        def unparked() -> None:
            if viewer.stream.number in self.viewers:
                self.streamer.unpark(viewer.stream)
                viewer.paused = False

        done: Future[None] = Future()
        self._post(resumed, done)
        await asyncio.wrap_future(done)

    def stop(self) -> None:
        """End every stream and both threads."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        self._decoder.shutdown()

    def _post(self, command: Callable[[], Any], fails: Future | None = None) -> "Future[Any]":
        """Have a command run on the ticking thread between two ticks. `fails` fails with it."""
        done: Future[Any] = Future()
        with self._wake:
            if self._stopped:
                for each in (done, fails):
                    if each is not None:
                        each.set_exception(StreamEnded("this server is shutting down."))
                return done
            self._commands.append((command, done))
            self._wake.notify()
        if fails is not None:
            done.add_done_callback(lambda _: _fail(fails, done.exception()))
        return done

    def _read(self, viewer: Viewer) -> None:
        """A viewer has read a chunk, so its stream may have to go on."""
        with self._wake:
            viewer.waiting -= 1
            self._wake.notify()

    # From here on, the ticking thread.

    def _enter(self, waiter: Waiter, *, waits: bool, first: bool = False) -> None:
        """Take a slot now, or wait for one; NoSlot where there is neither a slot nor a place in the queue."""
        self._admit()
        if not self._queue and self._slot():
            self._start(waiter)
        elif not waits or (not first and len(self._queue) >= self.queue):
            raise NoSlot(f"all {self.streamer.slots} slots are taken.")
        else:
            (self._queue.appendleft if first else self._queue.append)(waiter)

    def _slot(self) -> bool:
        """Whether a slot is free; a paused stream gives up its own."""
        if self.streamer.free:
            return True
        for viewer in self.viewers.values():
            if viewer.paused and viewer.stream.row is not None:
                self.streamer.park(viewer.stream)
                return True
        return False

    @staticmethod
    def _start(waiter: Waiter) -> None:
        if waiter.done.set_running_or_notify_cancel():
            try:
                waiter.done.set_result(waiter.start())
            except Exception as error:
                waiter.done.set_exception(error)

    def _admit(self) -> None:
        """Give free slots to who has waited longest, and tell the others their places."""
        self._queue = deque(waiter for waiter in self._queue if not waiter.done.cancelled())
        while self._queue and self._slot():
            self._start(self._queue.popleft())
        for place, waiter in enumerate(self._queue, start=1):
            if place != waiter.place:
                waiter.place = place
                waiter.told(place)

    def _halted(self) -> set[int]:
        """Streams that make no chunk now: paused by their viewers, or ahead of them."""
        return {
            number for number, viewer in self.viewers.items() if viewer.paused or viewer.waiting >= BUFFERED
        }

    def _run(self) -> None:
        try:
            while self._await_work():
                self._ticking_since = time.monotonic()
                for event in self.streamer.tick(paused=self._halted()):
                    self._deliver(event)
                self._ticking_since = None
        except BaseException as error:
            self.failure = error
            with self._wake:
                self._stopped = True
            raise
        finally:
            end = StreamEnded("this server stopped." if self.failure is None else "the model failed.")
            for done in [*(done for _, done in self._commands), *(waiter.done for waiter in self._queue)]:
                _fail(done, end)
            for viewer in self.viewers.values():
                viewer.put(end)

    def _await_work(self) -> bool:
        """Carry out what was asked for, and wait until a stream can run; False once stopped."""
        while True:
            with self._wake:
                while not (self._stopped or self._commands or len(self._halted()) < len(self.viewers)):
                    self._wake.wait()
                if self._stopped:
                    return False
                commands, self._commands = self._commands, []
            for command, done in commands:
                if not done.set_running_or_notify_cancel():
                    continue
                try:
                    done.set_result(command())
                except Exception as error:
                    done.set_exception(error)
            self._admit()
            if len(self._halted()) < len(self.viewers):
                return True

    def _deliver(self, event: Event) -> None:
        viewer = self.viewers[event.stream.number]
        if event.chunk is not None:
            first = (event.stream.chunks - 1) * len(event.chunk)
            hidden = min(len(event.chunk), max(0, viewer.first_frame - first))
            if hidden < len(event.chunk):
                with self._wake:
                    viewer.waiting += 1
                self._decoder.submit(self._decode, viewer, event, event.stream.chunks - 1, hidden)
            elif event.last:
                viewer.put(None)
        if event.error is not None:
            viewer.put(StreamEnded(f"the stream ended: {event.error}."))
        if event.error is not None or event.last:
            del self.viewers[event.stream.number]

    # The decoding thread.

    def _decode(self, viewer: Viewer, event: Event, index: int, hidden: int) -> None:
        assert event.chunk is not None
        try:
            frames = enlarge(to_uint8(self.codec.decode(event.chunk[None])[0]))[hidden:]
            data = viewer.encode(frames, event.last)
            viewer.put(Chunk(index, data, len(frames), event.new_prompt, time.monotonic()))
            if event.last:
                viewer.put(None)
        except Exception as error:
            viewer.put(StreamEnded(f"a chunk could not be decoded: {error}."))


def _nothing(_: int) -> None:
    """Whoever does not wait has no place."""


def _fail(done: Future, error: BaseException | None) -> None:
    """Have `done` fail, unless it is done or was cancelled."""
    if error is not None and not done.done() and done.set_running_or_notify_cancel():
        done.set_exception(error)
