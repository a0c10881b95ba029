"""`self-forcing submit`: run a command as a Ray job, follow it from here, and stop it.

The working directory is packed and sent; the cluster needs Ray and our dependencies, not this package. This
module knows the job server's address, and deliberately not what a command does with its settings.

Ray runs a job once. So it is this process that hands a failed job in again, with `--resume`.
"""

import asyncio
import logging
import os
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError
from ray.experimental import internal_kv
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from infra.provenance import carried
from orchestrator import cluster
from pipelines.command import RESUME
from pipelines.commands import COMMANDS
from pipelines.console import output, say
from pipelines.recipe import EXPERIMENTS, RECIPES, shipped

QUIET = (
    "ray.dashboard.modules.job.sdk",
    "ray.dashboard.modules.dashboard_sdk",
    "ray._private.runtime_env.packaging",
    "ray._private.runtime_env.working_dir",
)
BAD_INPUT, DETACHED, STOPPED = 2, 130, 143  # exit codes
GRACE_S = 600
"""Seconds that a job which is stopped has for its checkpoint, unless told otherwise."""
LOST_CONTACT_S = 60.0
"""How long the job server may be silent before following gives up."""


def command(_: None, options: Any) -> int:
    """Start a job, or follow or stop one; overrides go to the job's command unchanged.

    The recipe is a file below the working directory, or the name of one that ships with the package.
    ValueError, before anything is sent, for a command or a recipe that there is not.
    """
    if options.stop:
        return stop(options.stop, address=options.address)
    if options.follow:
        return follow(job_client(options.address), options.follow)
    recipe, working_dir = options.recipe, Path.cwd().resolve()
    if recipe is None:
        raise ValueError("submit needs a recipe to run, or --follow or --stop with the id of a job.")
    jobs = [name for name, each in COMMANDS.items() if RESUME in each.options]
    if options.command not in jobs:
        raise ValueError(f"{options.command!r} is no command for a job; use one of {', '.join(jobs)}.")
    folder = EXPERIMENTS if options.command == "experiment" else RECIPES
    path = shipped(recipe, folder).resolve()
    if path != (folder / f"{recipe}.yaml").resolve():
        if not path.is_relative_to(working_dir):
            where = f"recipe {recipe} lies outside {working_dir}"
            raise ValueError(f"{where}, which is all that a job gets: copy it there.")
        recipe = str(path.relative_to(working_dir))
    words = ["python", "-m", "pipelines.cli", options.command, recipe, *options.overrides]
    return run_job(
        words,
        address=options.address,
        working_dir=working_dir,
        wait=not options.no_wait,
        retries=options.retries,
        grace_s=options.grace,
    )


def run_job(
    words: Sequence[str],
    *,
    address: str | None,
    working_dir: Path,
    wait: bool = True,
    retries: int = 0,
    grace_s: int = GRACE_S,
) -> int:
    """Run the command line `words` as a job in a copy of `working_dir`, print its output; its exit code.

    A job that fails is handed in again, up to `retries` times, with `--resume` at the end; one that was
    stopped, or that refused its input (exit code 2), is not. The code is the command's own, 143 for a job
    that was stopped, 130 if following ended with Ctrl-C (the job runs on), 1 if the job never got to start or
    the cluster was lost, 0 at once unless `wait`. ValueError for a cluster that cannot be reached, refuses
    the token or refuses the job.
    """
    if retries and not wait:
        raise ValueError(
            "retries need someone who waits for the job: leave out --no-wait, or set retries to 0."
        )
    client = job_client(address)
    for attempt in range(retries + 1):
        resumed = ["--resume"] if attempt and "--resume" not in words else []
        job_id = _hand_in(client, shlex.join([*words, *resumed]), working_dir, grace_s)
        say(f"Submitted {job_id} to {client.get_address()}.")
        if not wait:
            say(_how_to(client, job_id))
            return 0
        code = follow(client, job_id)
        if code in (0, BAD_INPUT, STOPPED, DETACHED) or client.get_job_status(job_id) != JobStatus.FAILED:
            return code
        if attempt < retries:
            say(f"{job_id} failed with exit code {code}: retry {attempt + 1} of {retries}.")
    return code


def follow(client: JobSubmissionClient, job_id: str) -> int:
    """Print a job's output from its beginning until it ends, and return its exit code (see `run_job`).

    Ctrl-C ends the following, not the job, and prints how to come back to it and how to stop it.
    """
    _details(client, job_id)
    try:
        details = asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        say(f"\n{job_id} runs on without being followed. {_how_to(client, job_id)}")
        return DETACHED
    except ConnectionError:
        _complain(f"Lost contact with {client.get_address()}. {_how_to(client, job_id)}")
        return 1
    if details.status == JobStatus.SUCCEEDED:
        return 0
    if details.status == JobStatus.STOPPED:
        say(f"{job_id} was stopped.")
        return STOPPED
    if details.driver_exit_code is None:
        _complain(f"{job_id} did not run: {details.message}")
        return 1
    # A command that died of signal n has the code -n, which a shell calls 128 + n.
    return details.driver_exit_code if details.driver_exit_code > 0 else 128 - details.driver_exit_code


def stop(job_id: str, *, address: str | None = None) -> int:
    """Stop a job and wait until it has stopped. Returns 0, also if it had ended before, else 1.

    Ray sends SIGTERM, upon which a run ends with a checkpoint, and SIGKILL after the job's time of grace.
    """
    client = job_client(address)
    grace_s = int((_details(client, job_id).metadata or {}).get("grace_s", 3))
    client.stop_job(job_id)
    timeout_s = grace_s + 30.0
    deadline = time.monotonic() + timeout_s
    while not (status := client.get_job_status(job_id)).is_terminal():
        if time.monotonic() > deadline:
            _complain(f"{job_id} has not stopped within {timeout_s:g} s.")
            return 1
        time.sleep(0.2)
    say(f"{job_id} was stopped." if status == JobStatus.STOPPED else f"{job_id} had ended: {status}.")
    return 0


def job_client(address: str | None, *, timeout_s: float = 10.0) -> JobSubmissionClient:
    """The job server of the cluster at `address`: `http://host:port` of its dashboard, `host:port` of its
    control service, or `auto`. `None`: `RAY_API_SERVER_ADDRESS`, then `RAY_ADDRESS`, then a cluster here.

    Raises `ValueError` if nothing answers within `timeout_s` seconds or the token is refused.
    """
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS") or "auto"
    cluster.use_token()
    try:
        # Both would otherwise be retried for minutes.
        if "://" in address:
            url = urlsplit(address)
            port = url.port or {"https": 443, "http": 80}.get(url.scheme, 10001)
            socket.create_connection((url.hostname or "", port), timeout=timeout_s).close()
        else:
            address = cluster.probe(address, timeout_s)
        with _ray_address(address):
            return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise cluster.refused_token(f"the job server at {address}") from error
    except (OSError, RuntimeError, requests.RequestException) as error:
        raise ValueError(
            f"no Ray job server answers at {address}: give http://host:port of the cluster's dashboard "
            "(port 8265 by default), or host:port of its control service (GCS, port 6379 by default)."
        ) from error


@contextmanager
def _ray_address(address: str) -> Iterator[None]:
    """Ray's client lets these variables overrule the address that it is given; here they say the same.

    It also makes the cluster's control service that of the whole process, which may be the driver of another
    one: Ray would end it a minute after the first cluster's end.
    """
    name = "RAY_API_SERVER_ADDRESS"
    before = {name: os.environ[name]} if name in os.environ else {}
    driven = internal_kv.internal_kv_get_gcs_client()
    os.environ[name] = address
    try:
        yield
    finally:
        os.environ.pop(name, None)
        os.environ |= before
        if driven is not None:
            internal_kv._initialize_internal_kv(driven)


def _complain(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _hand_in(client: JobSubmissionClient, entrypoint: str, working_dir: Path, grace_s: int) -> str:
    # Lines as they are written, as wide as the terminal that shows them.
    shown = {"PYTHONUNBUFFERED": "1", "COLUMNS": str(shutil.get_terminal_size((100, 24)).columns)}
    # Read by the process that stops the job, which has the job's environment.
    grace = {"RAY_JOB_STOP_WAIT_TIME_S": str(grace_s)}
    environment = cluster.code_environment(working_dir) | {"env_vars": shown | grace | carried()}
    try:
        return client.submit_job(
            entrypoint=entrypoint, runtime_env=environment, metadata={"grace_s": str(grace_s)}
        )
    except (RuntimeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"the cluster did not take the job ({reason}): if {working_dir} is too large, name in "
            ".gitignore or .rayignore what the job does not need."
        ) from error


async def _follow(client: JobSubmissionClient, job_id: str) -> JobDetails:
    """Copy the job's output to stdout until it ends; a broken connection is made anew, no line twice."""
    printed = 0

    async def copy() -> None:
        seen = 0
        async for text in client.tail_job_logs(job_id):
            new = text[max(0, printed - seen) :]
            seen += len(text)
            show(new)

    def show(text: str) -> None:
        nonlocal printed
        output.write(text)
        output.flush()
        printed += len(text)

    last_contact = time.monotonic()
    while True:
        copying = asyncio.create_task(copy())
        try:
            while not copying.done():
                details = client.get_job_info(job_id)
                last_contact = time.monotonic()
                if details.status.is_terminal():
                    # The log's own end is not waited for: the server looks for it once a second.
                    show(client.get_job_logs(job_id)[printed:])
                    return details
                await asyncio.wait({copying}, timeout=0.5)
        except requests.RequestException as error:
            if time.monotonic() - last_contact > LOST_CONTACT_S:
                raise ConnectionError(str(error)) from error
        finally:
            copying.cancel()
            await asyncio.gather(copying, return_exceptions=True)
        await asyncio.sleep(0.5)


def _details(client: JobSubmissionClient, job_id: str) -> JobDetails:
    try:
        return client.get_job_info(job_id)
    except RuntimeError as error:
        raise ValueError(
            f"the cluster at {client.get_address()} has no job {job_id}: `ray job list` shows those that it "
            "has."
        ) from error


def _how_to(client: JobSubmissionClient, job_id: str) -> str:
    here = f"--address {client.get_address()}"
    return (
        f"Follow it with `self-forcing submit --follow {job_id} {here}`,"
        f" stop it with `self-forcing submit --stop {job_id} {here}`."
    )
