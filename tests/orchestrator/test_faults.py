"""A run that loses workers goes on, and ends with the weights of one that lost none."""

import json
from collections.abc import Callable
from pathlib import Path
from signal import SIGKILL, SIGSTOP
from typing import Any

import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient

from orchestrator import cluster
from orchestrator.config import RunConfig
from orchestrator.roles import Roles
from orchestrator.worker_group import WorkerGroup
from pipelines.selection import Selection
from tests.chaos import Moment, injected, pid, send
from tests.fixtures import furnished, write_real
from tests.orchestrator.test_resume import history
from workers.model_directory import ModelDirectory

pytestmark = pytest.mark.slow

SETTINGS: tuple[str, ...] = (
    "iterations=10",
    "student_every=2",
    "checkpoint_every=4",
    "sample_every=0",
    "faults.silence_s=2",
    "faults.backoff_s=0",
)


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    model = ModelDirectory(root / name / "model")
    return {name: model.get(name) for name in model.keys()}  # noqa: SIM118 (not a mapping)


def tracked(config: RunConfig, name: str) -> dict[str, dict[int, float]]:
    """What MLflow has of the run with that output."""
    client = MlflowClient(config.tracking.uri)
    places = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(places, f"attributes.run_name = 'distill {name}'")
    return history(str(config.tracking.uri), run.info.run_id)


def test_four_faults_change_no_number(distilled: Callable[..., str], tmp_path: Path) -> None:
    config = furnished(tmp_path)
    distilled(*SETTINGS, "output=whole")
    stopped = []

    def stop(group: WorkerGroup) -> None:
        stopped.append(pid(group, 0))
        send(SIGSTOP)(group)

    faults = {
        Moment("critic", "update", 1): stop,  # which nobody has asked for a sign of life yet
        Moment("teacher", "score", 4): send(SIGKILL),
        Moment("student", "pullback", 6): send(SIGKILL),
        Moment("critic", "write", 8): send(SIGKILL),
    }
    with injected(faults) as left:
        said = distilled(*SETTINGS, "output=disturbed")
    assert not left
    assert said.count("FAULT") == 4
    assert not list((tmp_path / "disturbed" / "checkpoints").glob(".*.tmp-*"))
    # Ray asks a process to end, which one that is stopped does not hear.
    assert not psutil.pid_exists(stopped[0]) or psutil.Process(stopped[0]).status() == psutil.STATUS_ZOMBIE
    whole, disturbed = weights(tmp_path, "whole"), weights(tmp_path, "disturbed")
    assert all(torch.equal(disturbed[name], tensor) for name, tensor in whole.items())
    assert tracked(config, "disturbed") == tracked(config, "whole")


@pytest.mark.by_hand
def test_a_lost_replica_is_made_anew_and_rolls_out_with_the_weights_of_now(
    distilled: Callable[..., str], tmp_path: Path
) -> None:
    furnished(tmp_path)
    settings = (*SETTINGS, "replay=true", "roles.rollout.ranks=1", "roles.rollout.cpus=0.5")
    distilled(*settings, "output=whole")
    with injected({Moment("rollout", "rollout", 5): send(SIGKILL)}) as left:
        said = distilled(*settings, "output=disturbed")
    assert not left and said.count("FAULT") == 1
    whole, disturbed = weights(tmp_path, "whole"), weights(tmp_path, "disturbed")
    assert all(torch.equal(disturbed[name], tensor) for name, tensor in whole.items())


@pytest.mark.by_hand
def test_a_lost_process_costs_one_update_where_snapshots_are_in_memory(
    distilled: Callable[..., str], tmp_path: Path
) -> None:
    furnished(tmp_path)
    rare = [each for each in SETTINGS if not each.startswith("checkpoint_every")]
    settings = (*rare, "checkpoint_every=100", "faults.snapshot_every=1")
    distilled(*settings, "output=whole")
    with injected({Moment("critic", "update", 7): send(SIGKILL)}) as left:
        said = distilled(*settings, "output=disturbed")
    assert not left and "found after 7 iterations" in said and "going on from 7 after" in said
    whole, disturbed = weights(tmp_path, "whole"), weights(tmp_path, "disturbed")
    assert all(torch.equal(disturbed[name], tensor) for name, tensor in whole.items())


@pytest.mark.by_hand
def test_the_same_fault_twice_at_an_update_ends_the_run_with_an_account(
    distilled: Callable[..., str], tmp_path: Path
) -> None:
    furnished(tmp_path)
    faults = {Moment("critic", "update", 5, nth): send(SIGKILL) for nth in (1, 2)}
    with injected(faults) as left:
        said = distilled(*SETTINGS, "output=ended", code=1)
    assert not left
    assert "update 5 failed twice in the same way: a critic rank was lost" in said
    assert "--resume continues from the newest checkpoint" in said
    distilled(*SETTINGS, "output=ended", "--resume")
    distilled(*SETTINGS, "output=whole")
    whole, ended = weights(tmp_path, "whole"), weights(tmp_path, "ended")
    assert all(torch.equal(ended[name], tensor) for name, tensor in whole.items())


@pytest.mark.by_hand
def test_groups_shrink_where_a_node_is_lost_and_grow_again_at_a_checkpoint(
    distilled: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnished(tmp_path)
    ranks = ("roles.student.ranks=2", "roles.critic.ranks=2")
    fewer = ("roles.student.min_ranks=1", "roles.critic.min_ranks=1")
    distilled(*SETTINGS, *ranks, "output=whole")
    lost, sizes = [False], []

    def room(self: Roles) -> dict[str, list[Any]]:
        return {role: each[:1] if lost[0] else list(each) for role, each in self.options.items()}

    def node_is_lost(group: WorkerGroup) -> None:
        lost[0] = True
        send(SIGKILL, rank=1)(group)

    def node_is_back(group: WorkerGroup) -> None:
        sizes.append(len(group.actors))
        lost[0] = False

    monkeypatch.setattr(Roles, "room", room)
    faults = {
        Moment("student", "pullback", 2): node_is_lost,
        Moment("critic", "update", 3): node_is_back,
    }
    with injected(faults) as left:
        said = distilled(*SETTINGS, *ranks, *fewer, "output=shrunk")
    assert not left and sizes == [1]
    assert "with 1 student, 1 teacher, 1 critic, until nodes are back" in said
    whole, shrunk = weights(tmp_path, "whole"), weights(tmp_path, "shrunk")
    for name, tensor in whole.items():
        torch.testing.assert_close(shrunk[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.by_hand
def test_a_lost_measurement_is_made_again(
    distilled: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = furnished(tmp_path)
    write_real(Path(config.data.held_out), config)
    measure, lost = Selection._measure, []

    def measured_and_lost(selection: Selection, done: int) -> None:
        measure(selection, done)
        if not lost and selection.measurer is not None:
            lost.append(done)
            ray.kill(selection.measurer.actors[0])

    monkeypatch.setattr(Selection, "_measure", measured_and_lost)
    watched = ("selection.every=2", "selection.by=out_of_range_overall", "selection.videos=8")
    said = distilled(*SETTINGS, "iterations=4", *watched, "selection.cpus=0.5", "--evaluate.suite=video")
    assert lost == [2] and "iteration 2 is measured again" in said
    numbers = json.loads((tmp_path / "outputs/distilled/selection/numbers.json").read_text())
    assert list(numbers["measured"]) == ["2", "4"]


def test_a_node_that_is_drained_makes_a_checkpoint_once(
    distilled: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    furnished(tmp_path)
    here = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(cluster.Draining, "EVERY_S", 0.0)
    monkeypatch.setattr(cluster, "draining_nodes", lambda: {here, "another"})
    said = distilled("iterations=3", "checkpoint_every=100", "sample_every=0", "keep=9")
    assert said.count(f"node {here} is being drained: a checkpoint is made") == 1
    made = sorted(path.name for path in (tmp_path / "outputs/distilled/checkpoints").iterdir())
    assert made == ["0000001", "0000003"]
