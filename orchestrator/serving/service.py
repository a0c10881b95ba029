"""One replica: its models, who may connect, and its viewers."""

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ray.serve.handle import DeploymentHandle

from orchestrator.serving.access import Access
from orchestrator.serving.config import ServeConfig
from orchestrator.serving.engine import Encode, OnPlace, StreamEnded, Viewer
from orchestrator.serving.metrics import Metrics
from orchestrator.serving.models import Models, Served
from orchestrator.serving.problems import Problem
from orchestrator.serving.prompt_encoder import UNREACHABLE
from workers.streamer import NoSlot

REPORT_S = 2.0


class Service:
    """What the routes of a replica need."""

    def __init__(
        self, config: ServeConfig, directory: DeploymentHandle, encoder: DeploymentHandle, replica: str
    ):
        """ValueError where the model cannot be streamed."""
        self.config, self.directory, self.replica = config, directory, replica
        self.models = Models(config, encoder)
        self.access = Access(config.access, redeem=lambda ticket: directory.redeem.remote(ticket))
        self.metrics = Metrics()
        self.sessions: dict[str, Any] = {}
        """Each `Session` over WebSocket, by request id."""
        self.greetings: deque[Any] = deque()
        """Connections over WebSocket that have not said yet what they want, oldest first."""

    async def report(self) -> None:
        """Tell the directory what there is to count, until cancelled."""
        while True:
            self._measure()
            # Where the directory is being restarted, the next report will do.
            with suppress(*UNREACHABLE):
                await self.directory.report.remote(self.replica, self.metrics.collect())
            await asyncio.sleep(REPORT_S)

    def _measure(self) -> None:
        served = [served.engine for served in self.models.served]
        self.metrics.streams.set(sum(len(engine.viewers) for engine in served))
        self.metrics.queue.set(sum(engine.waiting for engine in served))
        self.metrics.slots.set(self.config.slots)
        self.metrics.cache.set(sum(engine.streamer.cache.nbytes for engine in served))

    def census(self) -> dict[str, int]:
        """What viewers hold now, and how many tasks run on the event loop."""
        streamers = [served.engine.streamer for served in self.models.served]
        return {
            "free_slots": sum(len(streamer.free) for streamer in streamers),
            "streams": sum(len(streamer.streams) for streamer in streamers),
            "viewers": sum(len(served.engine.viewers) for served in self.models.served),
            "queue": sum(served.engine.waiting for served in self.models.served),
            "sessions": len(self.sessions),
            "open": self.access.open_streams,
            "cache_bytes": sum(streamer.cache.nbytes for streamer in streamers),
            "tasks": len(asyncio.all_tasks()),
        }

    def check_model(self, name: str | None) -> None:
        """Problem (404) for a model that is not served here."""
        if name is not None and name != self.config.name:
            raise Problem(
                404,
                "model_not_found",
                f"there is no model {name!r} here; ask for {self.config.name!r}.",
                param="model",
            )

    async def open(
        self,
        prompt: str,
        seed: int,
        frames: int | None,
        encode: Callable[[Served], Encode],
        *,
        first_frame: int = 0,
        on_place: OnPlace | None = None,
    ) -> tuple[Served, Viewer]:
        """A viewer of the active model, as `Engine.open`; Problem where there is no stream to be had."""
        if frames is not None and first_frame >= frames:
            raise Problem(
                422,
                "invalid_value",
                f"first_frame: it is {first_frame}, and the stream has {frames} frames.",
                param="first_frame",
            )
        served = self.models.active
        try:
            return served, await served.engine.open(
                prompt, seed, frames, encode(served), first_frame=first_frame, on_place=on_place
            )
        except NoSlot as error:
            raise Problem(429, "no_slot", f"{error} Try again in a while.", Retry_After="5") from None
        except ValueError as error:
            raise Problem(422, "invalid_value", f"prompt: {error}", param="prompt") from None
        except StreamEnded as error:
            raise Problem(503, "unavailable", str(error), Retry_After="5") from None
