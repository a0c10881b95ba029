"""Killed at any moment and resumed, a run ends with the numbers of one that was left alone."""

import os
import random
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from infra import storage
from pipelines import cli
from tests import cluster
from tests.fixtures import TINY_RECIPE, furnished
from workers.model_directory import ModelDirectory

ITERATIONS, CHECKPOINT_EVERY = 16, 2
REPOSITORY = Path(__file__).parents[2]


def kill_after(saved: int, arguments: list[str], output: Path, moment: random.Random) -> None:
    """Run the command with a Ray of its own, and SIGKILL all its processes at some moment between two
    checkpoints.

    It comes after the one of iteration `saved`, within the time that it took from the one before to that.
    """
    mark = secrets.token_hex(8)
    with open(output.with_suffix(".log"), "w+") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, cluster.MARK: mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

        def wait_for(iteration: int) -> float:
            while newest(output) < iteration:
                assert driver.poll() is None, Path(log.name).read_text()
                time.sleep(0.005)
            return time.monotonic()

        try:
            began = wait_for(saved - CHECKPOINT_EVERY)
            interval = wait_for(saved) - began
            time.sleep(moment.random() * interval)
            driver.kill()
            assert driver.wait() == -9  # so it had not ended by itself
        finally:
            cluster.kill_marked(mark)


def newest(output: Path) -> int:
    """Iteration of the newest published checkpoint, whole or not."""
    return max((int(path.name) for path in output.glob("checkpoints/[0-9]*")), default=0)


def history(uri: str, run_id: str) -> dict[str, dict[int, float]]:
    """What MLflow knows of a run: values by step, timings aside."""
    client = MlflowClient(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("student/", "critic/"))]
    points = {name: client.get_metric_history(run_id, name) for name in names}
    assert all(len({point.step for point in of}) == len(of) for of in points.values())
    return {name: {point.step: point.value for point in of} for name, of in points.items()}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(reused_actors: None, tmp_path: Path) -> None:
    config = furnished(tmp_path)

    def arguments(output: str) -> list[str]:
        settings = {
            "root": tmp_path,
            "distill.output": output,
            "distill.iterations": ITERATIONS,
            "distill.checkpoint_every": CHECKPOINT_EVERY,
            "distill.sample_every": 0,
            # Ends before the run does, which goes on at the last rate.
            "distill.roles.student.engine.schedule": {"kind": "linear", "updates": 4, "final": 0.5},
            "distill.roles.critic.engine.schedule": {"kind": "cosine", "warmup": 3, "updates": 12},
        }
        return ["distill", str(TINY_RECIPE), *(f"--{name}={value}" for name, value in settings.items())]

    moment = random.Random(1)
    saved = moment.randrange(2 * CHECKPOINT_EVERY, ITERATIONS // 2, CHECKPOINT_EVERY)
    kill_after(saved, arguments("killed"), tmp_path / "killed", moment)
    found = storage.newest_complete(f"{tmp_path}/killed/checkpoints")
    assert found is not None
    start = storage.read_metadata(found)["done"]
    assert saved <= start < ITERATIONS
    assert not (tmp_path / "killed" / "model").exists()

    assert cli.main([*arguments("killed"), "--resume"]) == 0
    # A finished run's last state is kept, whatever the cadence: it may go on for longer.
    shorter = f"--distill.iterations={ITERATIONS - 2}"
    assert cli.main([*arguments("whole"), shorter]) == 0
    assert cli.main([*arguments("whole"), "--resume"]) == 0
    killed, whole = (ModelDirectory(tmp_path / name / "model") for name in ("killed", "whole"))
    assert list(killed.keys()) == list(whole.keys())
    for name in whole.keys():  # noqa: SIM118 (not a mapping)
        assert torch.equal(killed.get(name), whole.get(name)), name
    resumed, uninterrupted = (
        history(config.tracking.uri, model.card.lineage["distilled"]) for model in (killed, whole)
    )
    assert sorted(uninterrupted["critic/loss"]) == list(range(1, ITERATIONS + 1))
    assert len(uninterrupted["student/loss"]) == -(-ITERATIONS // config.distill.student_every)
    assert resumed.keys() == uninterrupted.keys()
    for name, values in uninterrupted.items():
        # What the killed process had not yet written is lost; what there is, is the same.
        assert {step for step in values if step > start} <= resumed[name].keys()
        assert resumed[name].items() <= values.items(), name
