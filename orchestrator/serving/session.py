"""One WebSocket viewer, in the messages of vLLM-Omni's streaming video: JSON for control, and each chunk as its metadata followed by one binary
message, here JPEG frames one after the other.
"""

import asyncio
import json
import time
from contextlib import suppress
from typing import Any

from fastapi import WebSocket, WebSocketDisconnect

from orchestrator.serving.viewers import Chunk, StreamEnded, Viewer, Viewers
from workers.streamer import NoSlot

LONGEST_PROMPT = 1000
MESSAGE_BYTES = 16 << 10
"""Largest control message."""


class Refused(Exception):
    """A message that cannot be followed; the session goes on."""


class Session:
    """One WebSocket viewer."""

    def __init__(self, viewers: Viewers, fps: int, socket: WebSocket):
        self.viewers = viewers
        self.fps = fps
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
                        if sending is not None:
                            sending.cancel()
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
                self.viewers.close(self.viewer)

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
            self.viewer = await self.viewers.open(str(prompt), seed, frames)
        except (NoSlot, StreamEnded, ValueError) as error:
            raise Refused(str(error)) from None
        await self._say("video.start", fps=self.fps, format="jpeg")

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
            await self.viewers.change_prompt(
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
                    length = len(chunk.frames) / self.fps
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
