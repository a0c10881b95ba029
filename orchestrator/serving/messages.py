"""Messages of `WS /v1/realtime/video`: those of vLLM-Omni's streaming video API, and pause, resume, reconnect
and the queue besides.

Fields that are not named here are passed over: clients of other models send sizes and sampling settings,
which a distilled model has fixed; `video.start` says what they are. A binary message follows
`video.chunk_metadata`.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints, TypeAdapter, model_validator

LONGEST_PROMPT = 1000
Prompt = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST_PROMPT)]
"""Text that a request may show us, in characters."""
LAST_FRAME = 10**9
MESSAGE_BYTES = 16 << 10
"""Largest message to the server."""
Format = Literal["m4s", "jpeg"]
"""Fragments of one MP4, or JPEG files one after the other."""


class Request(BaseModel):
    """Asked by a client. Null and empty, which typed clients send for what is not set, are the default."""

    @model_validator(mode="before")
    @classmethod
    def _leave_out_what_is_not_set(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        required = {name for name, field in cls.model_fields.items() if field.is_required()}
        return {name: value for name, value in given.items() if value not in (None, "") or name in required}


class Start(Request):
    """Begin a session."""

    type: Literal["session.start"] = "session.start"
    prompt: Prompt
    model: str | None = Field(None, max_length=256)
    seed: int = Field(0, ge=0, lt=2**31)
    num_frames: int | None = Field(None, ge=1, le=LAST_FRAME)
    """None is without end."""
    first_frame: int = Field(0, ge=0, le=LAST_FRAME)
    """Frames before it are made and not sent: so a client goes on after its replica is lost."""
    format: Format = "m4s"


class Reconnect(Request):
    """Go on with a session whose connection broke."""

    type: Literal["session.reconnect"] = "session.reconnect"
    request_id: str = Field(max_length=64)
    next_chunk: int = Field(ge=0)
    """`transport_chunk_index` of the first chunk that did not arrive."""


class NewPrompt(Request):
    prompt: Prompt


class Interaction(Request):
    event: NewPrompt
    event_id: str | None = Field(None, min_length=1, max_length=128)
    reencode: bool = True
    """Whether what was seen is encoded anew under the new prompt."""


class Interact(Request):
    """A new prompt, from the next chunk on."""

    type: Literal["session.interaction"] = "session.interaction"
    interaction: Interaction


class Control(Request):
    type: Literal["session.ping", "session.stop", "session.pause", "session.resume"]


Message = Annotated[Start | Reconnect | Interact | Control, Field(discriminator="type")]
"""What a client says."""
MESSAGE: TypeAdapter[Message] = TypeAdapter(Message)


class StreamConfig(BaseModel):
    """What is played."""

    model: str
    version: str
    fps: int
    seed: int
    num_frames: int | None = None
    first_frame: int


class VideoStart(BaseModel):
    """There is a slot, and chunks will come."""

    type: Literal["video.start"] = "video.start"
    request_id: str
    format: Format
    config: StreamConfig


class Queue(BaseModel):
    """No slot is free yet."""

    type: Literal["session.queue"] = "session.queue"
    request_id: str
    place: int
    """From 1."""


class ChunkMetadata(BaseModel):
    """What the binary message that follows holds."""

    type: Literal["video.chunk_metadata"] = "video.chunk_metadata"
    request_id: str
    kind: Literal["media"] = "media"
    transport_chunk_index: int
    """Counts what is sent, from 0."""
    generation_chunk_index: int
    """Counts what is made, from 0."""
    num_frames: int
    byte_length: int
    frame_bytes: list[int] | None = None
    """Sizes of the files, for JPEG."""
    started_event_ids: list[str] = []
    """Prompts that take effect with this chunk."""


class Queued(BaseModel):
    """A new prompt will be applied."""

    type: Literal["session.interaction.queued"] = "session.interaction.queued"
    request_id: str
    event_id: str


class Applied(BaseModel):
    """The next chunk is the first under the new prompt."""

    type: Literal["session.interaction.applied"] = "session.interaction.applied"
    request_id: str
    event_id: str
    chunk_index: int
    """`generation_chunk_index` of that chunk."""


class Rejected(BaseModel):
    """A new prompt cannot be followed; the stream goes on as it was."""

    type: Literal["session.interaction.rejected"] = "session.interaction.rejected"
    request_id: str
    event_id: str
    message: str


class Pong(BaseModel):
    type: Literal["session.pong"] = "session.pong"


class Done(BaseModel):
    """The end."""

    type: Literal["session.done"] = "session.done"
    request_id: str
    chunks: int
    """Chunks that were sent."""
    stopped: bool
    """Whether the client asked for the end."""


class Failure(BaseModel):
    """Something cannot be done. The session goes on unless the connection closes with it."""

    type: Literal["error"] = "error"
    code: str
    message: str
    param: str | None = None
    request_id: str | None = None


Answer = Annotated[
    VideoStart | Queue | ChunkMetadata | Queued | Applied | Rejected | Pong | Done | Failure,
    Field(discriminator="type"),
]
"""What the server says."""
ANSWER: TypeAdapter[Answer] = TypeAdapter(Answer)
