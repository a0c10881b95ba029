"""The same batch on fewer ranks."""

from collections.abc import Mapping
from dataclasses import replace

import pytest

from orchestrator.config import RunConfig
from orchestrator.layout import fitted
from orchestrator.stages import DistilledRole
from pipelines import cli
from tests.fixtures import TINY_RECIPE
from workers.engine_config import EngineConfig


def config(batch: int, exit_groups: int, **roles: tuple[int, int, int | None]) -> RunConfig:
    """Ranks, accumulation and min_ranks of each role."""
    words = [f"--distill.batch={batch}", f"--distill.exit_groups={exit_groups}"]
    for role, (ranks, parts, fewest) in roles.items():
        words += [
            f"--distill.roles.{role}.ranks={ranks}",
            f"--distill.roles.{role}.min_ranks={fewest or 'null'}",
        ]
        if role != "teacher":
            words += [f"--distill.roles.{role}.engine.accumulation={parts}"]
    return cli.parse("distill", [str(TINY_RECIPE), *words])[0]


def sizes(found: RunConfig | None) -> Mapping[str, tuple[int, int]] | None:
    if found is None:
        return None
    roles = found.distill.roles
    trained = {"student": roles.student, "critic": roles.critic}
    return {name: (role.ranks, role.engine.accumulation) for name, role in trained.items()} | {
        "teacher": (roles.teacher.ranks, 1)
    }


def test_as_many_ranks_as_there_can_be_with_the_batch_and_its_exit_groups_kept() -> None:
    whole = config(16, 2, student=(4, 2, 1), critic=(4, 1, 1), teacher=(2, 1, 1))
    assert fitted(whole, {"student": 4, "critic": 4, "teacher": 2}) is whole
    # 3 does not divide the batch; 2 ranks make it in 4 micro-batches, of 2 videos a rank as before.
    assert sizes(fitted(whole, {"student": 3, "critic": 4, "teacher": 2})) == {
        "student": (2, 4),
        "critic": (4, 1),
        "teacher": (2, 1),
    }
    assert sizes(fitted(whole, {"student": 1, "critic": 1, "teacher": 1})) == {
        "student": (1, 8),
        "critic": (1, 4),
        "teacher": (1, 1),
    }


def test_no_role_goes_below_its_fewest() -> None:
    whole = config(8, 1, student=(4, 1, 2), critic=(2, 1, None), teacher=(1, 1, None))
    assert fitted(whole, {"student": 1, "critic": 2, "teacher": 1}) is None
    assert fitted(whole, {"student": 4, "critic": 1, "teacher": 1}) is None
    assert sizes(fitted(whole, {"student": 2, "critic": 2, "teacher": 1})) == {
        "student": (2, 2),
        "critic": (2, 1),
        "teacher": (1, 1),
    }


def test_more_fewest_than_ranks_is_refused() -> None:
    for fewest in (0, 3):
        with pytest.raises(ValueError, match="min_ranks is"):
            replace(DistilledRole(engine=EngineConfig(learning_rate=1.0)), ranks=2, min_ranks=fewest)


def test_ranks_that_share_their_videos_leave_together() -> None:
    whole = config(8, 1, student=(4, 1, 1), critic=(4, 1, 1), teacher=(4, 1, 1))
    roles = whole.distill.roles
    shared = replace(
        roles, teacher=replace(roles.teacher, sequence=2), critic=replace(roles.critic, sequence=2)
    )
    paired = replace(whole, distill=replace(whole.distill, roles=shared))
    assert paired.distill.roles.critic.groups == 2
    assert sizes(fitted(paired, {"student": 4, "critic": 3, "teacher": 3})) == {
        "student": (4, 2),
        "critic": (2, 2),
        "teacher": (2, 1),
    }
    assert fitted(paired, {"student": 4, "critic": 1, "teacher": 4}) is None


def test_a_share_that_does_not_come_out_even_is_refused() -> None:
    base = config(8, 1, student=(1, 1, 1), critic=(1, 1, 1), teacher=(1, 1, 1))
    roles = base.distill.roles
    with pytest.raises(ValueError, match="sequence of 2 does not divide the 3 ranks"):
        replace(roles.teacher, ranks=3, sequence=2)
    thirds = replace(roles, critic=replace(roles.critic, ranks=3, sequence=3))
    with pytest.raises(
        ValueError, match=r"critic\.sequence of 3 does not divide the model's 2 heads and the 16"
    ):
        replace(base, distill=replace(base.distill, roles=thirds))
