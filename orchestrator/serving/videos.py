"""Whole videos, in the shape of OpenAI's videos API: asked for, waited for, and downloaded as MP4."""

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import FileResponse, StreamingResponse
from pyarrow import NativeFile
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.types import Message

from infra.storage import Files
from model.codec import enlarge
from orchestrator.serving import messages
from orchestrator.serving.encoders import even
from orchestrator.serving.jobs import Job, Order
from orchestrator.serving.messages import Prompt
from orchestrator.serving.models import Served
from orchestrator.serving.problems import Problem
from orchestrator.serving.service import Service

BODY_BYTES = 64 << 10
"""Largest body of a request for a video."""
PIECE_BYTES = 256 << 10
POLL_MS = 500
"""Milliseconds after which OpenAI's client is to ask again."""


class VideoRequest(messages.Request):
    """A video to be made."""

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"examples": [{"prompt": "a seven drifting left"}]}
    )

    prompt: Prompt
    model: str | None = Field(None, max_length=256)
    seconds: float = Field(4.0, gt=0, le=1e6, allow_inf_nan=False)
    """Length; cut or filled up to whole frames."""
    size: str | None = Field(None, max_length=32)
    """The model's own, as WIDTHxHEIGHT, or nothing."""
    seed: int = Field(0, ge=0, lt=2**31)
    """The same prompt and seed give the same video."""


class VideoError(BaseModel):
    code: str
    message: str


class Video(BaseModel):
    """A video, or what is to become one."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    """In percent."""
    created_at: int
    completed_at: int | None
    expires_at: int | None
    """When it is deleted."""
    seconds: str
    size: str
    prompt: str
    seed: int
    error: VideoError | None

    @classmethod
    def of(cls, job: Job) -> "Video":
        order = job.order
        return cls(
            id=job.id,
            model=order.model,
            status=job.status,
            progress=job.progress,
            created_at=int(job.created_at),
            completed_at=None if job.completed_at is None else int(job.completed_at),
            expires_at=None if job.expires_at is None else int(job.expires_at),
            seconds=order.seconds,
            size=order.size,
            prompt=order.prompt,
            seed=order.seed,
            error=VideoError(code="failed", message=job.error or "") if job.status == "failed" else None,
        )


class VideoList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/v1/videos")
    config, files = service.config.videos, Files(service.config.videos.storage)

    async def find(request: Request, video_id: str) -> Job:
        who = await service.access.admit(request)
        job = await service.directory.find_video.remote(who, video_id)
        if job is None:
            raise _unknown()
        return job

    def _unknown() -> Problem:
        return Problem(
            404,
            "video_not_found",
            f"there is no such video here; videos are deleted {config.expire_s:.0f} seconds after they are "
            "made.",
            param="video_id",
        )

    @router.post(
        "",
        summary="Have a video made",
        response_model=Video,
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    kind: {"schema": VideoRequest.model_json_schema()}
                    for kind in ("application/json", "multipart/form-data")
                },
            }
        },
        responses={
            413: {"description": "The body is too large"},
            429: {"description": "Too many videos of this token wait, or too many requests"},
        },
    )
    async def create(request: Request) -> Video:
        who = await service.access.admit(request)
        asked = await _parse(request)
        service.check_model(asked.model)
        served = service.models.active
        frames = round(asked.seconds * served.fps)
        if not 1 <= frames <= config.longest_frames:
            raise Problem(
                422,
                "invalid_value",
                f"seconds: {asked.seconds:g} s are {frames} frames, and a video has 1 to "
                f"{config.longest_frames}; at {served.fps} frames a second, ask for up to "
                f"{config.longest_frames / served.fps:g} s.",
                param="seconds",
            )
        size = await asyncio.to_thread(_check, asked, served)
        order = Order(
            owner=who,
            model=service.config.name,
            prompt=asked.prompt,
            seed=asked.seed,
            frames=frames,
            seconds=f"{asked.seconds:g}",
            size=size,
        )
        try:
            job = await service.directory.add_video.remote(order)
        except OSError:
            raise Problem(503, "unavailable", "videos cannot be stored for now.", Retry_After="5") from None
        if job is None:
            raise Problem(
                429,
                "too_many_videos",
                f"this token has {config.unfinished} videos that are not ready, which is as many as it may "
                "have.",
                Retry_After="5",
            )
        return Video.of(job)

    @router.get("", summary="Videos of this token", response_model=VideoList)
    async def listing(
        request: Request,
        after: Annotated[str | None, Query(max_length=64, description="id of the last one seen")] = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Annotated[Literal["asc", "desc"], Query(description="by age")] = "desc",
    ) -> VideoList:
        who = await service.access.admit(request)
        page = await service.directory.list_videos.remote(who, after, limit, order == "asc")
        if page is None:
            raise Problem(422, "invalid_value", "after: there is no such video here.", param="after")
        jobs, more = page
        first, last = (jobs[0].id, jobs[-1].id) if jobs else (None, None)
        return VideoList(data=[Video.of(job) for job in jobs], first_id=first, last_id=last, has_more=more)

    @router.get("/{video_id}", summary="How far a video is", response_model=Video)
    async def retrieve(request: Request, response: Response, video_id: str) -> Video:
        job = await find(request, video_id)
        if not job.ended:
            response.headers["openai-poll-after-ms"] = str(POLL_MS)
        return Video.of(job)

    @router.get(
        "/{video_id}/content",
        summary="A finished video, as MP4",
        response_class=Response,
        responses={200: {"content": {"video/mp4": {}}}},
    )
    async def content(
        request: Request, video_id: str, variant: Annotated[str, Query(max_length=32)] = "video"
    ) -> Response:
        job = await find(request, video_id)
        if variant != "video":
            raise Problem(
                422, "invalid_value", "variant: there is only the video, no picture of it.", param="variant"
            )
        if job.status == "failed":
            raise Problem(404, "video_failed", f"there is no video: {job.error}")
        if job.status != "completed":
            raise Problem(
                404, "video_not_ready", f"the video is not ready: it is {job.status}, at {job.progress} %."
            )
        headers = {"Content-Disposition": f'inline; filename="{job.id}.mp4"'}
        try:
            path = files.path(job.file)
            if path is not None:
                stat = await asyncio.to_thread(os.stat, path)
                return FileResponse(path, media_type="video/mp4", headers=headers, stat_result=stat)
            file = await asyncio.to_thread(files.open, job.file)
        except FileNotFoundError:
            raise _unknown() from None
        except OSError:
            raise Problem(503, "unavailable", "the video cannot be read for now.", Retry_After="5") from None
        headers["Content-Length"] = str(file.size())
        return StreamingResponse(_pieces(file), media_type="video/mp4", headers=headers)

    @router.delete("/{video_id}", summary="Delete a video, or stop making it", response_model=DeletedVideo)
    async def delete(request: Request, video_id: str) -> DeletedVideo:
        who = await service.access.admit(request)
        try:
            found = await service.directory.remove_video.remote(who, video_id)
        except OSError:
            raise Problem(
                503, "unavailable", "the video cannot be deleted for now.", Retry_After="5"
            ) from None
        if not found:
            raise _unknown()
        return DeletedVideo(id=video_id)

    return router


async def _parse(request: Request) -> VideoRequest:
    """What a request asks for, as JSON or as a form; Problem where it makes no sense."""
    request = _bounded(request)
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        if kind == "application/json":
            return VideoRequest.model_validate_json(await request.body())
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=32) as form:
                return VideoRequest.model_validate(dict(form))
    except ValidationError as error:
        raise _problem(error) from None
    raise Problem(415, "unsupported_media_type", "send application/json or multipart/form-data.")


def _bounded(request: Request) -> Request:
    """The request, whose body cannot be read beyond BODY_BYTES: Problem (413) comes instead."""
    problem = Problem(
        413, "too_large", f"the body has more than {BODY_BYTES} bytes; a prompt and a few numbers have less."
    )
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > BODY_BYTES:
        raise problem
    read = 0

    async def receive() -> Message:
        nonlocal read
        message = await request.receive()
        read += len(message.get("body", b""))
        if read > BODY_BYTES:
            raise problem
        return message

    return Request(request.scope, receive)


def _problem(error: ValidationError) -> Problem:
    """The first thing that is wrong, in one sentence."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return Problem(400, "invalid_json", f"body: {first['msg']}.")
    name = str(first["loc"][0]) if first["loc"] else "body"
    says = first["msg"]
    if name.partition("[")[0] == "input_reference":
        name, says = "input_reference", "this model makes videos of prompts alone; leave it out"
    elif first["type"] == "extra_forbidden":
        says = f"there is no such field; there are {', '.join(VideoRequest.model_fields)}"
    return Problem(422, "invalid_value", f"{name}: {says}.", param=name)


def _check(asked: VideoRequest, served: Served) -> str:
    """The size of the model's videos; Problem where the prompt is too long or another size is asked for."""
    streamer, codec = served.engine.streamer, served.engine.codec
    try:
        streamer.text.encode([asked.prompt])
    except ValueError as error:
        raise Problem(422, "invalid_value", f"prompt: {error}", param="prompt") from None
    except ConnectionError as error:
        raise Problem(503, "unavailable", f"{error}.", Retry_After="5") from None
    _, _, height, width = codec.shape((1, *streamer.card.video.shape[1:]))
    frame = enlarge(np.zeros((1, height, width, 3), np.uint8))
    size = f"{even(frame.shape[2])}x{even(frame.shape[1])}"
    if asked.size not in (None, size):
        raise Problem(
            422,
            "invalid_value",
            f"size: this model makes videos of {size} alone; leave it out.",
            param="size",
        )
    return size


async def _pieces(file: NativeFile) -> AsyncIterator[bytes]:
    try:
        while piece := await asyncio.to_thread(file.read, PIECE_BYTES):
            yield piece
    finally:
        await asyncio.to_thread(file.close)
