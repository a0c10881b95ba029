"""Killed at any moment and resumed, a run ends with the numbers of one that was left alone."""

import os
import random
import re
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from orchestrator import checkpoint
from pipelines import cli
from tests import cluster
from tests.fixtures import TINY_RECIPE, furnished
from workers.model_directory import ModelDirectory

ITERATIONS, CHECKPOINT_EVERY = 40, 4
REPOSITORY = Path(__file__).parents[2]


def kill_at(update: int, arguments: list[str], output: Path) -> int:
    """Run the command with a Ray of its own, and SIGKILL all its processes once it has recorded `update`; the last one recorded."""
    mark = secrets.token_hex(8)
    with open(output.with_suffix(".log"), "w+") as log:
        driver = subprocess.Popen(
            [sys.executable, "-m", "pipelines.cli", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", cluster.MARK: mark},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while recorded(output) < update:
                assert driver.poll() is None, Path(log.name).read_text()
                time.sleep(0.01)
            driver.kill()
        finally:
            cluster._kill_marked(mark)
        assert driver.wait() == -9
    return recorded(output)


def recorded(output: Path) -> int:
    """The last iteration whose losses have left the driver."""
    steps = [0]
    for spool in output.glob("tracking/*/spool.jsonl"):
        steps += map(int, re.findall(r'"step": (\d+), "values": {"(?!system)', spool.read_text()))
    return max(steps)


def history(uri: str, run_id: str) -> dict[str, dict[int, float]]:
    """What MLflow knows of a run: values by step, timings aside."""
    client = MlflowClient(uri)
    names = [name for name in client.get_run(run_id).data.metrics if name.startswith(("student/", "critic/"))]
    points = {name: client.get_metric_history(run_id, name) for name in names}
    assert all(len({point.step for point in of}) == len(of) for of in points.values())
    return {name: {point.step: point.value for point in of} for name, of in points.items()}


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_bit(ray_cluster: object, tmp_path: Path) -> None:
    config = furnished(tmp_path)

    def arguments(output: str) -> list[str]:
        settings = {
            "root": tmp_path,
            "distill.output": output,
            "distill.iterations": ITERATIONS,
            "distill.checkpoint_every": CHECKPOINT_EVERY,
            "distill.sample_every": 0,
        }
        return ["distill", str(TINY_RECIPE), *(f"--{name}={value}" for name, value in settings.items())]

    wanted = random.Random(0).randrange(CHECKPOINT_EVERY + 1, ITERATIONS // 2)
    died_after = kill_at(wanted, arguments("killed"), tmp_path / "killed")
    assert wanted <= died_after < ITERATIONS
    found = checkpoint.newest(f"{tmp_path}/killed/checkpoints")
    assert found is not None
    assert died_after - 2 * CHECKPOINT_EVERY < found[1]["iteration"] <= died_after + 1
    assert not (tmp_path / "killed" / "model").exists()

    assert cli.main([*arguments("killed"), "--resume"]) == 0
    assert cli.main(arguments("whole")) == 0
    killed, whole = (ModelDirectory(tmp_path / name / "model") for name in ("killed", "whole"))
    assert list(killed.keys()) == list(whole.keys())
    for name in whole.keys():  # noqa: SIM118 (not a mapping)
        assert torch.equal(killed.get(name), whole.get(name)), name
    resumed, uninterrupted = (
        history(config.tracking.uri, model.card.lineage["distilled"]) for model in (killed, whole)
    )
    assert sorted(uninterrupted["critic/loss"]) == list(range(1, ITERATIONS + 1))
    assert len(uninterrupted["student/loss"]) == -(-ITERATIONS // config.distill.student_every)
    assert resumed == uninterrupted
