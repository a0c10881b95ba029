"""The Ray Serve application: streams over HTTP and WebSocket, and the page to watch them on.

`GET /v1/streams` is a motion JPEG that any `<img>`, OpenCV and curl can read. `WS /v1/realtime/video` speaks vLLM-Omni's streaming-video
messages: JSON control messages, and each chunk as its metadata followed by one binary message, here JPEG frames one after the other.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, HTTPException, Query, Request, WebSocket, WebSocketDisconnect
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from ray import serve
from starlette.exceptions import HTTPException as StarletteHTTPException

from orchestrator.serving.viewers import Chunk, StreamEnded, Viewer, Viewers
from workers.streamer import NoSlot, Streamer

PAGE = Path(__file__).parents[2] / "infra" / "web" / "index.html"
LONGEST_PROMPT = 1000
BOUNDARY = "frame"
MESSAGE_BYTES = 16 << 10
"""Largest control message."""


@dataclass(frozen=True)
class ServeConfig:
    """The streaming endpoint."""

    model: str = "outputs/distilled/model"
    """Model directory of a student with a rolling window."""
    host: str = "127.0.0.1"
    """Address to listen on; anything but loopback is refused until requests are authenticated."""
    port: int = 8000
    """Port to listen on."""
    slots: int = 8
    """Streams that run at once on a replica; the next viewer is told to come again."""
    cpus: float = 1.0
    """CPUs that Ray reserves for a replica."""
    gpus: float = 0.0
    """GPUs that Ray reserves for a replica."""
    drain_s: float = 600.0
    """Seconds that running streams may go on when a replica is asked to stop."""

    def __post_init__(self) -> None:
        if self.host not in ("127.0.0.1", "localhost", "::1"):
            raise ValueError(
                f"host is {self.host}; only loopback can be served, for requests are not authenticated yet: put a proxy that does in front."
            )
        if self.slots < 1:
            raise ValueError(f"slots is {self.slots}; it must be at least 1.")


app = FastAPI(title="self-forcing", summary="Real-time autoregressive video, streamed.")


def problem(status: int, message: str, code: str, **headers: str) -> JSONResponse:
    """Every error has this one shape."""
    body = {
        "error": {
            "message": message,
            "type": "invalid_request_error" if status < 500 else "server_error",
            "code": code,
        }
    }
    return JSONResponse(body, status, headers)


@app.exception_handler(StarletteHTTPException)
async def _http_problem(_: Request, error: StarletteHTTPException) -> JSONResponse:
    return problem(error.status_code, str(error.detail), "error", **(error.headers or {}))


@app.exception_handler(RequestValidationError)
async def _invalid(_: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return problem(422, f"{first['loc'][-1]}: {first['msg']}.", "invalid_value")


@serve.deployment
@serve.ingress(app)
class StreamServer:
    """One replica: a model, its slots, and its viewers."""

    def __init__(self, config: ServeConfig):
        self.config = config
        self.streamer = Streamer(config.model, config.slots)
        self.fps = self.streamer.card.video.fps
        self.viewers = Viewers(self.streamer)

    def check_health(self) -> None:
        """Healthy means that a chunk can be made."""
        if self.viewers.failure is not None:
            raise RuntimeError(f"the model failed: {self.viewers.failure}")

    def __del__(self) -> None:
        self.viewers.stop()

    @app.get("/", include_in_schema=False)
    async def page(self) -> FileResponse:
        return FileResponse(PAGE)

    @app.get("/healthz", summary="Whether a chunk can be made, and how many streams run")
    async def health(self) -> dict[str, Any]:
        try:
            self.check_health()
        except RuntimeError as error:
            raise HTTPException(503, str(error)) from None
        return {"streams": len(self.viewers.viewers), "slots": self.config.slots, "fps": self.fps}

    @app.get(
        "/v1/streams",
        summary="A stream as motion JPEG",
        response_class=StreamingResponse,
        responses={200: {"content": {f"multipart/x-mixed-replace; boundary={BOUNDARY}": {}}}, 429: {}},
    )
    async def stream(
        self,
        prompt: Annotated[
            str, Query(min_length=1, max_length=LONGEST_PROMPT, examples=["a seven drifting left"])
        ],
        seed: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        frames: Annotated[int | None, Query(ge=1, le=10**9, description="none is without end")] = None,
    ) -> StreamingResponse:
        viewer = await self._open(prompt, seed, frames)

        async def parts() -> AsyncIterator[bytes]:
            try:
                async for frame in self._paced(viewer):
                    yield b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (
                        BOUNDARY.encode(), len(frame), frame,
                    )  # fmt: skip
                yield b"--%s--\r\n" % BOUNDARY.encode()
            finally:
                await self.viewers.close(viewer)

        return StreamingResponse(parts(), media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")

    async def _open(self, prompt: str, seed: int, frames: int | None) -> Viewer:
        if not prompt.strip():
            raise HTTPException(422, "prompt: it is empty; say what the video shows.")
        try:
            return await self.viewers.open(prompt, seed, frames)
        except NoSlot as error:
            raise HTTPException(429, f"{error} Try again in a while.", {"Retry-After": "5"}) from None
        except ValueError as error:
            raise HTTPException(422, f"prompt: {error}") from None

    async def _paced(self, viewer: Viewer) -> AsyncIterator[bytes]:
        """Frames when they are due. Where the model is slower, as they come."""
        due = time.monotonic()
        async for chunk in viewer.chunks():
            for frame in chunk.frames:
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                due = max(due, time.monotonic() - 1 / self.fps) + 1 / self.fps
                yield frame

    @app.websocket("/v1/realtime/video")
    async def realtime(self, socket: WebSocket) -> None:
        await socket.accept()
        with suppress(WebSocketDisconnect):
            await Session(self, socket).run()


class Refused(Exception):
    """A message that cannot be followed; the session goes on."""


class Session:
    """One WebSocket viewer."""

    def __init__(self, server: StreamServer, socket: WebSocket):
        self.server = server
        self.socket = socket
        self.viewer: Viewer | None = None
        self.pending: list[str] = []
        """Event ids of prompts that were queued and are not applied yet."""
        self.paused = asyncio.Event()
        self.paused.set()  # set is running

    async def run(self) -> None:
        """Until the viewer leaves or stops: messages in, chunks out."""
        sending: asyncio.Task | None = None
        try:
            while True:
                try:
                    message = self._parse(await self.socket.receive())
                    if message["type"] == "session.start":
                        await self._start(message)
                        sending = asyncio.create_task(self._send())
                    elif message["type"] == "session.stop":
                        break
                    else:
                        await self._answer(message)
                except Refused as refusal:
                    await self._say("error", message=str(refusal))
            await self._say("session.done", reason="stopped")
        finally:
            if sending is not None:
                sending.cancel()
            if self.viewer is not None:
                await self.server.viewers.close(self.viewer)

    @staticmethod
    def _parse(received: Any) -> dict[str, Any]:
        if received["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(received.get("code", 1000))
        text = received.get("text")
        if text is None or len(text) > MESSAGE_BYTES:
            raise Refused(f"a message must be JSON text of at most {MESSAGE_BYTES} bytes.")
        try:
            message = json.loads(text)
        except (ValueError, RecursionError):
            raise Refused("a message must be JSON.") from None
        if not isinstance(message, dict) or not isinstance(message.get("type"), str):
            raise Refused("a message must be an object with a type.")
        return message

    async def _start(self, message: dict[str, Any]) -> None:
        if self.viewer is not None:
            raise Refused("the session has started already.")
        prompt, seed, frames = message.get("prompt"), message.get("seed", 0), message.get("frames")
        self._check_prompt(prompt)
        if type(seed) is not int or not 0 <= seed < 2**31:
            raise Refused("seed must be an integer from 0 to 2147483647.")
        if frames is not None and (type(frames) is not int or not 1 <= frames <= 10**9):
            raise Refused("frames must be an integer from 1, or none for a stream without end.")
        try:
            self.viewer = await self.server.viewers.open(str(prompt), seed, frames)
        except (NoSlot, ValueError) as error:
            raise Refused(str(error)) from None
        await self._say("video.start", fps=self.server.fps, format="jpeg")

    @staticmethod
    def _check_prompt(prompt: Any) -> None:
        if not isinstance(prompt, str) or not prompt.strip() or len(prompt) > LONGEST_PROMPT:
            raise Refused(f"prompt must be text of 1 to {LONGEST_PROMPT} characters.")

    async def _answer(self, message: dict[str, Any]) -> None:
        kind = message["type"]
        if kind == "session.ping":
            await self._say("session.pong")
        elif self.viewer is None:
            raise Refused("the session has not started: send session.start with a prompt first.")
        elif kind == "session.interaction":
            await self._interact(self.viewer, message)
        elif kind in ("session.pause", "session.resume"):
            (self.paused.clear if kind == "session.pause" else self.paused.set)()
        else:
            raise Refused(f"there is no message {kind!r}.")

    async def _interact(self, viewer: Viewer, message: dict[str, Any]) -> None:
        event = str(message.get("event_id", ""))
        try:
            self._check_prompt(message.get("prompt"))
            await self.server.viewers.change_prompt(
                viewer, message["prompt"], reencode=message.get("reencode", True) is not False
            )
        except (Refused, ValueError) as error:
            await self._say("session.interaction.rejected", event_id=event, message=str(error))
            return
        self.pending.append(event)
        await self._say("session.interaction.queued", event_id=event)

    async def _send(self) -> None:
        """Chunks when they are due."""
        assert self.viewer is not None, "sending begins with the session"
        due = time.monotonic()
        # Whoever leaves in the middle of a message is noticed by the one who reads.
        with suppress(WebSocketDisconnect):
            try:
                async for chunk in self.viewer.chunks():
                    await self.paused.wait()
                    await asyncio.sleep(max(0.0, due - time.monotonic()))
                    length = len(chunk.frames) / self.server.fps
                    due = max(due, time.monotonic() - length) + length
                    await self._send_chunk(chunk)
                await self._say("session.done", reason="finished")
            except StreamEnded as error:
                await self._say("error", message=str(error))
            await self.socket.close()

    async def _send_chunk(self, chunk: Chunk) -> None:
        if chunk.new_prompt:
            for event in self.pending:
                await self._say("session.interaction.applied", event_id=event, chunk_index=chunk.index)
            self.pending.clear()
        sizes = [len(frame) for frame in chunk.frames]
        await self._say("video.chunk_metadata", chunk_index=chunk.index, frame_bytes=sizes)
        await self.socket.send_bytes(b"".join(chunk.frames))

    async def _say(self, kind: str, **values: Any) -> None:
        await self.socket.send_text(json.dumps({"type": kind, **values}))


def build(settings: dict[str, Any]) -> serve.Application:
    """The application, for `serve.run` and `serve deploy`, from the settings of a `ServeConfig`."""
    config = ServeConfig(**settings)
    return StreamServer.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # A stream is one ongoing request; whom there is no slot for is told so in words, not queued by Serve.
        max_ongoing_requests=4 * config.slots + 16,
        graceful_shutdown_timeout_s=config.drain_s,
    ).bind(config)
