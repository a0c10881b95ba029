"""Streams over plain HTTP, and what tells of a replica."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from orchestrator.serving.access import TICKET_S
from orchestrator.serving.encoders import jpegs
from orchestrator.serving.messages import LAST_FRAME, Prompt
from orchestrator.serving.metrics import Pace
from orchestrator.serving.problems import Problem
from orchestrator.serving.service import Service

PAGE = Path(__file__).parents[2] / "infra" / "web" / "index.html"
BOUNDARY = "frame"


class MotionJpeg(StreamingResponse):
    """Closes its stream also where the viewer is gone before the first byte, and the body is never begun."""

    def __init__(self, body: AsyncIterator[bytes], stream: ExitStack):
        super().__init__(body, media_type=f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.stream:
            await super().__call__(scope, receive, send)


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(PAGE, headers={"Cache-Control": "no-cache"})

    @router.get("/healthz", summary="Whether a chunk can be made")
    async def health() -> dict[str, Any]:
        try:
            service.models.check()
        except RuntimeError as error:
            raise Problem(503, "unavailable", str(error)) from None
        engine = service.models.active.engine
        return {
            "streams": sum(len(served.engine.viewers) for served in service.models.served),
            "queue": engine.waiting,
            "slots": service.config.slots,
            "fps": service.models.active.fps,
            "model": service.config.name,
            "version": service.models.active.version,
            "retiring": [served.version for served in service.models.retiring],
            "refused": service.models.refused,
            "stale": service.models.stale,
        }

    @router.get("/metrics", summary="For Prometheus", response_class=Response)
    async def metrics(request: Request) -> Response:
        await service.access.admit(request)
        return Response(await service.directory.metrics.remote(), media_type="text/plain; version=0.0.4")

    @router.get("/v1/models", summary="The model served here, as OpenAI lists models")
    async def models(request: Request) -> dict[str, Any]:
        await service.access.admit(request)
        model = {"id": service.config.name, "object": "model", "created": 0, "owned_by": "self-forcing"}
        return {"object": "list", "data": [model]}

    @router.post("/v1/tickets", summary="A ticket that stands once for the token it was asked for with")
    async def ticket(request: Request) -> dict[str, Any]:
        who = await service.access.admit(request)
        return {"ticket": await service.directory.issue.remote(who), "expires_in": TICKET_S}

    @router.get(
        "/v1/streams",
        summary="A stream as motion JPEG",
        response_class=StreamingResponse,
        responses={
            200: {"content": {f"multipart/x-mixed-replace; boundary={BOUNDARY}": {}}},
            429: {
                "description": "No slot is free, or too many requests; Retry-After says when to come again"
            },
        },
    )
    async def stream(
        request: Request,
        prompt: Annotated[Prompt, Query(examples=["a seven drifting left"])],
        seed: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        frames: Annotated[int | None, Query(ge=1, le=LAST_FRAME, description="none is without end")] = None,
        first_frame: Annotated[
            int, Query(ge=0, le=LAST_FRAME, description="frames before it are made and not sent")
        ] = 0,
        model: Annotated[str | None, Query(max_length=256)] = None,
    ) -> StreamingResponse:
        who = await service.access.admit(request)
        service.check_model(model)
        pace = Pace(service.metrics, service.models.active.fps)
        with ExitStack() as opening:
            opening.enter_context(service.access.stream(who))
            served, viewer = await service.open(
                prompt, seed, frames, lambda _: jpegs, first_frame=first_frame
            )
            opening.callback(viewer.close)
            open_stream = opening.pop_all()

        async def parts() -> AsyncIterator[bytes]:
            # No closing boundary at the end: FFmpeg takes one for a damaged frame.
            async for chunk in viewer.chunks():
                await asyncio.sleep(pace.wait_s(chunk.frames, chunk.ready))
                for number, frame in enumerate(chunk.data):
                    await asyncio.sleep(1 / served.fps if number else 0)
                    yield b"--%s\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (
                        BOUNDARY.encode(), len(frame), frame,
                    )  # fmt: skip

        return MotionJpeg(parts(), open_stream)

    return router
