"""A run that is made to diverge is told of and ended, a sound one is not; watching changes neither."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from infra import storage
from tests.fixtures import furnished, write_real
from workers.model_directory import ModelDirectory


@pytest.mark.slow
@pytest.mark.by_hand
def test_alarms_end_a_run_that_diverges_and_are_silent_on_a_sound_one(
    distilled: Callable[..., str], tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    write_real(Path(config.data.held_out), config)

    def distill(output: str, *more: str, code: int = 0) -> str:
        return distilled(
            f"output={output}", "iterations=8", "student_every=1", "sample_every=0", "checkpoint_every=2",
            "keep=9", "alarms.updates=2", "alarms.directions=true", *more, code=code,
        )  # fmt: skip

    def numbers(output: str) -> dict:
        return json.loads((tmp_path / output / "watch" / "numbers.json").read_text())

    # Models without training are pale and far from any video, so what is watched of latents is given room.
    room = "alarms.ranges={latent_std_ratio: [0, 9], latent_energy_ratio: [0, 99], latent_outside: [0, 1]}"
    said = distill("sound", room)
    assert "latents are compared with" in said and "held-out videos" in said and "WARNING" not in said
    found = numbers("sound")
    assert [row["iteration"] for row in found["updates"]] == list(range(1, 9))
    last = found["updates"][-1]
    assert {
        "latent_std_ratio",
        "latent_std_kept",
        "latent_outside",
        "score_gap_growth",
        "average_distance",
    } <= set(last)
    assert {"score_gap", "learning_rate", "update_cosine"} <= set(last) and -1 <= last["update_cosine"] <= 1
    bands = [name for row in found["updates"] for name in row if name.startswith("critic_flow_")]
    assert bands and {name.rpartition("_")[2] for name in bands} <= {"low", "middle", "high"}
    table = (tmp_path / "sound" / "watch" / "numbers.md").read_text()
    assert table.count("\n| ") == 2 + 8 and "held-out videos" in table
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, "watch/latent_std_kept")
    assert {point.step: point.value for point in history} == {
        row["iteration"]: row["latent_std_kept"] for row in found["updates"]
    }

    # The same run, its rate so high that its weights run away: a warning, or the end.
    fast = "roles.student.engine.learning_rate=0.3"
    said = distill("warned", room, fast)
    assert (
        "WARNING: iteration " in said and "for 2 student updates; lower distill.roles.student.engine" in said
    )
    said = distill("stopped", room, fast, "alarms.action=stop", code=1)
    assert "for 2 student updates; lower distill.roles.student.engine.learning_rate" in said
    rate = "distill.roles.student.engine.learning_rate"
    assert f"as in --{rate} VALUE --allow-change {rate} --resume" in said
    rows = numbers("stopped")["updates"]
    # What led to the first bad update is moved out of the way: only what is sound is left to go on from.
    first = rows[-2]["iteration"]
    left, moved = (
        [int(path.name) for path in (tmp_path / "stopped" / name).glob("[0-9]*")]
        for name in ("checkpoints", "diverging")
    )
    assert sorted(left + moved) == list(range(2, rows[-1]["iteration"], 2))
    assert all(each < first - 1 for each in left) and all(each >= first - 1 for each in moved)
    assert 2 <= len(rows) < 8 and rows == numbers("warned")["updates"][: len(rows)]
    assert not storage.is_complete(tmp_path / "stopped" / "model")

    # Alarms are no part of what a run is: it goes on under others, and what it ends with is the same.
    distill("stopped", room, fast, "--resume", "alarms.updates=3", "alarms.action=off")
    warned, stopped = (ModelDirectory(tmp_path / name / "model") for name in ("warned", "stopped"))
    for name in warned.keys():  # noqa: SIM118 (not a mapping)
        assert torch.equal(warned.get(name), stopped.get(name)), name
    assert [row["iteration"] for row in numbers("stopped")["updates"]] == list(range(1, 9))
