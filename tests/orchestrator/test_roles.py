"""Which roles a run has; no Ray is started."""

from inspect import signature
from pathlib import Path

import pytest

from orchestrator.config import RunConfig
from orchestrator.roles import WORKERS, ranks_of, settings_of
from pipelines import cli
from pipelines.recipe import RECIPES
from tests.fixtures import TINY_RECIPE


def config_of(recipe: str | Path, *overrides: str) -> RunConfig:
    return cli.parse("distill", [str(recipe), *(f"--{each}" for each in overrides)])[0]


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_teacher_is_there_where_the_objective_reads_it(recipe: Path) -> None:
    config = config_of(recipe)
    only_adversarial = set(config.distill.objective.weights) <= {"gan", "relativistic_gan"}
    assert only_adversarial == recipe.stem.endswith(("digits-gan", "wan-1.3b-gan-1.3b"))
    assert list(ranks_of(config)) == ["student", *([] if only_adversarial else ["teacher"]), "critic"]


def test_a_teacher_that_nobody_reads_need_not_fit() -> None:
    free = ["distill.roles.teacher.ranks=3", "text.encoder=embedded"]
    gan = ["distill.objective.weights={gan: 1}", "distill.discriminator.taps=[0]", "data.real=real"]
    assert "teacher" not in ranks_of(config_of(TINY_RECIPE, *gan, *free))
    for setting in free:
        with pytest.raises(ValueError, match=r"distill\.roles\.teacher"):
            config_of(TINY_RECIPE, *gan, "distill.objective.weights={gan: 1, dmd: 1}", setting)


def test_workers_take_their_settings() -> None:
    config = config_of(TINY_RECIPE)
    for role, settings in settings_of(config).items():
        signature(WORKERS[role].__init__).bind(None, rank=0, ranks=1, threads=1, **settings)
