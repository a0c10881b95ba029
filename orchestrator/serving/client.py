"""A client of the streaming endpoint: JPEG frames over HTTP, and sessions over WebSocket. For whole videos,
use OpenAI's client.

Needs `pip install self-forcing[client]`.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar
from urllib.parse import urlsplit

import httpx
from pydantic import BaseModel
from websockets.sync.client import ClientConnection, connect

from orchestrator.serving.messages import (
    ANSWER,
    Answer,
    ChunkMetadata,
    Control,
    Failure,
    Format,
    Interact,
    Interaction,
    NewPrompt,
    Reconnect,
    Start,
)

A = TypeVar("A")


class ServerError(Exception):
    """The server cannot do as it was asked."""

    def __init__(
        self, message: str, *, code: str, status: int | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.code, self.status, self.retry_after_s = code, status, retry_after_s


@dataclass(frozen=True)
class ReceivedChunk:
    """A chunk and what the server says of it."""

    about: ChunkMetadata
    data: bytes


@dataclass
class StreamSession:
    """A conversation with the server."""

    socket: ClientConnection
    timeout_s: float
    _unread: list[Answer | ReceivedChunk] = field(default_factory=list)

    def say(self, message: BaseModel) -> None:
        self.socket.send(message.model_dump_json())

    def start(
        self,
        prompt: str,
        *,
        seed: int = 0,
        num_frames: int | None = None,
        first_frame: int = 0,
        format: Format = "m4s",
        model: str | None = None,
    ) -> None:
        self.say(
            Start(
                prompt=prompt,
                seed=seed,
                num_frames=num_frames,
                first_frame=first_frame,
                format=format,
                model=model,
            )
        )

    def change_prompt(self, prompt: str, event_id: str | None = None, *, reencode: bool = True) -> None:
        event = NewPrompt(prompt=prompt)
        self.say(Interact(interaction=Interaction(event=event, event_id=event_id, reencode=reencode)))

    def control(self, what: Literal["ping", "stop", "pause", "resume"]) -> None:
        self.say(Control(type=f"session.{what}"))  # type: ignore[arg-type]

    def receive(self) -> Answer | ReceivedChunk:
        """The next message, a chunk together with its metadata. TimeoutError, or ConnectionClosed at the
        end."""
        if self._unread:
            return self._unread.pop()
        answer = ANSWER.validate_json(self.socket.recv(timeout=self.timeout_s))
        if not isinstance(answer, ChunkMetadata):
            return answer
        data = self.socket.recv(timeout=self.timeout_s)
        assert isinstance(data, bytes), "a chunk's metadata is followed by its bytes"
        return ReceivedChunk(answer, data)

    def wait_for(self, kind: type[A]) -> A:
        """The next message of a kind; ServerError where an error comes instead. Others are passed over."""
        while True:
            message = self.receive()
            if isinstance(message, kind):
                return message
            if isinstance(message, Failure):
                raise ServerError(message.message, code=message.code)


class Client:
    """One server, and the token to show it."""

    def __init__(self, url: str = "http://127.0.0.1:8000", token: str | None = None, timeout_s: float = 60.0):
        self.url, self.timeout_s = url.rstrip("/"), timeout_s
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        # A proxy that the environment names cannot reach a server of this machine.
        self._proxies = urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1")

    def get(self, path: str, **query: Any) -> Any:
        """JSON of a path; ServerError where there is none."""
        with self._request("GET", path, query) as response:
            response.read()
            return response.json()

    def ticket(self) -> str:
        """A ticket that stands for the token once, for pages."""
        with self._request("POST", "/v1/tickets", {}) as response:
            response.read()
            return response.json()["ticket"]

    @contextmanager
    def stream(self, prompt: str, **query: Any) -> Iterator[Iterator[bytes]]:
        """JPEG frames of `GET /v1/streams`, as they come; ServerError where there is no stream to be had."""
        with self._request("GET", "/v1/streams", {"prompt": prompt, **query}) as response:
            yield _parts(response.iter_raw())

    @contextmanager
    def session(self) -> Iterator[StreamSession]:
        """A new WebSocket session, to be started."""
        url = f"ws{self.url.removeprefix('http')}/v1/realtime/video"
        with connect(
            url,
            additional_headers=self.headers,
            open_timeout=self.timeout_s,
            max_size=None,
            proxy=True if self._proxies else None,
        ) as socket:
            yield StreamSession(socket, self.timeout_s)

    @contextmanager
    def reconnected(self, request_id: str, next_chunk: int) -> Iterator[StreamSession]:
        """A session whose connection broke, from chunk `next_chunk` on. It answers whether it can go on.

        A connection may lead to another replica than the one that holds the session; the next is tried then.
        """
        deadline = time.monotonic() + self.timeout_s
        while True:
            with self.session() as session:
                session.say(Reconnect(request_id=request_id, next_chunk=next_chunk))
                answer = session.receive()
                strayed = isinstance(answer, Failure) and answer.code == "elsewhere"
                if not strayed or time.monotonic() > deadline:
                    session._unread.append(answer)
                    yield session
                    return
            time.sleep(0.1)

    @contextmanager
    def _request(self, method: str, path: str, query: dict[str, Any]) -> Iterator[httpx.Response]:
        query = {name: value for name, value in query.items() if value is not None}
        with httpx.stream(
            method,
            self.url + path,
            params=query,
            headers=self.headers,
            timeout=self.timeout_s,
            trust_env=self._proxies,
        ) as response:
            if response.is_error:
                response.read()
                error = response.json()["error"]
                wait = response.headers.get("retry-after")
                raise ServerError(
                    error["message"],
                    code=error["code"],
                    status=response.status_code,
                    retry_after_s=float(wait) if wait else None,
                )
            yield response


def _parts(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """Bodies of a multipart stream whose parts say their length."""
    data = b""
    for piece in pieces:
        data += piece
        while (end := data.find(b"\r\n\r\n")) >= 0:
            head = data[:end].lower()
            length = int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            first, last = end + 4, end + 4 + length
            if len(data) < last + 2:
                break
            yield data[first:last]
            data = data[last + 2 :]
