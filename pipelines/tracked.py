"""What the stages of a lineage share: how they start, where their files lie, and the tracker of each."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from infra import storage
from infra.settings import part
from infra.tracking import Tracker
from orchestrator import run_state
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from orchestrator.run_state import RunState
from orchestrator.stages import SelectionConfig
from pipelines.console import say
from pipelines.import_model import adopt
from pipelines.recipe import find, settings, unknown
from pipelines.stopping import at_once
from workers.model_directory import ModelDirectory

Ready = Callable[[Cluster], None]
"""A stage of which all that can be checked is checked: it runs on a connected cluster."""


class Check(Protocol):
    """Checks all that a stage starts from, and raises ValueError before anything starts."""

    def __call__(self, config: RunConfig, *, resume: bool, allow: Sequence[str] = ()) -> Ready: ...


def on_cluster(stage: str, check: Check, config: RunConfig, options: Any) -> None:
    """A command that runs one stage."""
    config = located(stage, config)
    with exclusive(config, stage):
        run = check(config, resume=options.resume, allow=allowed(options))
        with connect(options.address) as cluster:
            run(cluster)


@contextmanager
def exclusive(config: RunConfig, stage: str) -> Iterator[None]:
    """No other run writes to the stage's output inside the block; StorageError where one does."""

    def lost(why: str) -> None:
        say(f"{stage}: {why}, as this process gave no sign of life for long; it stops.")
        at_once()

    with storage.owned(getattr(config, stage).output, stage, lost):
        yield


def allowed(options: Any) -> list[str]:
    """The settings that `--allow-change` names; ValueError where there is no such setting."""
    names = options.allow_change or []
    for name in names:
        if find(RunConfig, name) is None:
            raise unknown(name, settings(RunConfig), " (in --allow-change)")
    return names


def opened(config: RunConfig, stage: run_state.Stage, *, resume: bool, allow: Sequence[str]) -> RunState:
    """Where the run of this stage stands; what a person should know of it is said."""
    state = run_state.open_run(config, stage, resume=resume, allow=allow)
    for note in state.notes:
        say(f"{stage}: {note}")
    return state


def is_done(config: RunConfig, stage: run_state.Stage, model: str, allow: Sequence[str] = ()) -> bool:
    """Whether the stage's model is there: of a run that this config would not take further, or of none.

    ValueError where it is of a run that was another one.
    """
    output = getattr(config, stage).output
    if not storage.is_complete(model):
        return False
    if model != f"{output}/model" or not storage.newest_complete(f"{output}/checkpoints"):
        return True
    run_state.open_run(config, stage, resume=True, allow=allow)
    name, total = run_state.total_of(config, stage)
    made = ModelDirectory(model).card.recipe.get(stage, {})
    chosen = SelectionConfig(**made.get("selection", {})).choice
    as_wanted = stage != "distill" or chosen == config.distill.selection.choice
    return made.get(name) == total and as_wanted


def located(command: str, config: RunConfig) -> RunConfig:
    """The config with absolute paths, and with models of ours where it names another tool's; says so where a
    job would write to a place that is deleted with it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(config.root).is_absolute():
        say(
            f"{command}: root {config.root!r} lies in this job's working directory, which is deleted some "
            "time after the job; give --root an absolute path that every node can read."
        )
    config = adopt(config.located())
    with part("video"):
        config.video.check()
    return config


@contextmanager
def tracking(
    config: RunConfig, stage: str, output: str, parents: Mapping[str, str], state: RunState | None = None
) -> Iterator[Tracker]:
    """A tracker of one stage, and where to look at it; with a `state` it goes on with that run's."""
    stretches = state.stretches if state else ()
    with Tracker(
        config.tracking,
        folder=storage.scratch(output),
        run_name=f"{stage} {output.removeprefix(f'{config.root}/').removeprefix('outputs/')}",
        stage=stage,
        params=asdict(config),
        parents=parents,
        tags={"stretches": json.dumps(stretches)} if stretches else {},
        resume_run_id=state.run_id if state else None,
    ) as tracker:
        say(f"{stage}: MLflow run {tracker.run_id}. {tracker.how_to_open()}")
        yield tracker
