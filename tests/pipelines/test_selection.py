"""Which states are kept and when a run ends, decided on numbers alone; and what cannot be measured."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from infra import storage
from orchestrator import run_state
from orchestrator.config import RunConfig
from pipelines.cli import parse
from pipelines.digits.experiment import identity
from pipelines.selection import NUMBERS, Selection, check, check_settings, ranked, without_better
from pipelines.tracked import is_done
from tests.fixtures import TINY_RECIPE, furnished, write_model, write_real
from workers.model_directory import ModelDirectory

BY = "out_of_range_overall"  # less is better


def parsed(root: Path, *settings: str) -> RunConfig:
    given = [f"--distill.selection.{each}" for each in settings if "." not in each.partition("=")[0]]
    given += [f"--{each}" for each in settings if "." in each.partition("=")[0]]
    return parse("distill", [str(TINY_RECIPE), f"--root={root}", "--evaluate.suite=video", *given])[
        0
    ].located()


def selection_of(config: RunConfig, values: dict[int, float | None], run: str = "this") -> Selection:
    anything: Any = None
    output = f"{config.distill.output}/selection"
    made = Selection(config, output, run, anything, anything, anything, None)
    made.numbers = {each: {BY: value} for each, value in values.items()}
    made.kept = made._best_of(values)
    return made


@pytest.mark.parametrize(
    ("scores", "best", "after"),
    [
        ([], None, 0),
        ([0.1, 0.2, 0.3], 30, 0),
        ([0.3, 0.2, 0.1], 10, 2),
        ([0.1, 0.3, 0.3, 0.2], 20, 2),  # as good is not better
        ([0.1, -math.inf, 0.2, -math.inf], 30, 1),
        ([-math.inf, -math.inf], 10, 2),
    ],
)
def test_the_best_and_how_many_came_after_it(scores: list[float], best: int | None, after: int) -> None:
    found = {10 * (each + 1): score for each, score in enumerate(scores)}
    assert next(iter(ranked(found, found)), None) == best
    assert without_better(found) == after


def test_a_run_ends_where_none_gets_better_and_not_before(tmp_path: Path) -> None:
    config = parsed(tmp_path, "every=5", f"by={BY}", "patience=3", "keep=2")
    improving = selection_of(config, {5 * each: 1 / each for each in range(1, 30)})
    assert not any(improving.ended(done) for done in range(200)) and improving.kept == [145, 140]
    worn = selection_of(config, {5: 0.3, 10: 0.2, 15: 0.25, 20: 0.2, 25: 0.22, 30: 0.1})
    # What was measured later, before the run was killed, decides nothing earlier.
    assert [done for done in range(40) if worn.ended(done)] == [25, 26, 27, 28, 29]
    assert worn.kept == [30, 10] and (worn.best(29), worn.best(30)) == (10, 30)
    undefined = selection_of(config, {5: None, 10: None, 15: None})
    assert undefined.ended(15) and undefined.best(15) is None
    patient = selection_of(
        parsed(tmp_path, "every=5", f"by={BY}"), {5: 0.1, **dict.fromkeys(range(10, 99), 1.0)}
    )
    assert not any(patient.ended(done) for done in range(200))


def test_numbers_are_taken_up_as_far_as_they_are_of_this_run(tmp_path: Path) -> None:
    config = parsed(tmp_path, "every=5", f"by={BY}", "keep=3")
    write_real(Path(config.data.held_out), config)
    before = selection_of(config, {5: 0.1, 10: 0.4, 15: 0.3, 20: 0.2, 25: 0.5})
    for each in before.kept:
        write_model(before.path(each), config.student, seed=each, rollout=config.rollout, video=config.video)
    before._write()

    def resumed(done: int, run: str = "this") -> tuple[list[int], list[int]]:
        again = selection_of(config, {}, run)
        again.read(done)
        return list(again.numbers), again.kept

    assert before.kept == [5, 20, 15]
    assert resumed(10) == ([5, 10, 15, 20, 25], [5, 20, 15])
    # After a setting has changed, states beyond the checkpoint are of another run.
    assert resumed(10, "another") == ([5, 10], [5])
    # A state whose model is lost is made and measured again, if the run comes by once more.
    storage.discard(before.path(20))
    assert resumed(10) == ([5, 10, 15, 25], [5, 15])
    assert resumed(20) == ([5, 10, 15, 20, 25], [5, 15])
    file = Path(before.output) / NUMBERS
    file.write_text("{")
    with pytest.raises(ValueError, match=re.escape(f"{file} cannot be read")):
        resumed(10)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["export=best"], "distill.selection.export is best and needs measurements; set every to a number"),
        (["patience=3"], "distill.selection.patience is 3 and needs measurements; set every to a number"),
        (["every=5"], "distill.selection.by is None; use a number that evaluate.suite video compares: br"),
        (["every=5", "by=beauty"], "distill.selection.by is beauty; use a number that evaluate.suite video"),
        (["every=5", "by=beauty", "evaluate.suite=x"], "evaluate.suite is 'x'; use one of video, digits"),
        (
            ["every=5", "by=brightness_drift_beyond", "evaluate.frames=6"],
            "evaluate.frames is 6, and distill.selection.by brightness_drift_beyond needs 7 or more, for the",
        ),
        (["every=5", f"by={BY}", "evaluate.frames=3"], "evaluate.frames is 3, and distill.selection.by"),
        (
            [
                "every=5", f"by={BY}", "text.encoder=embedded",
                "distill.roles.teacher.negative_embedding=none.safetensors",
            ],
            "write their prompts as text, and text.encoder is embedded; set it to 0.",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_one_sentence(tmp_path: Path, settings: list[str], says: str) -> None:
    with pytest.raises(ValueError, match=re.escape(says)):
        check_settings(parsed(tmp_path, *settings))


def test_without_held_out_videos_nothing_is_measured(tmp_path: Path) -> None:
    furnished(tmp_path)
    config = parsed(tmp_path, "every=5", f"by={BY}")
    student = ModelDirectory(config.distill.student)
    with pytest.raises(ValueError, match="asks for measurements against held-out videos"):
        check(config, student)
    write_real(Path(config.data.held_out), config)
    check(config, student)


def test_a_choice_is_no_part_of_the_run_but_of_what_it_leaves(tmp_path: Path) -> None:
    plain, measured = parsed(tmp_path), parsed(tmp_path, "every=5", f"by={BY}")
    best = parsed(tmp_path, "every=5", f"by={BY}", "export=best")
    assert identity(plain, "distill", {}) == identity(measured, "distill", {})
    assert "distill.selection" in identity(best, "distill", {})
    output, model = best.distill.output, f"{best.distill.output}/model"
    write_model(
        model, best.student, seed=1, rollout=best.rollout, recipe=json.loads(json.dumps(best.portable()))
    )
    furnished(tmp_path)
    staging = storage.begin(f"{output}/checkpoints/0000006")
    storage.publish(
        staging,
        f"{output}/checkpoints/0000006",
        {
            "format": run_state.FORMAT, "done": 6, "position": 0, "stretches": [], "run_id": None,
            "identity": run_state.identity(best, "distill"),
        },
    )  # fmt: skip
    assert is_done(best, "distill", model) and not is_done(plain, "distill", model)
