"""A run that measures its states keeps the best, ends when none gets better, and repeats no measurement."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra import storage
from tests.fixtures import furnished, write_real
from workers.model_directory import ModelDirectory

BY = "out_of_range_overall"


def weights(model: Path) -> dict[str, str]:
    """Digests of a model's files without its card."""
    return {name: each for name, each in storage.digests(model).items() if name != "model.json"}


@pytest.mark.slow
@pytest.mark.by_hand
def test_a_run_that_diverges_ends_early_and_exports_its_best_state(
    distilled: Callable[..., str], tmp_path: Path
) -> None:
    config = furnished(tmp_path)
    write_real(Path(config.data.held_out), config)

    def distill(output: str, *more: str, code: int = 0) -> str:
        return distilled(
            f"output={output}", "iterations=14", "student_every=1", "sample_every=0", "checkpoint_every=4",
            "roles.student.engine.learning_rate=0.03", "selection.every=3", f"selection.by={BY}",
            "selection.videos=8", "selection.cpus=0.5", "--evaluate.suite=video", *more, code=code,
        )  # fmt: skip

    # The student's rate is far too high: what it makes leaves the range of the data, further and further.
    output = tmp_path / "wears"
    keeps = ("selection.keep=2", "selection.patience=2", "selection.export=best")
    said = distill("wears", *keeps)
    numbers = output / "selection" / "numbers.json"
    body = json.loads(numbers.read_text())
    values = {int(each): found[BY] for each, found in body["measured"].items()}
    best, second = sorted(values, key=lambda each: (values[each], each))[:2]
    end = best + 6
    assert list(values) == list(range(3, end + 1, 3)) and end < 14, "two after the best one, and no more"
    assert f"stopped after iteration {end}, 2 measurements without a better {BY}" in said
    assert storage.newest_complete(output / "checkpoints") == f"{output}/checkpoints/{end:07d}"
    assert body["kept"] == [best, second] and body["best"] == best
    folders = sorted(path.name for path in (output / "selection").iterdir() if path.is_dir())
    assert folders == [f"{each:07d}" for each in sorted((best, second))]

    model = ModelDirectory(output / "model")
    assert dict(model.card.selection) == {
        "exported": "best", "iteration": best, "by": BY, "value": values[best], "best": best,
        "measured": len(values), "ended_at": end, "ended_by": "patience",
    }  # fmt: skip
    assert weights(output / "model") == weights(output / "selection" / f"{best:07d}")
    client = MlflowClient(config.tracking.uri)
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    history = client.get_metric_history(run.info.run_id, f"selection/{BY}")
    assert {point.step: point.value for point in history} == values

    # What is kept is the state of that iteration: a run that ends there exports it.
    distill("short", f"iterations={best}", "selection.every=0", "selection.by=null")
    short = ModelDirectory(tmp_path / "short" / "model")
    assert weights(tmp_path / "short" / "model") == weights(output / "model") and not short.card.selection

    # Ended by patience, it is done: resumed, it does no more than publish.
    for file in (output / "model").iterdir():
        file.unlink()
    assert f"stopped after iteration {end}" in distill("wears", *keeps, "--resume")
    assert weights(tmp_path / "short" / "model") == weights(output / "model")

    # With patience it goes on from an earlier checkpoint, by what is measured already, to the end.
    storage.discard(output / "checkpoints" / f"{end:07d}")
    body["measured"][str(end)]["motion_overall"] = 123.0
    numbers.write_text(json.dumps(body))
    said = distill("wears", "selection.keep=2", "--resume")
    assert "resuming from update" in said and f"iteration {end} measured" not in said
    body = json.loads(numbers.read_text())
    assert body["measured"][str(end)]["motion_overall"] == 123.0
    assert list(map(int, body["measured"])) == [*range(3, 14, 3), 14]
    card = ModelDirectory(output / "model").card
    assert (card.selection["exported"], card.selection["iteration"], card.selection["best"]) == (
        "last",
        14,
        body["best"],
    )
    assert weights(output / "model") != weights(tmp_path / "short" / "model")

    # Numbers of another measurement are not compared with these.
    said = distill("wears", "iterations=15", "--evaluate.frames=9", "--resume", code=2)
    assert "was measured otherwise: evaluate.frames 8 → 9; keep what it was measured with, or move" in said
