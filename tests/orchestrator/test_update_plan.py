"""Exit steps and timesteps that the samples of an update share out."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.rollout_plan import RolloutPlan
from orchestrator.config import RunConfig
from orchestrator.update_plan import Purpose, UpdatePlan
from tests.fixtures import furnished

BATCH = 16


def plan_of(config: RunConfig, accumulation: int, **settings: Any) -> UpdatePlan:
    roles = config.distill.roles
    engine = replace(roles.student.engine, accumulation=accumulation)
    roles = replace(roles, student=replace(roles.student, engine=engine))
    distill = replace(config.distill, batch=BATCH, roles=roles, **settings)
    return UpdatePlan(replace(config, distill=distill))


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    return furnished(
        tmp_path, overrides=["--rollout.steps=[1000,750,500,250]", "--rollout.first_steps=[1000,500]"]
    )


def exits(plan: UpdatePlan, iteration: int, purpose: Purpose) -> list[tuple[int, int | None]]:
    """Exit steps of every sample of an update."""
    found = []
    for part in range(plan.parts):
        verb, rollout = plan.videos(iteration, purpose, part)
        assert verb == "rollout" and isinstance(rollout, RolloutPlan)
        found += [(rollout.exit_step, rollout.first_exit_step)] * plan.size
    return found


@pytest.mark.parametrize("purpose", ["student", "critic"])
def test_groups_take_every_step_as_often_and_any_accumulation_gives_the_same(
    config: RunConfig, purpose: Purpose
) -> None:
    together = Counter()
    for iteration in range(60):
        found = exits(plan_of(config, 4, exit_groups=4), iteration, purpose)
        assert Counter(step for step, _ in found) == dict.fromkeys(range(4), 4)
        assert Counter(step for _, step in found) == dict.fromkeys(range(2), 8)
        for accumulation in (8, 16):
            assert exits(plan_of(config, accumulation, exit_groups=4), iteration, purpose) == found
        together.update(step for step, _ in exits(plan_of(config, 2, exit_groups=2), iteration, purpose))
    # Fewer groups than steps take different ones each time, all of them as often in the long run.
    assert min(together.values()) > 0.6 * max(together.values()) and len(together) == 4


def test_one_group_draws_as_published(config: RunConfig) -> None:
    plan = plan_of(config, 4)
    for iteration in range(8):
        drawn = RolloutPlan.draw(
            config.rollout, 6, seed=config.seed, update=iteration, purpose="critic", grad_frames=0
        )
        assert exits(plan, iteration, "critic") == [(drawn.exit_step, drawn.first_exit_step)] * BATCH


def test_timesteps_fill_the_range_whoever_draws_them(config: RunConfig) -> None:
    score = replace(config.score, shift=1.0, minimum=0.0, maximum=1000.0, timesteps="stratified")
    plan = plan_of(replace(config, score=score), 4).score(3, "score")

    def drawn(samples: range) -> torch.Tensor:
        return plan.draw(torch.zeros(len(samples), 1), list(samples), score)[1]

    whole = drawn(range(BATCH))
    assert sorted((whole * BATCH / 1000).long().tolist()) == list(range(BATCH))
    assert whole.tolist() != sorted(whole.tolist())
    for size in (1, 2, 8):
        parts = [drawn(range(start, start + size)) for start in range(0, BATCH, size)]
        assert torch.equal(torch.cat(parts), whole)


def test_groups_that_do_not_fit_are_refused(config: RunConfig) -> None:
    with pytest.raises(
        ValueError, match=r"exit_groups of 4 does not divide .*accumulation of 6, .* set that to 4"
    ):
        plan_of(config, 6, exit_groups=4)
    with pytest.raises(ValueError, match=r"exit_groups is of rollouts, so it needs distill\.inputs rollout"):
        plan_of(config, 2, exit_groups=2, inputs="teacher_forcing")


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"gather": True}, "gather is for roles.student.engine.zero_stage 3"),
        ({"replay": True, "cache_gradient": "released"}, "replay has constant caches"),
        ({"replay": True, "inputs": "teacher_forcing"}, "replay is of rollouts"),
        ({"compile": True, "inputs": "diffusion_forcing"}, "compile is of rollouts"),
    ],
    ids=lambda settings: "-".join(settings) if isinstance(settings, dict) else "",
)
def test_ways_of_rolling_out_that_have_no_object_are_refused(
    config: RunConfig, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        plan_of(config, 2, **settings)


def test_what_is_compiled_needs_whole_weights(config: RunConfig) -> None:
    roles = config.distill.roles
    engine = replace(roles.student.engine, zero_stage=3)
    sharded = replace(roles, student=replace(roles.student, engine=engine))
    with pytest.raises(ValueError, match="compile needs whole weights: set gather"):
        replace(config.distill, roles=sharded, compile=True)
    assert replace(config.distill, roles=sharded, compile=True, gather=True).gather


def test_replicas_need_a_replay_and_a_batch_that_they_share_evenly(config: RunConfig) -> None:
    roles = config.distill.roles
    replicas = replace(roles, rollout=replace(roles.rollout, ranks=3))
    with pytest.raises(
        ValueError, match=r"rollout\.ranks are replicas, which keep no graph: set distill\.replay"
    ):
        replace(config.distill, roles=replicas)
    distill = replace(config.distill, roles=replicas, replay=True, batch=BATCH)
    with pytest.raises(
        ValueError, match=r"rollout\.ranks of 3 does not divide the 16 videos rolled out at once"
    ):
        replace(config, distill=distill)
