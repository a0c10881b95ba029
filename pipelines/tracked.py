"""What the stages of a lineage share: where their files lie, and the tracker of each."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from infra import storage
from infra.tracking import Tracker
from orchestrator.config import RunConfig
from pipelines.console import say


def located(command: str, config: RunConfig) -> RunConfig:
    """The config with absolute paths; says so where a job would write to a place that is deleted with it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(config.root).is_absolute():
        say(
            f"{command}: root {config.root!r} lies in this job's working directory, which is deleted some "
            "time after the job; give --root an absolute path that every node can read."
        )
    return config.located()


@contextmanager
def tracking(
    config: RunConfig, stage: str, output: str, parents: Mapping[str, str], resume_run_id: str | None = None
) -> Iterator[Tracker]:
    """A tracker of one stage, and where to look at it."""
    with Tracker(
        config.tracking,
        folder=Path(output),
        run_name=f"{stage} {output.removeprefix(f'{config.root}/').removeprefix('outputs/')}",
        stage=stage,
        params=asdict(config),
        parents=parents,
        resume_run_id=resume_run_id,
    ) as tracker:
        say(f"{stage}: MLflow run {tracker.run_id}. {tracker.how_to_open()}")
        yield tracker


def run_id_of(newest: str | None) -> str | None:
    """The tracking run that a checkpoint belongs to."""
    return storage.read_metadata(newest).get("run_id") if newest else None
