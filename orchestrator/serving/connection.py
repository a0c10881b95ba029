"""A connection over WebSocket: what it says first, and which session it speaks for from then on."""

import asyncio
from collections.abc import Awaitable
from contextlib import suppress
from typing import Any, TypeVar, assert_never

from fastapi import APIRouter, WebSocket, WebSocketDisconnect
from pydantic import ValidationError

from orchestrator.serving.messages import (
    MESSAGE,
    MESSAGE_BYTES,
    Control,
    Failure,
    Interact,
    Message,
    Pong,
    Reconnect,
    Start,
)
from orchestrator.serving.problems import Problem
from orchestrator.serving.service import UNREACHABLE, Service
from orchestrator.serving.session import Refused, Session, send

POLICY_VIOLATION = 1008
MOST_GREETINGS = 8
"""Connections that may be silent at once. Whoever says at once what it wants is never the oldest of them for
long."""
T = TypeVar("T")
ELSEWHERE = "elsewhere"
"""Code of the answer to whoever comes back to a session at another replica than it is with: the next
connection may lead there."""


def _parse(received: Any) -> Message:
    if received["type"] == "websocket.disconnect":
        raise WebSocketDisconnect(received.get("code", 1000))
    text = received.get("text")
    if text is None or len(text) > MESSAGE_BYTES:
        raise Refused(f"a message must be JSON text of at most {MESSAGE_BYTES} bytes.")
    try:
        return MESSAGE.validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"][1:]) or "message"
        raise Refused(f"{place}: {first['msg']}.") from None


class Greeting:
    """A connection that has not said yet what it wants. There are only so many; a new one takes the place of
    the oldest."""

    def __init__(self, service: Service):
        self._greetings = service.greetings
        self._until = asyncio.get_running_loop().time() + service.config.start_s
        self._timeout: asyncio.Timeout | None = None
        while len(self._greetings) >= MOST_GREETINGS:
            self._greetings.popleft().end()
        self._greetings.append(self)

    async def wait(self, received: Awaitable[T]) -> T:
        """What is received; TimeoutError where it takes too long, or a newcomer needs the place."""
        async with asyncio.timeout_at(self._until) as self._timeout:
            return await received

    def end(self) -> None:
        """Wait no longer."""
        with suppress(ValueError):
            self._greetings.remove(self)
        self._until = 0.0
        if self._timeout is not None:
            with suppress(RuntimeError):  # it is over
                self._timeout.reschedule(self._until)


async def _converse(service: Service, who: str, socket: WebSocket) -> None:
    session: Session | None = None
    greeting = Greeting(service)
    try:
        while True:
            try:
                received = socket.receive()
                message = _parse(await (received if session is not None else greeting.wait(received)))
                match message:
                    case Start():
                        if session is not None:
                            raise Refused("the session has started already.")
                        session = Session(service, who, message)
                        await session.attach(socket)
                    case Reconnect():
                        found = service.sessions.get(message.request_id)
                        if (
                            session is None
                            and found is None
                            and await _elsewhere(service, message.request_id)
                        ):
                            raise Refused("another replica holds this session; connect again.", ELSEWHERE)
                        if session is not None or found is None or found.who != who:
                            raise Refused("there is no such session here to go on with; start one.")
                        await found.attach(socket, message.next_chunk)
                        session = found
                    case Control(type="session.ping"):
                        await send(socket, Pong())
                    case Control(type="session.stop"):
                        if session is not None:
                            await session.done(stopped=True)
                            session.end()
                        # A page that is left hangs up at the same moment.
                        with suppress(RuntimeError, WebSocketDisconnect):
                            await socket.close()
                        return
                    case Interact() | Control():
                        if session is None:
                            raise Refused(
                                "the session has not started: send session.start with a prompt first."
                            )
                        await session.answer(message)
                    case _:
                        assert_never(message)
            except Refused as refusal:
                await send(socket, Failure(code=refusal.code, message=str(refusal)))
                if refusal.code == ELSEWHERE:
                    await socket.close()
                    return
            except Problem as problem:
                await send(socket, problem.failure())
            if session is not None:
                greeting.end()
    except TimeoutError:
        late = f"a session must start within {service.config.start_s:g} seconds, sooner where many connect."
        await send(socket, Failure(code="expired", message=late))
        with suppress(RuntimeError, WebSocketDisconnect):
            await socket.close(POLICY_VIOLATION)
    finally:
        greeting.end()
        if session is not None and session.socket is socket and not session.over:
            await session.detach()


async def _elsewhere(service: Service, request_id: str) -> bool:
    """Whether a session may be with another replica that runs."""
    parts = request_id.split("-", 2)
    if len(parts) < 3 or parts[1] == service.replica:
        return False
    try:
        return await service.directory.runs.remote(parts[1])
    except UNREACHABLE:
        return False


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.websocket("/v1/realtime/video")
    async def realtime(socket: WebSocket) -> None:
        try:
            who = await service.access.admit(socket)
        except Problem as problem:
            # Refused after it is accepted: a browser is told no reason for a handshake that fails.
            await socket.accept()
            await send(socket, problem.failure())
            await socket.close(POLICY_VIOLATION)
            return
        await socket.accept()
        with suppress(WebSocketDisconnect):
            await _converse(service, who, socket)

    return router
