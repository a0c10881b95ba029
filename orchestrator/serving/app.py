"""The Ray Serve application: streams over HTTP and WebSocket, and the page to watch them on.

`GET /v1/streams` is a motion JPEG that FFmpeg and curl read; `WS /v1/realtime/video` is a `Session`, whose prompt can change
while it plays.
"""

import asyncio
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

from orchestrator.serving.session import LONGEST_PROMPT, Session
from orchestrator.serving.viewers import StreamEnded, Viewer, Viewers
from workers.streamer import NoSlot, Streamer

PAGE = Path(__file__).parents[2] / "infra" / "web" / "index.html"
HOST = "127.0.0.1"
BOUNDARY = "frame"


@dataclass(frozen=True)
class ServeConfig:
    """The streaming endpoint."""

    model: str = "outputs/distilled/model"
    """Model directory of a student with a rolling window."""
    port: int = 8000
    """Port to listen on, on loopback: requests are not authenticated."""
    slots: int = 8
    """Streams that run at once on a replica; the next viewer is told to come again."""
    cpus: float = 1.0
    """CPUs that Ray reserves for a replica."""
    gpus: float = 0.0
    """GPUs that Ray reserves for a replica."""
    drain_s: float = 600.0
    """Seconds that running streams may go on when a replica is asked to stop."""

    def __post_init__(self) -> None:
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
            # No closing boundary at the end: FFmpeg takes one for a damaged frame.
            try:
                async for frame in self._paced(viewer):
                    yield b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (
                        BOUNDARY.encode(), len(frame), frame,
                    )  # fmt: skip
            finally:
                self.viewers.close(viewer)

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
        except StreamEnded as error:
            raise HTTPException(503, str(error)) from None

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
            await Session(self.viewers, self.fps, socket).run()


def build(settings: dict[str, Any]) -> serve.Application:
    """The application, for `serve.run`, from the settings of a `ServeConfig`."""
    config = ServeConfig(**settings)
    return StreamServer.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": config.cpus, "num_gpus": config.gpus},
        # A stream is one ongoing request; whom there is no slot for is told so in words, not queued by Serve.
        max_ongoing_requests=4 * config.slots + 16,
        graceful_shutdown_timeout_s=config.drain_s,
    ).bind(config)
