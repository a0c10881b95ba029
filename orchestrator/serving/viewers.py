"""Viewers of one model: a thread that ticks, a thread that decodes, and a bounded outbox for each viewer.

A viewer who reads slowly pauses only its own stream. Whatever changes streams happens on the ticking thread, between two ticks.
"""

import asyncio
import io
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL import Image

from model.codec import Codec, enlarge, to_uint8
from workers.streamer import Event, Stream, Streamer

BUFFERED = 2
"""Chunks that may wait for a viewer before its stream pauses."""
QUALITY = 90

T = TypeVar("T")


class StreamEnded(RuntimeError):
    """A stream cannot go on; the message says why."""


@dataclass(frozen=True)
class Chunk:
    """Frames on their way to a viewer."""

    index: int
    """From 0, within the stream."""
    frames: list[bytes]
    """JPEG."""
    new_prompt: bool
    """Whether this is the first chunk under a new prompt."""


class Viewer:
    """One viewer's side of a stream."""

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop, read: "Callable[[Viewer], None]"):
        self.stream = stream
        self.waiting = 0
        """Chunks made and not read yet; `Viewers` counts, under its lock."""
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


class Viewers:
    """All viewers of one `Streamer`."""

    def __init__(self, streamer: Streamer):
        """ValueError where the model has no codec, so that nothing can be seen."""
        codec = streamer.card.video.make_codec()
        if codec is None:
            raise ValueError(
                f"the model at {streamer.model} has video.codec none; its latents cannot be shown."
            )
        self.streamer, self.codec = streamer, codec
        self.viewers: dict[int, Viewer] = {}
        self._commands: list[tuple[Callable[[], Any], Future]] = []
        self._wake = threading.Condition()
        self._stopped = False
        self.failure: BaseException | None = None
        """What ended the ticking thread, if anything did."""
        # One thread, so that a stream's chunks stay in order.
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._thread = threading.Thread(target=self._run, name="tick", daemon=True)
        self._thread.start()

    async def open(self, prompt: str, seed: int, frames: int | None = None) -> Viewer:
        """As `Streamer.open`; close it when its viewer is gone."""
        loop = asyncio.get_running_loop()

        def opened() -> Viewer:
            viewer = Viewer(self.streamer.open(prompt, seed, frames), loop, self._read)
            self.viewers[viewer.stream.number] = viewer
            return viewer

        done = self._post(opened)
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
        await asyncio.wrap_future(
            self._post(lambda: self.streamer.change_prompt(viewer.stream, prompt, reencode=reencode))
        )

    def stop(self) -> None:
        """End every stream and both threads."""
        with self._wake:
            self._stopped = True
            self._wake.notify()
        self._thread.join()
        self._decoder.shutdown()

    def _post(self, command: Callable[[], T]) -> "Future[T]":
        """Have a command run on the ticking thread between two ticks."""
        done: Future[T] = Future()
        with self._wake:
            if self._stopped:
                done.set_exception(StreamEnded("this server is shutting down."))
                return done
            self._commands.append((command, done))
            self._wake.notify()
        return done

    def _read(self, viewer: Viewer) -> None:
        """A viewer has read a chunk, so its stream may have to go on."""
        with self._wake:
            viewer.waiting -= 1
            self._wake.notify()

    def _paused(self) -> set[int]:
        return {number for number, viewer in self.viewers.items() if viewer.waiting >= BUFFERED}

    def _run(self) -> None:
        try:
            while self._await_work():
                for event in self.streamer.tick(paused=self._paused()):
                    self._deliver(event)
        except BaseException as error:
            self.failure = error
            with self._wake:
                self._stopped = True
            raise
        finally:
            end = StreamEnded("this server stopped." if self.failure is None else "the model failed.")
            for _, done in self._commands:
                if done.set_running_or_notify_cancel():
                    done.set_exception(end)
            for viewer in self.viewers.values():
                viewer.put(end)

    def _await_work(self) -> bool:
        """Carry out what was asked for, and wait until a stream can run; False once stopped."""
        while True:
            with self._wake:
                while not (self._stopped or self._commands or len(self._paused()) < len(self.viewers)):
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
            if len(self._paused()) < len(self.viewers):
                return True

    def _deliver(self, event: Event) -> None:
        viewer = self.viewers[event.stream.number]
        if event.chunk is not None:
            with self._wake:
                viewer.waiting += 1
            self._decoder.submit(self._decode, self.codec, viewer, event, event.stream.chunks - 1)
        if event.error is not None:
            viewer.put(StreamEnded(f"the stream ended: {event.error}."))
        if event.error is not None or event.last:
            del self.viewers[event.stream.number]

    @staticmethod
    def _decode(codec: Codec, viewer: Viewer, event: Event, index: int) -> None:
        assert event.chunk is not None
        try:
            frames = [jpeg(frame) for frame in enlarge(to_uint8(codec.decode(event.chunk[None])[0]))]
            viewer.put(Chunk(index, frames, event.new_prompt))
            if event.last:
                viewer.put(None)
        except Exception as error:
            viewer.put(StreamEnded(f"a chunk could not be decoded: {error}."))


def jpeg(frame: Any) -> bytes:
    """One frame uint8 [height, width, 3] as JPEG."""
    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
