"""Videos that are made whole: which wait, which are being made, and which are there.

Replicas ask for work. Who gets a job holds it under a lease and renews it; where the lease ends, the job
waits again, for another replica. Its seed and its prompt determine the video, whoever makes it.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal
from uuid import uuid4

from orchestrator.serving.config import VideosConfig

LEASE_S = 10.0
"""Seconds that a replica holds a job without a word."""
FAILURES = 3
"""Failures after which a job is not begun again."""


@dataclass(frozen=True)
class Order:
    """What was asked for, and by whom."""

    owner: str
    model: str
    prompt: str
    seed: int
    frames: int
    seconds: str
    size: str


@dataclass(frozen=True)
class Job:
    """One video. Times are in seconds since 1970."""

    id: str
    order: Order
    created_at: float
    status: Literal["queued", "in_progress", "completed", "failed"] = "queued"
    attempt: int = 0  # times that it was taken; tells who holds it from who held it before
    failures: int = 0
    replica: str | None = None  # who makes or made it
    progress: int = 0  # in percent
    completed_at: float | None = None
    expires_at: float | None = None
    error: str | None = None  # why it failed, or the last attempt did

    @property
    def ended(self) -> bool:
        return self.status in ("completed", "failed")

    @property
    def files(self) -> list[str]:
        """Names of the MP4 files of all attempts: one whose lease has ended may still write its own."""
        return [f"{self.id}.{attempt}.mp4" for attempt in range(1, self.attempt + 1)]

    @property
    def file(self) -> str:
        """Name of this attempt's."""
        return self.files[-1]


class Jobs:
    """All of them. Whoever changes a job gets it as it then is, to keep it in storage."""

    def __init__(
        self, config: VideosConfig, kept: Iterable[Job] = (), clock: Callable[[], float] = time.time
    ):
        """`kept` are the jobs that were there before: those in progress may still be, and get a lease."""
        self._config = config
        self._clock = clock
        self._jobs = {job.id: job for job in sorted(kept, key=lambda job: job.created_at)}
        now = clock()
        self._leases = {job.id: now + LEASE_S for job in self._jobs.values() if job.status == "in_progress"}

    def add(self, order: Order) -> Job | None:
        """A new job; none where its owner has too many that have not ended."""
        unfinished = [job for job in self._jobs.values() if job.order.owner == order.owner and not job.ended]
        if len(unfinished) >= self._config.unfinished:
            return None
        return self._put(Job(f"video_{uuid4().hex}", order, self._clock()))

    def find(self, owner: str, id: str) -> Job | None:
        job = self._jobs.get(id)
        return job if job is not None and job.order.owner == owner else None

    def page(
        self, owner: str, *, after: str | None, limit: int, ascending: bool
    ) -> tuple[list[Job], bool] | None:
        """Up to `limit` jobs by age after `after`, and whether there are more; none if that is unknown."""
        jobs = [job for job in self._jobs.values() if job.order.owner == owner]
        if not ascending:
            jobs.reverse()
        if after is not None:
            ids = [job.id for job in jobs]
            if after not in ids:
                return None
            jobs = jobs[ids.index(after) + 1 :]
        return jobs[:limit], len(jobs) > limit

    def forget(self, job: Job) -> None:
        """Let go of a job; who is making it notices when its lease is not renewed."""
        self._leases.pop(job.id, None)
        del self._jobs[job.id]

    # What replicas ask.

    def take(self, replica: str) -> Job | None:
        """The job that has waited longest, under a lease."""
        for job in self._jobs.values():
            if job.status == "queued":
                self._leases[job.id] = self._clock() + LEASE_S
                attempt = job.attempt + 1
                return self._put(replace(job, status="in_progress", attempt=attempt, replica=replica))
        return None

    def renew(self, id: str, attempt: int, progress: int) -> bool:
        """Whether the job is still that attempt's."""
        job = self._held(id, attempt)
        if job is None:
            return False
        self._leases[id] = self._clock() + LEASE_S
        self._put(replace(job, progress=max(job.progress, min(progress, 99))))
        return True

    def give_back(self, id: str, attempt: int) -> Job | None:
        """Have a job wait again that could not be begun or has to be left, which is not held against it."""
        job = self._held(id, attempt)
        return job and self._put(self._wait(job))

    def finish(self, id: str, attempt: int, error: str | None = None) -> Job | None:
        """The job with its video, or after an attempt that failed; none where it is another attempt's."""
        job = self._held(id, attempt)
        if job is None:
            return None
        if error is not None:
            return self._fail(job, error)
        return self._put(self._end(replace(job, status="completed", progress=100, error=None)))

    # What time does.

    def lapsed(self) -> list[Job]:
        """Jobs whose replica was not heard of: they wait again, or have failed."""
        now = self._clock()
        ended = [id for id, until in self._leases.items() if until <= now]
        return [self._fail(self._jobs[id], f"replica {self._jobs[id].replica} was lost.") for id in ended]

    def expired(self) -> list[Job]:
        """Jobs whose time has come; forget them once their files are deleted."""
        now = self._clock()
        return [job for job in self._jobs.values() if job.expires_at is not None and job.expires_at <= now]

    def _held(self, id: str, attempt: int) -> Job | None:
        job = self._jobs.get(id)
        return job if job is not None and id in self._leases and job.attempt == attempt else None

    def _fail(self, job: Job, error: str) -> Job:
        job = replace(job, failures=job.failures + 1, error=error)
        if job.failures < FAILURES:
            return self._put(self._wait(job))
        error = f"it could not be made in {FAILURES} attempts; the last one: {error}"
        return self._put(self._end(replace(job, status="failed", error=error)))

    def _wait(self, job: Job) -> Job:
        del self._leases[job.id]
        return replace(job, status="queued", progress=0)

    def _end(self, job: Job) -> Job:
        del self._leases[job.id]
        now = self._clock()
        return replace(job, completed_at=now, expires_at=now + self._config.expire_s)

    def _put(self, job: Job) -> Job:
        self._jobs[job.id] = job
        return job
