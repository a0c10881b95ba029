"""The engine of one model: a thread that ticks, another that decodes, a queue for slots, and a bounded outbox for each viewer.

A viewer who reads slowly pauses only its own stream. Whatever changes streams happens on the ticking thread, between two ticks.
"""

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from model.codec import enlarge, to_uint8
from workers.streamer import Event, NoSlot, Stream, Streamer

BUFFERED = 2
"""Chunks that may wait for a viewer before its stream pauses."""
STUCK_S = 120.0
"""Seconds after which a tick that has not come back counts as a failure."""

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

    def __init__(self, engine: "Engine", encode: Encode, first_frame: int):
        self.stream: Stream
        """Set by `Engine`, once there is a slot."""
        self.engine = engine
        """Whose ticking thread this stream belongs to; changed by that thread alone."""
        self.encode = encode
        self.first_frame = first_frame
        """Frames before this one are made and not shown."""
        self.paused = False
        """Whether the viewer asked for a pause; the ticking thread's, as is the next."""
        self.gone = False
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()
        self._lock = threading.Lock()
        self._unread = 0

    def put(self, item: Chunk | Exception | None) -> None:
        """From any thread: a chunk, why there will be none, or the end."""
        self._loop.call_soon_threadsafe(self._outbox.put_nowait, item)

    def count(self, chunks: int) -> None:
        """From any thread: chunks made, or read if negative."""
        with self._lock:
            self._unread += chunks

    @property
    def halted(self) -> bool:
        """Whether no chunk is to be made now: the viewer paused, or has enough to read."""
        return self.paused or self._unread >= BUFFERED

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Chunks until the stream ends; StreamEnded where it cannot go on."""
        while (item := await self._outbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            self.count(-1)
            self.engine.wake()

    def close(self) -> None:
        """End the stream; also from a task that is being cancelled, so there is nothing to wait for."""
        self._ask(lambda engine: engine.closed(self))

    async def change_prompt(self, prompt: str, *, reencode: bool = True) -> None:
        """As `Streamer.change_prompt`."""
        await asyncio.wrap_future(
            self._ask(lambda engine: engine.streamer.change_prompt(self.stream, prompt, reencode=reencode))
        )

    async def pause(self) -> None:
        """Stop making chunks. The slot is given up where somebody waits for one, and the stream kept in host memory."""

        def paused(_: "Engine") -> None:
            self.paused = True

        await asyncio.wrap_future(self._ask(paused))

    async def resume(self, on_place: Callable[[int], None]) -> None:
        """Go on; first in the queue where the slot was given up. `on_place`: as in `Engine.open`."""
        done: Future[None] = Future()
        asked = self._ask(lambda engine: engine.resumed(self, done, on_place))
        asked.add_done_callback(lambda _: _fail(done, asked.exception()))
        await asyncio.wrap_future(done)

    def _ask(self, command: "Callable[[Engine], None]", done: Future | None = None) -> Future:
        """Have a command run on the ticking thread of wherever the stream is by then."""
        engine, answer = self.engine, done or Future()

        def run() -> None:
            if self.engine is not engine:
                self._ask(command, answer)
                return
            try:
                command(engine)
                answer.set_result(None)
            except Exception as error:
                _fail(answer, error)

        engine.post(run, answer)
        return answer


@dataclass
class Waiter:
    """Somebody who waits for a slot."""

    start: Callable[[], Any]
    """Takes the slot."""
    done: Future
    on_place: Callable[[int], None]
    """Called from the ticking thread with the place in the queue, from 1, whenever it changes."""
    place: int = 0


@dataclass
class Engine:
    """All viewers of one `Streamer`."""

    streamer: Streamer
    queue: int
    """How many may wait for a slot."""
    decoder: Executor
    """Of one thread, so that a stream's chunks stay in order, also where it moves to another model."""
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
        self._successor: Engine | None = None
        self._ticking_since: float | None = None
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
        on_place: Callable[[int], None] | None = None,
    ) -> Viewer:
        """A viewer of a new stream, as `Streamer.open`; close it when the viewer is gone.

        With `on_place`, it waits in the queue where no slot is free, and is told its place. NoSlot where it would not or cannot wait.
        """
        viewer = Viewer(self, encode, first_frame)

        def opened() -> Viewer:
            viewer.stream = self.streamer.open(prompt, seed, frames)
            self.viewers[viewer.stream.number] = viewer
            return viewer

        done: Future[Viewer] = Future()
        self.post(
            lambda: self._enter(Waiter(opened, done, on_place or _nothing), waits=on_place is not None), done
        )
        try:
            return await asyncio.wrap_future(done)
        except asyncio.CancelledError:
            # The viewer left while the stream was being opened.
            done.add_done_callback(_close_unseen)
            raise

    def move_to(self, successor: "Engine") -> None:
        """Have every stream go on there, from its next chunk on."""

        def moving() -> None:
            self._successor = successor

        self.post(moving)

    def stop(self) -> None:
        """End every stream and the thread."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()

    def wake(self) -> None:
        """Something changed that may let a stream go on."""
        with self._wake:
            self._wake.notify()

    def post(self, command: Callable[[], Any], answer: Future | None = None) -> None:
        """Have a command run on the ticking thread between two ticks; `answer` fails where it fails or cannot run."""
        answer = answer or Future()
        with self._wake:
            if not self._stopped:
                self._commands.append((command, answer))
                self._wake.notify()
                return
        _fail(answer, StreamEnded("this server is shutting down."))

    # From here on, the ticking thread.

    def closed(self, viewer: Viewer) -> None:
        viewer.gone = True
        self.streamer.close(viewer.stream)
        self.viewers.pop(viewer.stream.number, None)

    def resumed(self, viewer: Viewer, done: Future, on_place: Callable[[int], None]) -> None:
        """`done` when the stream goes on, which may take a slot."""

        def unparked() -> None:
            if not viewer.gone:
                self.streamer.unpark(viewer.stream)
                viewer.paused = False

        if viewer.stream.parked is not None:
            self._enter(Waiter(unparked, done, on_place), waits=True, first=True)
        else:
            viewer.paused = False
            done.set_result(None)

    def _hand_over(self) -> None:
        """Give streams that are between two chunks to the successor; one that is parked goes when it is back."""
        successor = self._successor
        if successor is None:
            return
        for number, viewer in list(self.viewers.items()):
            if viewer.stream.row is not None and viewer.stream.rollout.between_chunks:
                self.streamer.close(viewer.stream)
                del self.viewers[number]
                viewer.engine = successor
                successor.post(partial(successor._receive, viewer))

    def _receive(self, viewer: Viewer) -> None:
        def adopted() -> None:
            if not viewer.gone:
                self.streamer.adopt(viewer.stream)
                self.viewers[viewer.stream.number] = viewer

        self._enter(Waiter(adopted, Future(), _nothing), waits=True, first=True)

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
                waiter.on_place(place)

    def _halted(self) -> set[int]:
        """Streams that make no chunk now: paused by their viewers, or ahead of them."""
        return {number for number, viewer in self.viewers.items() if viewer.halted}

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
            for answer in [
                *(answer for _, answer in self._commands),
                *(waiter.done for waiter in self._queue),
            ]:
                _fail(answer, end)
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
            for command, answer in commands:
                try:
                    command()
                except Exception as error:
                    _fail(answer, error)
            self._hand_over()
            self._admit()
            if len(self._halted()) < len(self.viewers):
                return True

    def _deliver(self, event: Event) -> None:
        viewer = self.viewers[event.stream.number]
        if event.chunk is not None:
            first = (event.stream.chunks - 1) * len(event.chunk)
            hidden = min(len(event.chunk), max(0, viewer.first_frame - first))
            if hidden < len(event.chunk):
                viewer.count(1)
                self.decoder.submit(self._decode, viewer, event, event.stream.chunks - 1, hidden)
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


def _fail(answer: Future, error: BaseException | None) -> None:
    """Have `answer` fail, unless it is there already or nobody waits for it."""
    if error is not None and not answer.done():
        with suppress(InvalidStateError):
            answer.set_exception(error)


def _close_unseen(done: "Future[Viewer]") -> None:
    if not done.cancelled() and done.exception() is None:
        done.result().close()
