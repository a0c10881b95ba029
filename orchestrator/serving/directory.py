"""What replicas share: tickets, what each of them counts, and the videos that are made whole. An actor of its
own, so that any replica can answer.

Everything runs on one event loop. What is known of a video also lies beside it in storage, and is read again
when the directory starts.
"""

import asyncio
import io
import json
import logging
import math
import re
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from typing import Any

from ray import serve

from infra.storage import Files
from orchestrator.serving.access import Tickets
from orchestrator.serving.config import VideosConfig
from orchestrator.serving.jobs import Job, Jobs, Order
from orchestrator.serving.metrics import exposition

SILENT_S = 30.0
"""Seconds after which a replica that reports no more is left out."""
LATE_S = 6.0
"""Seconds, three reports, after which a replica that reports no more is taken to be gone."""
WAIT_S = 5.0
"""Seconds that a replica waits for a job before it asks again."""
STATE = re.compile(r"video_[0-9a-f]{32}\.json")
_log = logging.getLogger("ray.serve")


# A replica that waits for a job is one ongoing request, and may go unanswered at the end.
@serve.deployment(ray_actor_options={"num_cpus": 0}, max_ongoing_requests=1000, graceful_shutdown_timeout_s=1)
class Directory:
    """One for all replicas."""

    def __init__(self, config: VideosConfig) -> None:
        self.tickets = Tickets()
        self.reports: dict[str, tuple[float, list[Any]]] = {}
        self.files = Files(config.storage)
        self.jobs = Jobs(config, read_state(self.files))
        self._arrived = asyncio.Event()
        """Set when a job may be waiting."""
        self._changing = asyncio.Lock()
        """So that what is written of a job is written in order."""

    async def issue(self, who: str) -> str:
        return self.tickets.issue(who)

    async def redeem(self, ticket: str) -> str | None:
        return self.tickets.redeem(ticket)

    async def report(self, replica: str, metrics: list[Any]) -> None:
        now = time.monotonic()
        self.reports[replica] = (now, metrics)
        self.reports = {name: told for name, told in self.reports.items() if now - told[0] < SILENT_S}
        await self._tidy()

    async def runs(self, replica: str) -> bool:
        """Whether a replica reported of late."""
        when, _ = self.reports.get(replica, (-math.inf, []))
        return time.monotonic() - when < LATE_S

    async def metrics(self) -> bytes:
        """For Prometheus."""
        return exposition({name: metrics for name, (_, metrics) in self.reports.items()})

    # Videos, as requests ask for them.

    async def add_video(self, order: Order) -> Job | None:
        """As `Jobs.add`; OSError where the job cannot be kept."""
        async with self._changing:
            job = self.jobs.add(order)
            if job is not None:
                try:
                    await self._write(job)
                except OSError:
                    self.jobs.forget(job)
                    raise
                self._arrived.set()
        return job

    async def find_video(self, owner: str, id: str) -> Job | None:
        return self.jobs.find(owner, id)

    async def list_videos(
        self, owner: str, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[Job], bool] | None:
        return self.jobs.page(owner, after=after, limit=limit, ascending=ascending)

    async def remove_video(self, owner: str, id: str) -> bool:
        """Whether there was such a video; OSError where it cannot be deleted."""
        async with self._changing:
            job = self.jobs.find(owner, id)
            if job is not None:
                await self._forget(job)
        return job is not None

    # Jobs, as replicas ask for them.

    async def take_job(self, replica: str) -> Job | None:
        """As `Jobs.take`; none where none comes within WAIT_S."""
        deadline = time.monotonic() + WAIT_S
        while (job := await self._take(replica)) is None:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), deadline - time.monotonic())
            except TimeoutError:
                return None
        return job

    async def _take(self, replica: str) -> Job | None:
        async with self._changing:
            job = self.jobs.take(replica)
            if job is not None and not await self._keep(job):
                self.jobs.give_back(job.id, job.attempt)
                return None
        return job

    async def renew_job(self, id: str, attempt: int, progress: int) -> bool:
        return self.jobs.renew(id, attempt, progress)

    async def give_back_job(self, id: str, attempt: int) -> None:
        async with self._changing:
            await self._keep(self.jobs.give_back(id, attempt))

    async def finish_job(self, id: str, attempt: int, error: str | None) -> bool:
        """Whether the job still was that attempt's."""
        async with self._changing:
            job = self.jobs.finish(id, attempt, error)
            await self._keep(job)
        return job is not None

    async def _tidy(self) -> None:
        async with self._changing:
            for job in self.jobs.lapsed():
                await self._keep(job)
            for job in self.jobs.expired():
                try:
                    await self._forget(job)
                except OSError as error:
                    _log.warning("video %s cannot be deleted yet: %s", job.id, error)

    async def _keep(self, job: Job | None) -> bool:
        """Write what is known of a job; where that fails, memory alone has it until the next change."""
        if job is None:
            return False
        if job.status == "queued":
            self._arrived.set()
        try:
            await self._write(job)
        except OSError as error:
            _log.error("the state of video %s cannot be written: %s", job.id, error)
            return False
        return True

    async def _write(self, job: Job) -> None:
        state = io.BytesIO(json.dumps(asdict(job)).encode())
        await asyncio.to_thread(self.files.put, f"{job.id}.json", state)

    async def _forget(self, job: Job) -> None:
        # The state last, so that nothing is left that nobody knows of.
        for name in [*job.files, f"{job.id}.json"]:
            await asyncio.to_thread(self.files.delete, name)
        self.jobs.forget(job)


def read_state(files: Files) -> list[Job]:
    """The jobs that lie in storage."""
    names = [name for name in files.names() if STATE.fullmatch(name)]
    with ThreadPoolExecutor(16) as pool:
        return [job for job in pool.map(lambda name: _read(files, name), names) if job is not None]


def _read(files: Files, name: str) -> Job | None:
    try:
        with files.open(name) as file:
            body = json.loads(file.read())
        return Job(**{**body, "order": Order(**body["order"])})
    except (ValueError, TypeError, KeyError) as error:
        _log.error("%s says nothing of a video and is passed over: %s", name, error)
        return None
