"""A replica makes videos for later, in slots that no viewer needs."""

import asyncio
import logging
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from infra.storage import Files
from orchestrator.serving.encoders import Mp4
from orchestrator.serving.engine import StreamEnded, Viewer
from orchestrator.serving.jobs import Job
from orchestrator.serving.models import Served
from orchestrator.serving.problems import Problem
from orchestrator.serving.service import UNREACHABLE, Service

RENEW_S = 1.0
"""Seconds between two words to the directory about a job."""
LOOK_S = 0.5
"""Seconds between two looks for a free slot."""
GOODBYE_S = 15.0
"""Seconds that a replica that stops has for giving its jobs back; the directory may restart then."""
_log = logging.getLogger("ray.serve")


async def work(service: Service) -> None:
    """Make videos until cancelled; then their jobs are given back."""
    files = Files(service.config.videos.storage)
    making: set[asyncio.Task] = set()
    try:
        while True:
            if not _room(service):
                await asyncio.sleep(LOOK_S)
                continue
            try:
                job = await service.directory.take_job.remote(service.replica)
                video = job and await _begin(service, files, job)
            except UNREACHABLE as error:
                _log.warning("there are no videos to make for now: %s", error)
                await asyncio.sleep(RENEW_S)
                continue
            except Exception:
                # Nobody waits for this task: without it, videos would wait for ever.
                _log.exception("a video cannot be begun")
                await asyncio.sleep(RENEW_S)
                continue
            if video is not None:
                task = asyncio.create_task(video.make())
                making.add(task)
                task.add_done_callback(making.discard)
    finally:
        for task in making:
            task.cancel()
        await asyncio.gather(*making, return_exceptions=True)


def _room(service: Service) -> bool:
    """Whether there is a slot for a video. One stays free for the next viewer, where there are several."""
    try:
        service.models.check()
    except RuntimeError:
        return False
    engine = service.models.active.engine
    kept = 1 if service.config.slots > 1 else 0
    return engine.free > kept


async def _begin(service: Service, files: Files, job: Job) -> "Video | None":
    """The video in its slot; none where there is no slot after all, or no such video."""
    order = job.order
    try:
        served, viewer = await service.open(order.prompt, order.seed, order.frames, lambda _: _unchanged)
    except Problem as problem:
        if problem.status_code == 422:
            await service.directory.finish_job.remote(job.id, job.attempt, str(problem.detail))
        else:
            await service.directory.give_back_job.remote(job.id, job.attempt)
        return None
    return Video(service, files, job, served, viewer)


def _unchanged(frames: np.ndarray, last: bool) -> np.ndarray:
    """Frames are encoded here, off the thread that decodes for all viewers; never more than a few chunks."""
    return frames


@dataclass
class Video:
    """One that is being made."""

    service: Service
    files: Files
    job: Job
    served: Served
    viewer: Viewer
    frames: int = 0  # frames that are encoded

    async def make(self) -> None:
        holding = asyncio.create_task(self._hold())
        error = None
        try:
            with TemporaryDirectory(prefix="self-forcing-") as directory:
                path = Path(directory) / "video.mp4"
                await self._encode(path)
                await asyncio.to_thread(self._store, path)
        except asyncio.CancelledError:
            await self._give_back()
            raise
        except StreamEnded as failure:
            error = str(failure)
        except Exception:
            _log.exception("video %s cannot be written", self.job.id)
            error = "it could not be written."
        finally:
            self.viewer.close()
            holding.cancel()
        await self._finish(error)

    async def _encode(self, path: Path) -> None:
        """Write the file chunk by chunk."""
        file = Mp4(path, self.served.fps, self.served.mark)
        async for chunk in self.viewer.chunks():
            await asyncio.to_thread(file.write, chunk.data)
            self.frames += chunk.frames
        await asyncio.to_thread(file.close)

    def _store(self, path: Path) -> None:
        with open(path, "rb") as file:
            self.files.put(self.job.file, file)

    async def _hold(self) -> None:
        """Keep the lease, and stop where the job is gone: deleted, or given to another."""
        while True:
            await asyncio.sleep(RENEW_S)
            progress = 100 * self.frames // self.job.order.frames
            with suppress(*UNREACHABLE):
                if not await self.service.directory.renew_job.remote(self.job.id, self.job.attempt, progress):
                    self.viewer.outbox.put_nowait(StreamEnded("the job is gone."))
                    return

    async def _give_back(self) -> None:
        with suppress(TimeoutError, *UNREACHABLE):
            async with asyncio.timeout(GOODBYE_S):
                await self.service.directory.give_back_job.remote(self.job.id, self.job.attempt)

    async def _finish(self, error: str | None) -> None:
        # The directory may be on its way back; its lease ends where it takes too long.
        for _ in range(5):
            try:
                held = await self.service.directory.finish_job.remote(self.job.id, self.job.attempt, error)
            except UNREACHABLE:
                await asyncio.sleep(RENEW_S)
                continue
            if not held:
                await asyncio.to_thread(self.files.delete, self.job.file)
            return
