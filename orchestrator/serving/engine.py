"""The engine of one model: its streams, who waits for a slot, and a bounded outbox for each viewer.

All of it runs on the replica's event loop, but for the model's own work: ticks, and what changes streams, go
through an executor of one thread, in the order in which they are asked for, so that a change comes between
two ticks. A viewer who reads slowly pauses only its own stream.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from model.codec import StreamDecoder, enlarge, to_uint8
from workers.model_directory import showable
from workers.streamer import Event, NoSlot, Stream, Streamer

BUFFERED = 2
"""Chunks that may wait for a viewer before its stream pauses."""
STUCK_S = 120.0
"""Seconds after which a tick that has not come back counts as a failure."""

Encode = Callable[[np.ndarray, bool], Any]
"""Frames uint8 [f, height, width, 3] of one chunk, and whether it is the last → what the viewer is sent."""
OnPlace = Callable[[int], None]
"""Takes the place in the queue, from 1, whenever it changes."""
T = TypeVar("T")


class StreamEnded(RuntimeError):
    """A stream cannot go on; the message says why."""


@dataclass(frozen=True)
class Chunk:
    """Frames on their way to a viewer."""

    index: int  # from 0, within the stream
    data: Any  # what the viewer's `Encode` made of the frames
    frames: int
    new_prompt: bool  # whether this is the first chunk under a new prompt
    ready: float  # when it could be sent, in seconds of `time.monotonic`


@dataclass(eq=False)
class Viewer:
    """One viewer's side of a stream."""

    engine: "Engine"  # where the stream is made; another one once it has moved
    stream: Stream
    encode: Encode
    first_frame: int  # frames before this one are made and not shown
    frames: int | None  # frames that were asked for; the last chunk may have more
    decoder: StreamDecoder
    """Makes frames of its latents, in their order; on the decoder's thread alone."""
    has_slot: bool = True
    paused: bool = False  # whether the viewer asked for a pause
    gone: bool = False
    unread: int = 0
    changing: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the stream is changed or moved, so that one thing happens to it at a time."""
    outbox: "asyncio.Queue[Chunk | Exception | None]" = field(default_factory=asyncio.Queue)

    @property
    def halted(self) -> bool:
        """Whether no chunk is to be made now: the viewer paused, or has enough to read."""
        return self.paused or self.unread >= BUFFERED

    async def chunks(self) -> AsyncIterator[Chunk]:
        """Chunks until the stream ends; StreamEnded where it cannot go on."""
        while (item := await self.outbox.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
            self.unread -= 1
            self.engine.changed.set()

    def close(self) -> None:
        """End the stream; also from a task that is being cancelled, so there is nothing to wait for."""
        if not self.gone:
            self.gone = True
            self.engine.close(self)

    async def change_prompt(self, prompt: str, *, reencode: bool = True) -> None:
        """As `Streamer.change_prompt`."""
        async with self.changing:
            engine, context = self.engine, await self.engine.embed(prompt)
            change = partial(engine.streamer.change_prompt, reencode=reencode, context=context)
            await engine.on_model(change, self.stream, prompt)

    def pause(self) -> None:
        """Stop making chunks. The slot goes to who waits for one, the stream is kept in host memory."""
        self.paused = True
        self.engine.admit()

    async def resume(self, on_place: OnPlace) -> None:
        """Go on; first in the queue where the slot was given up. StreamEnded where the engine stops."""
        if not self.has_slot and not self.gone:
            await self.engine.claim(on_place, first=True)
            if self.gone:
                self.engine.release()
                return
            self.has_slot = True
            async with self.changing:
                await self.engine.on_model(self.engine.streamer.unpark, self.stream)
            self.engine.move_decoder(self, self.engine.streamer.device)
        self.paused = False
        self.engine.changed.set()


@dataclass
class Waiter:
    """Somebody who waits for a slot."""

    granted: asyncio.Future
    on_place: OnPlace
    place: int = 0


class Engine:
    """All viewers of one `Streamer`. `start` and whatever comes after it belong to one event loop."""

    def __init__(
        self, streamer: Streamer, places: int, decoder: Executor, *, light_decoder: str | None = None
    ):
        """`places` in the queue; `decoder` has one thread, so that chunks stay in order, also of moved
        streams.

        ValueError where the model's latents cannot be shown.
        """
        codec = showable(streamer.card.video.shown_by(light_decoder), streamer.model)
        self.streamer, self.codec, self.places = streamer, codec, places
        # Once, so that the first viewer need not wait for a VAE to be loaded.
        codec.stream().decode(torch.zeros(1, *streamer.card.video.shape[1:], device=streamer.device))
        self.viewers: dict[int, Viewer] = {}
        """By number of the stream."""
        self.changed = asyncio.Event()
        """Set when something happened that may let a stream go on."""
        self.failure: Exception | None = None
        """What ended the ticks, if anything did."""
        self._decoder = decoder
        self._model = ThreadPoolExecutor(1, thread_name_prefix="tick")
        self._free = streamer.slots
        """Slots that nobody holds or was granted; the streamer's own count follows it."""
        self._queue: deque[Waiter] = deque()
        self._successor: Engine | None = None
        self._moving: Viewer | None = None
        """Whose stream is on its way to the successor."""
        self._ticking_since: float | None = None
        self._task: asyncio.Task | None = None

    def start(self) -> None:
        """Tick from now on."""
        self._task = asyncio.create_task(self._run())

    @property
    def idle(self) -> bool:
        return not self.viewers and not self._queue and self._moving is None

    @property
    def free(self) -> int:
        """Slots for newcomers."""
        return 0 if self._queue else self._free

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
        on_place: OnPlace | None = None,
    ) -> Viewer:
        """A viewer of a new stream of `frames` frames, or without end; close it when the viewer is gone.

        With `on_place`, it waits in the queue where no slot is free, and is told its place. NoSlot where it
        would not or cannot wait, StreamEnded where the engine stops.
        """
        context = await self.embed(prompt)
        await self.claim(on_place)
        latents = None if frames is None else self.codec.latents(frames)
        opening = asyncio.ensure_future(
            self.on_model(self.streamer.open, prompt, seed, latents, context=context)
        )
        try:
            stream = await asyncio.shield(opening)
        except asyncio.CancelledError:  # the viewer left while the stream was being opened
            opening.add_done_callback(self._discard)
            raise
        except BaseException:
            self.release()
            raise
        viewer = Viewer(self, stream, encode, first_frame, frames, self.codec.stream())
        self.viewers[stream.number] = viewer
        self.changed.set()
        return viewer

    def move_to(self, successor: "Engine") -> None:
        """Have every stream go on there, between two chunks and as slots are free."""
        self._successor = successor
        self.changed.set()

    async def stop(self) -> None:
        """End every stream and the ticks."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._end(StreamEnded("this server stopped."))
        await asyncio.to_thread(self._model.shutdown)

    async def on_model(self, work: Callable[..., T], *arguments: Any, **options: Any) -> T:
        """What `work` answers once the model is free for it; StreamEnded where the engine stops."""
        self._check_running()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._model, partial(work, *arguments, **options))

    async def embed(self, prompt: str) -> torch.Tensor:
        """A prompt's embedding [1, text_len, text_dim], made beside the model's ticks.

        ValueError for a prompt that is too long, StreamEnded where the encoder does not answer.
        """
        try:
            return await asyncio.to_thread(self.streamer.text.encode, [prompt])
        except ConnectionError as error:
            raise StreamEnded(f"{error}.") from error

    @property
    def _running(self) -> bool:
        return self._task is not None and not self._task.done()

    def _check_running(self) -> None:
        if not self._running:
            raise StreamEnded("this server is shutting down.")

    # Slots. What is decided here at once, the streamer does when its turn comes, in the same order.

    async def claim(self, on_place: OnPlace | None, *, first: bool = False) -> None:
        """Take a slot now, or wait for one; NoSlot where there is neither a slot nor a place in the queue."""
        self._check_running()
        if not self._queue and self._take():
            return
        if on_place is None or (not first and len(self._queue) >= self.places):
            raise NoSlot(f"all {self.streamer.slots} slots are taken.")
        waiter = Waiter(asyncio.get_running_loop().create_future(), on_place)
        (self._queue.appendleft if first else self._queue.append)(waiter)
        self.admit()
        try:
            await waiter.granted
        except asyncio.CancelledError:
            if waiter in self._queue:
                self._queue.remove(waiter)
                self.admit()
            elif not waiter.granted.cancelled() and waiter.granted.exception() is None:
                self.release()
            raise

    def release(self) -> None:
        """Give a slot up, to who has waited longest."""
        self._free += 1
        self.admit()

    def admit(self) -> None:
        """Give free slots to who has waited longest, and tell the others their places."""
        while self._queue and self._take():
            self._queue.popleft().granted.set_result(None)
        for place, waiter in enumerate(self._queue, start=1):
            if place != waiter.place:
                waiter.place = place
                waiter.on_place(place)

    def _take(self) -> bool:
        """Whether there was a slot; a paused stream gives up its own."""
        if self._free:
            self._free -= 1
            return True
        for viewer in self.viewers.values():
            if viewer.paused and viewer.has_slot and not viewer.changing.locked():
                viewer.has_slot = False
                self._model.submit(self.streamer.park, viewer.stream)
                self.move_decoder(viewer, "cpu")
                return True
        return False

    def move_decoder(self, viewer: Viewer, device: torch.device | str) -> None:
        """Move what a viewer's decoder remembers, when its turn comes."""
        self._decoder.submit(viewer.decoder.to, device)

    def close(self, viewer: Viewer) -> None:
        """End a viewer's stream, for `Viewer.close`."""
        # While a stream moves it has its old number still, which may be another's here.
        if self.viewers.get(viewer.stream.number) is viewer:
            del self.viewers[viewer.stream.number]
        if self._running:
            self._model.submit(self.streamer.close, viewer.stream)
        self._leave(viewer)

    def _leave(self, viewer: Viewer) -> None:
        if viewer.has_slot:
            viewer.has_slot = False
            self.release()

    def _discard(self, opening: "asyncio.Future[Stream]") -> None:
        if self._running and not opening.cancelled() and opening.exception() is None:
            self._model.submit(self.streamer.close, opening.result())
        self.release()

    # Ticks.

    async def _run(self) -> None:
        try:
            while True:
                await self._hand_over()
                if all(viewer.halted for viewer in self.viewers.values()):
                    self.changed.clear()
                    await self.changed.wait()
                    continue
                paused = {number for number, viewer in self.viewers.items() if viewer.halted}
                self._ticking_since = time.monotonic()
                events = await self.on_model(self.streamer.tick, paused=paused)
                self._ticking_since = None
                for event in events:
                    self._deliver(event)
        except Exception as error:
            self.failure = error
            self._end(StreamEnded("the model failed."))
            raise

    def _end(self, error: StreamEnded) -> None:
        while self._queue:
            self._queue.popleft().granted.set_exception(error)
        for viewer in self.viewers.values():
            viewer.outbox.put_nowait(error)

    async def _hand_over(self) -> None:
        """Give streams that are between two chunks to the successor, as long as it has slots."""
        there = self._successor
        if there is None:
            return
        for number, viewer in list(self.viewers.items()):
            if viewer.changing.locked() or not (viewer.has_slot and viewer.stream.between_chunks):
                continue
            if not there.free:
                return
            there._free -= 1
            async with viewer.changing:
                await self.on_model(self.streamer.close, viewer.stream)
                if viewer.gone:
                    there.release()
                    continue
                del self.viewers[number]
                viewer.engine = there
                self.release()
                self._moving = viewer
                try:
                    await there.on_model(there.streamer.adopt, viewer.stream)
                except BaseException as error:
                    viewer.outbox.put_nowait(StreamEnded(f"the stream could not be moved: {error}."))
                    viewer.close()
                    if not isinstance(error, Exception):  # this engine stops; the other may adopt it
                        raise
                    continue
                finally:
                    self._moving = None
                if not viewer.gone:
                    there.viewers[viewer.stream.number] = viewer
                    there.changed.set()

    def _deliver(self, event: Event) -> None:
        viewer = self.viewers.get(event.stream.number)
        if viewer is None:  # it left during the tick
            return
        if event.error is not None or event.last:
            del self.viewers[event.stream.number]
            self._leave(viewer)
        if event.error is not None:
            viewer.outbox.put_nowait(StreamEnded(f"the stream ended: {event.error}."))
        if event.chunk is None:
            return
        index, chunk = event.stream.chunks - 1, len(event.chunk)
        first, after = (self.codec.frames(number * chunk) for number in (index, index + 1))
        shown = slice(
            max(0, viewer.first_frame - first), None if viewer.frames is None else viewer.frames - first
        )
        viewer.unread += bool(range(after - first)[shown])
        # Also of a chunk that is not shown: the next one's frames may depend on it.
        decoding = self._decoder.submit(self._decode, viewer, event, index, shown)
        loop = asyncio.get_running_loop()
        asyncio.wrap_future(decoding, loop=loop).add_done_callback(partial(_decoded, viewer, event.last))

    def _decode(self, viewer: Viewer, event: Event, index: int, shown: slice) -> Chunk:
        """On the decoder's thread."""
        assert event.chunk is not None
        frames = enlarge(to_uint8(viewer.decoder.decode(event.chunk)))[shown]
        data = viewer.encode(frames, event.last) if len(frames) else None
        return Chunk(index, data, len(frames), event.new_prompt, time.monotonic())


def _decoded(viewer: Viewer, last: bool, decoding: "asyncio.Future[Chunk]") -> None:
    if decoding.cancelled():
        viewer.outbox.put_nowait(StreamEnded("this server stopped."))
    elif (error := decoding.exception()) is not None:
        viewer.outbox.put_nowait(StreamEnded(f"a chunk could not be decoded: {error}."))
    elif (chunk := decoding.result()).frames:
        viewer.outbox.put_nowait(chunk)
    if last:
        viewer.outbox.put_nowait(None)
