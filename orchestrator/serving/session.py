"""One viewer's session over WebSocket. It outlives a broken connection for a while, and can be paused."""

import asyncio
import secrets
from collections import deque
from contextlib import ExitStack, suppress
from uuid import uuid4

from fastapi import WebSocket, WebSocketDisconnect

from orchestrator.serving.encoders import Fragments, jpegs
from orchestrator.serving.engine import Chunk, Encode, OnPlace, StreamEnded, Viewer
from orchestrator.serving.messages import (
    Answer,
    Applied,
    ChunkMetadata,
    Control,
    Done,
    Failure,
    Interact,
    Queue,
    Queued,
    Rejected,
    Start,
    StreamConfig,
    VideoStart,
)
from orchestrator.serving.metrics import Pace
from orchestrator.serving.models import Served
from orchestrator.serving.problems import Problem
from orchestrator.serving.service import Service

HISTORY = 16
"""Chunks that are kept after they were sent, for a viewer who reconnects."""


class Refused(Exception):
    """A message that cannot be followed; the session goes on."""

    def __init__(self, message: str, code: str = "invalid_message"):
        super().__init__(message)
        self.code = code


class Session:
    """One viewer's."""

    def __init__(self, service: Service, who: str, start: Start):
        """Problem where this viewer has too many streams already or asks for what is not served here."""
        service.check_model(start.model)
        self.service, self.who, self.start = service, who, start
        # By its name, every replica knows where it is.
        self.request_id = f"video_stream-{service.replica}-{secrets.token_urlsafe(16)}"
        self.socket: WebSocket | None = None
        self.served: Served | None = None
        self.viewer: Viewer | None = None
        self._sent: deque[tuple[ChunkMetadata, bytes, Chunk]] = deque(maxlen=HISTORY)
        self._next = 0
        """Number of the next chunk to send."""
        self._made = 0
        self._events: list[str] = []
        """Prompts that were queued and are not applied yet."""
        self._paused = False
        self._flowing = asyncio.Event()
        """Set while chunks may be sent."""
        self._speaking = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._resuming: asyncio.Future | None = None
        self._pace: Pace | None = None
        self._telling: set[asyncio.Task] = set()
        self._open = ExitStack()
        self._open.enter_context(service.access.stream(who))
        self._open.callback(service.sessions.pop, self.request_id, None)
        service.sessions[self.request_id] = self
        self._playing = asyncio.create_task(self._play())

    # What the connection does.

    async def attach(self, socket: WebSocket, next_chunk: int | None = None) -> None:
        """Speak to this socket from now on, beginning with chunk `next_chunk`; Refused where that is gone."""
        if next_chunk is not None:
            kept = self._made - len(self._sent)
            if not kept <= next_chunk <= self._made:
                raise Refused(f"next_chunk must be from {kept} to {self._made}; earlier chunks are gone.")
            self._next = next_chunk
        before, self.socket = self.socket, socket
        if before is not None:  # one connection a session, or they would pile up
            with suppress(RuntimeError, WebSocketDisconnect):
                await before.close()
        if next_chunk is not None and self.served is not None:
            await self._say_start()
        if self._paused:
            await self._hold(self.service.config.pause_s)
        else:
            self._flow()

    async def detach(self) -> None:
        """The connection broke: hold the stream until the viewer is back, or for `reconnect_s`."""
        self.socket = None
        if not self._playing.done():
            await self._hold(self.service.config.reconnect_s)

    async def answer(self, message: Interact | Control) -> None:
        """Do as the viewer says; Refused where that cannot be."""
        if isinstance(message, Interact):
            await self._interact(message)
        elif message.type == "session.pause":
            self._paused = True
            await self._hold(self.service.config.pause_s)
        elif message.type == "session.resume":
            self._paused = False
            self._flow()

    def end(self) -> None:
        """Stop, and free what this session holds."""
        self._playing.cancel()
        self._set_timer(None)
        self._open.close()

    @property
    def over(self) -> bool:
        return self._playing.done()

    async def say(self, answer: Answer) -> None:
        """A message, if there is anyone to hear it."""
        async with self._speaking:
            await send(self.socket, answer)

    async def done(self, *, stopped: bool) -> None:
        await self.say(Done(request_id=self.request_id, chunks=self._next, stopped=stopped))

    # Holding the stream, and letting it flow.

    async def _hold(self, most_s: float) -> None:
        self._flowing.clear()
        self._set_timer(most_s)
        if self._resuming is not None:
            self._resuming.cancel()
        if self.viewer is not None:
            self.viewer.pause()

    def _flow(self) -> None:
        self._set_timer(None)
        if self._pace is not None:
            self._pace.restart()
        if self.viewer is not None:
            # There may be a queue, and the viewer may have more to say meanwhile.
            self._resuming = asyncio.ensure_future(self.viewer.resume(self._on_place()))
        self._flowing.set()

    def _set_timer(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if seconds is not None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._expire)

    def _expire(self) -> None:
        self._expiring = asyncio.create_task(self._end_aloud("the session was held for too long."))

    async def _end_aloud(self, message: str) -> None:
        await self.say(Failure(code="expired", message=message, request_id=self.request_id))
        self.end()
        await self._hang_up()

    async def _hang_up(self) -> None:
        if self.socket is not None:
            with suppress(RuntimeError, WebSocketDisconnect):
                await self.socket.close()

    def _on_place(self) -> OnPlace:
        def tell(place: int) -> None:
            task = asyncio.create_task(self.say(Queue(request_id=self.request_id, place=place)))
            self._telling.add(task)
            task.add_done_callback(self._telling.discard)

        return tell

    # What is sent.

    async def _play(self) -> None:
        """Wait for a slot, and send what is made in it."""
        try:
            self._pace = Pace(self.service.metrics, self.service.models.active.fps)
            self.served, self.viewer = await self.service.open(
                self.start.prompt,
                self.start.seed,
                self.start.num_frames,
                self._encode,
                first_frame=self.start.first_frame,
                on_place=self._on_place(),
            )
            self._open.callback(self.viewer.close)
            if not self._flowing.is_set():
                self.viewer.pause()
            await self._say_start()
            chunks = self.viewer.chunks()
            while True:
                await self._flowing.wait()
                if self._next == self._made:
                    try:
                        self._keep(await anext(chunks))
                    except StopAsyncIteration:
                        break
                    continue
                await self._send_next()
            await self.done(stopped=False)
        except Problem as problem:
            await self.say(problem.failure(self.request_id))
        except StreamEnded as error:
            await self.say(Failure(code="stream_ended", message=str(error), request_id=self.request_id))
        self._set_timer(None)
        self._open.close()
        await self._hang_up()

    def _encode(self, served: Served) -> Encode:
        if self.start.format == "jpeg":
            return jpegs
        return Fragments(served.fps, served.mark)

    async def _say_start(self) -> None:
        assert self.served is not None, "a stream starts when it has a slot"
        config = StreamConfig(
            model=self.service.config.name,
            version=self.served.version,
            fps=self.served.fps,
            seed=self.start.seed,
            num_frames=self.start.num_frames,
            first_frame=self.start.first_frame,
        )
        await self.say(VideoStart(request_id=self.request_id, format=self.start.format, config=config))

    def _keep(self, chunk: Chunk) -> None:
        parts = chunk.data if isinstance(chunk.data, list) else [chunk.data]
        body = b"".join(parts)
        started = self._events if chunk.new_prompt else []
        if chunk.new_prompt:
            self._events = []
        about = ChunkMetadata(
            request_id=self.request_id,
            transport_chunk_index=self._made,
            generation_chunk_index=chunk.index,
            num_frames=chunk.frames,
            byte_length=len(body),
            frame_bytes=[len(part) for part in parts] if self.start.format == "jpeg" else None,
            started_event_ids=started,
        )
        self._sent.append((about, body, chunk))
        self._made += 1

    async def _send_next(self) -> None:
        about, body, chunk = self._sent[self._next - self._made]
        assert self._pace is not None, "it is set before there are chunks"
        await asyncio.sleep(self._pace.wait_s(chunk.frames, chunk.ready))
        if not self._flowing.is_set():
            return
        for event in about.started_event_ids:
            await self.say(Applied(request_id=self.request_id, event_id=event, chunk_index=chunk.index))
        async with self._speaking:
            await send(self.socket, about)
            if self.socket is not None:
                with suppress(RuntimeError, WebSocketDisconnect):
                    await self.socket.send_bytes(body)
        self._next += 1

    async def _interact(self, message: Interact) -> None:
        interaction = message.interaction
        event = interaction.event_id or uuid4().hex
        if self.viewer is None:
            raise Refused("the stream has no slot yet; send the prompt when video.start has come.")
        try:
            await self.viewer.change_prompt(interaction.event.prompt, reencode=interaction.reencode)
        except (ValueError, StreamEnded) as error:
            await self.say(Rejected(request_id=self.request_id, event_id=event, message=str(error)))
            return
        self._events.append(event)
        await self.say(Queued(request_id=self.request_id, event_id=event))


async def send(socket: WebSocket | None, answer: Answer) -> None:
    """An answer, if there is anyone to hear it."""
    # Whoever leaves in the middle of a message is noticed by the one who reads.
    if socket is not None:
        with suppress(RuntimeError, WebSocketDisconnect):
            await socket.send_text(answer.model_dump_json(exclude_none=True))
