"""What becomes of a job, by an injected clock; and of all jobs when the directory is lost."""

import asyncio
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infra.storage import Files
from orchestrator.serving.config import VideosConfig
from orchestrator.serving.directory import Directory
from orchestrator.serving.jobs import FAILURES, LEASE_S, Job, Jobs, Order
from tests.orchestrator.serving.conftest import Clock

ORDER = Order(owner="one", model="m", prompt="a six", seed=1, frames=8, seconds="1", size="256x256")
CONFIG = VideosConfig(expire_s=100, unfinished=3)


@pytest.fixture
def jobs(clock: Clock) -> Jobs:
    return Jobs(CONFIG, clock=clock)


def add(jobs: Jobs, owner: str = "one") -> Job:
    job = jobs.add(replace(ORDER, owner=owner))
    assert job is not None
    return job


def take(jobs: Jobs, replica: str = "a") -> Job:
    job = jobs.take(replica)
    assert job is not None
    return job


def test_a_job_is_made_once_and_kept_for_a_while(jobs: Jobs, clock: Clock) -> None:
    first, second = add(jobs), add(jobs)
    taken = take(jobs)
    assert (taken.id, taken.status, taken.attempt) == (first.id, "in_progress", 1)
    assert take(jobs).id == second.id and jobs.take("a") is None
    assert jobs.renew(first.id, 1, 40) and jobs.renew(first.id, 1, 30)
    found = jobs.find("one", first.id)
    assert found is not None and found.progress == 40
    clock.now += 5
    done = jobs.finish(first.id, 1)
    assert done is not None and (done.status, done.progress, done.file) == (
        "completed",
        100,
        f"{first.id}.1.mp4",
    )
    assert (done.created_at, done.completed_at, done.expires_at) == (1000, 1005, 1105)
    assert jobs.expired() == [] and not jobs.renew(first.id, 1, 50)
    clock.now += 100
    assert jobs.expired() == [done]
    jobs.forget(done)
    assert jobs.find("one", first.id) is None


def test_a_job_whose_replica_is_silent_goes_to_another(jobs: Jobs, clock: Clock) -> None:
    job = add(jobs)
    take(jobs, "a")
    clock.now += LEASE_S - 1
    assert jobs.renew(job.id, 1, 50) and jobs.lapsed() == []
    clock.now += LEASE_S
    (waiting,) = jobs.lapsed()
    assert (waiting.status, waiting.progress) == ("queued", 0) and jobs.lapsed() == []
    again = take(jobs, "b")
    assert (again.attempt, again.replica, again.file) == (2, "b", f"{job.id}.2.mp4")
    # The first one was only slow; it is told, and what it made is its own.
    assert (
        not jobs.renew(job.id, 1, 90) and jobs.finish(job.id, 1) is None and jobs.give_back(job.id, 1) is None
    )
    done = jobs.finish(job.id, 2)
    assert done is not None and done.status == "completed" and done.error is None


def test_a_job_that_fails_again_and_again_is_failed(jobs: Jobs, clock: Clock) -> None:
    job = add(jobs)
    for attempt in range(1, FAILURES):
        take(jobs)
        failed = jobs.finish(job.id, attempt, "the model failed.")
        assert failed is not None and failed.status == "queued"
    take(jobs, "c")
    clock.now += LEASE_S
    (failed,) = jobs.lapsed()
    assert failed.status == "failed" and jobs.take("a") is None
    assert failed.error == "it could not be made in 3 attempts; the last one: replica c was lost."
    clock.now += 100
    assert jobs.expired() == [failed]


def test_a_job_that_is_given_back_has_lost_nothing(jobs: Jobs) -> None:
    first, second = add(jobs), add(jobs)
    for attempt in range(1, 2 * FAILURES):
        assert take(jobs).id == first.id
        given = jobs.give_back(first.id, attempt)
        assert given is not None and given.status == "queued" and given.failures == 0
    assert take(jobs).id == first.id and take(jobs).id == second.id


def test_who_asks_sees_no_others_and_may_not_ask_for_too_much(jobs: Jobs) -> None:
    mine, theirs = [add(jobs) for _ in range(3)], add(jobs, "two")
    assert jobs.add(ORDER) is None
    assert jobs.find("two", mine[0].id) is None
    assert jobs.page("two", after=None, limit=9, ascending=True) == ([theirs], False)
    assert jobs.page("two", after=mine[0].id, limit=9, ascending=True) is None
    take(jobs)
    jobs.forget(mine[0])
    assert not jobs.renew(mine[0].id, 1, 10)
    add(jobs)


def test_pages_are_by_age(jobs: Jobs) -> None:
    ids = [add(jobs).id for _ in range(3)]

    def page(**about: Any) -> tuple[list[str], bool]:
        found = jobs.page("one", **{"after": None, "limit": 2, "ascending": False, **about})
        assert found is not None
        return [job.id for job in found[0]], found[1]

    assert page() == ([ids[2], ids[1]], True)
    assert page(after=ids[1]) == ([ids[0]], False) == page(limit=1, after=ids[1])
    assert page(ascending=True, limit=3) == (ids, False)
    assert page(after=ids[0]) == ([], False)


# The directory, without its actor.


def make_desk(location: str, clock: Clock) -> Any:
    directory = Directory.func_or_class(replace(CONFIG, storage=location))  # type: ignore[attr-defined]
    directory.jobs._clock = clock
    return directory


@pytest.mark.parametrize("where", ["directory", "s3"])
def test_jobs_outlive_the_desk(
    tmp_path: Path, s3_bucket: Callable[[str], str], clock: Clock, where: str
) -> None:
    location = str(tmp_path) if where == "directory" else s3_bucket("directory")
    files = Files(location)

    async def first() -> list[Job]:
        directory = make_desk(location, clock)
        jobs = [await directory.add_video(ORDER) for _ in range(3)]
        for _ in range(2):
            job = await directory.take_job("a")
        files.put(job.file, io.BytesIO(b"video"))
        assert await directory.finish_job(job.id, job.attempt, None)
        return jobs

    async def second(jobs: list[Job]) -> None:
        files.put(f"video_{'0' * 32}.json", io.BytesIO(b"{"))
        files.put("notes.txt", io.BytesIO(b"somebody's"))
        directory = make_desk(location, clock)
        found = [await directory.find_video("one", job.id) for job in jobs]
        assert [job.status for job in found] == ["in_progress", "completed", "queued"]
        # The replica that was at it has not noticed anything.
        assert await directory.renew_job(jobs[0].id, 1, 50)
        assert (await directory.take_job("b")).id == jobs[2].id
        assert await directory.remove_video("one", jobs[2].id) and not await directory.remove_video(
            "one", jobs[2].id
        )
        assert f"{jobs[1].id}.1.mp4" in files.names()
        clock.now += 10_000
        await directory.report("a", [])
        # What was in progress waits again; what was finished is gone, with its file.
        assert (await directory.take_job("b")).attempt == 2
        assert await directory.find_video("one", jobs[1].id) is None
        assert files.names() == ["notes.txt", f"video_{'0' * 32}.json", f"{jobs[0].id}.json"]

    asyncio.run(second(asyncio.run(first())))


def test_whoever_asks_for_work_waits_for_it(tmp_path: Path, clock: Clock) -> None:
    async def work() -> None:
        directory = make_desk(str(tmp_path), clock)
        waiting = [asyncio.create_task(directory.take_job(replica)) for replica in "ab"]
        await asyncio.sleep(0)
        jobs = [await directory.add_video(ORDER) for _ in range(2)]
        assert {job.id for job in await asyncio.gather(*waiting)} == {job.id for job in jobs}

    asyncio.run(work())


def test_a_job_that_cannot_be_kept_is_not_taken_on(tmp_path: Path, clock: Clock) -> None:
    async def work() -> None:
        directory = make_desk(str(tmp_path / "videos"), clock)
        (tmp_path / "videos").write_text("in the way")
        with pytest.raises(OSError):
            await directory.add_video(ORDER)
        assert directory.jobs.take("a") is None

    asyncio.run(work())
