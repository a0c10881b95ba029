"""An experiment of tiny cells: measured once each, on from where it was stopped, with a report of all of
them.
"""

import re
import shutil
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient
from PIL import Image

from infra import storage
from orchestrator import run_state
from pipelines import cli
from pipelines.digits.cells import config_of, open_experiment
from pipelines.digits.experiment import identity
from tests.fixtures import TINY_RECIPE, furnished, write_model

EXPERIMENT = """
title: A small experiment
recipe: {recipe}
results: docs/small
seeds: [0, 1]
settings:
  data: {{real: outputs/data/train}}
  initialize: {{teacher: outputs/teacher/model}}
  distill: {{sample_every: 0}}
cells:
  forced:
    {{title: Forced, stage: initialize, group: forced, settings: {{initialize: {{method: teacher_forcing}}}}}}
  rolled:
    title: Rolled
    stage: distill
    group: self_forcing
    settings: {{distill: {{objective: {{weights: {{sid: 1}}}}}}}}
"""


@pytest.mark.slow
@pytest.mark.by_hand
def test_cells_are_measured_once_and_reported(ray_cluster: object, reused_rank: None, tmp_path: Path) -> None:
    config = furnished(tmp_path)
    shutil.rmtree(config.data.train)  # `prepare` writes videos, which the cells need
    # What a run trained before it was stopped is measured and not trained again.
    for number, cell in enumerate(("forced", "rolled")):
        write_model(
            tmp_path / "outputs" / "small" / cell / "1" / "model",
            config.student,
            seed=20 + number,
            rollout=config.rollout,
            video=config.video,
        )
    spec = tmp_path / "small.yaml"
    spec.write_text(EXPERIMENT.format(recipe=TINY_RECIPE))
    command = ["experiment", str(spec), f"--root={tmp_path}"]
    assert cli.main(command) == 0

    cells = tmp_path / "docs" / "small" / "cells"
    names = {f"{cell}-{seed}" for cell in ("forced", "rolled") for seed in (0, 1)}
    assert {path.name for path in cells.iterdir() if storage.is_complete(path)} == names | {"references"}
    report = tmp_path / "docs" / "small.md"
    text = report.read_text()
    assert "(4 of 4 cells, seeds 0, 1;" in text and "| Rolled − Forced | " in text
    assert len(re.findall(r"\| Forced \|(?: \d\.\d{3} ± \d\.\d{3} \|){3} \d\.\d \|", text)) == 1
    for picture in re.findall(r"\]\((small/.+?\.png)\)", text):
        assert min(Image.open(tmp_path / "docs" / picture).size) > 300
    assert str(tmp_path) not in re.sub(r"^`.+?`", "", text, flags=re.MULTILINE)

    client = MlflowClient(config.tracking.uri)
    experiment = client.get_experiment_by_name("small")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    stages = [run.data.tags["stage"] for run in runs]
    # Of the first seed a distillation and a forced model, and the initial student; each cell and the
    # references are measured.
    assert {stage: stages.count(stage) for stage in set(stages)} == {
        "distill": 1, "initialize": 2, "evaluate": 5, "report": 1,
    }  # fmt: skip

    # A cell that is lost is made again, to the same numbers, and nothing else is; what a person wrote stays.
    report.write_text(text.replace("<!-- findings -->\n", "<!-- findings -->\nIt works.\n"))
    lost, kept = cells / "rolled-1", (cells / "forced-0" / "metrics.json").stat().st_mtime_ns
    rows = re.search(r'"rows": .*', (lost / "metrics.json").read_text())
    assert rows is not None
    shutil.rmtree(lost)
    assert cli.main(command) == 0
    assert rows[0] in (lost / "metrics.json").read_text()
    assert (cells / "forced-0" / "metrics.json").stat().st_mtime_ns == kept
    assert "It works." in report.read_text()

    # Other settings are not mixed with what is there.
    assert cli.main([*command, "--distill.iterations=3"]) == 2


def test_an_experiment_that_is_none_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["experiment", "exposure"]) == 2
    assert (
        "there is no experiment 'exposure'; name a YAML file or one of exposure-bias."
        in capfd.readouterr().err
    )
    wrong = tmp_path / "wrong.yaml"
    whole = {"title": "A", "recipe": str(TINY_RECIPE), "results": "docs/a", "settings": {}, "seeds": [0]}
    whole["cells"] = {"a": {"title": "A", "stage": "distill", "group": "a"}}
    for change, says in (
        ({"cells": {"a": {"titel": "A"}}}, "Option 'titel' is not accepted"),
        ({"cells": {"a": {"title": "A", "stage": "train", "group": "a"}}}, 'Parser key "stage"'),
        ({"cells": ["a"]}, "cells must hold settings by name"),
        ({"seeds": 3}, 'Parser key "experiment.seeds"'),
        ({"seeds": []}, "seeds is empty"),
        ({"settings": [1]}, "settings"),
        ({"recipe": [1]}, 'Parser key "experiment.recipe"'),
        ({"recipe": "none"}, f"there is no recipe 'none' beside {wrong}"),
        ({"results": "s3://bucket/a"}, "results is s3://bucket/a; use a path of"),
        ({"seed": 1}, f"there is no setting seed (in {wrong}); the nearest is seeds."),
    ):
        wrong.write_text(yaml.safe_dump(whole | change))
        assert cli.main(["experiment", str(wrong)]) == 2, change
        said = capfd.readouterr().err
        assert says in said and said.count("\n") == 1, said


def test_the_published_cells_are_those_of_the_experiment_that_ships() -> None:
    shipped = open_experiment("exposure-bias")
    cells = Path(__file__).parents[3] / "docs/results/exposure-bias/cells"
    for cell in shipped.cells:
        found = storage.read_metadata(cells / f"{cell.name}-0")["identity"]
        weights = {name: digest for name, digest in found.items() if name.startswith("weights.")}
        config = config_of(shipped, cell, 0, [])
        assert run_state.differences(found, identity(config, cell.stage, {}) | weights) == {}
