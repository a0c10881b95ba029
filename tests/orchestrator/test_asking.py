"""What the coordinator asks of whom, and when it waits; groups that only take notes, and no Ray."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from model import objectives
from model.objectives.loss import Loss
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator, Timer
from orchestrator.fault import Fault
from orchestrator.worker_group import Request, WorkerGroup
from pipelines import cli
from tests.fixtures import TINY_RECIPE
from workers.batch import Batch


@dataclass
class Notes:
    """A group that makes whatever it is asked for, and notes it in `said`."""

    role: str
    said: list[str]
    makes: tuple[str, ...] = ()
    measures: dict[str, float] = field(default_factory=dict)
    plans: list[Any] = field(default_factory=list)
    steps: list[dict[str, float]] = field(default_factory=list)
    """What it tells of its coming steps."""

    def scatter(self, verb: str, plan: Any, batch: Batch, makes: Sequence[str] = ()) -> tuple[Any, Batch]:
        given, made = ",".join(batch.columns), ",".join(makes)
        self.said.append(f"{self.role}.{verb}({given}){' → ' if made else ''}{made}")
        self.plans.append(plan)
        return Asked(self, verb), Batch(batch.samples, {name: batch.samples for name in makes})


@dataclass
class Asked:
    group: Notes
    verb: str

    def wait(self) -> dict[str, float]:
        self.group.said.append(f"wait {self.group.role}.{self.verb}")
        told = self.group.measures if self.verb == "judge" else {}
        if self.verb == "step" and self.group.steps:
            told = self.group.steps.pop(0)
        return {"seconds": 0.0, **told}


def noted(config: RunConfig, **makes: tuple[str, ...]) -> tuple[Coordinator, list[str]]:
    said: list[str] = []
    groups = {role: Notes(role, said, makes.get(role, ())) for role in ("student", *makes)}
    return Coordinator(config, groups), said


@pytest.fixture
def config() -> RunConfig:
    return cli.parse(
        "distill",
        [str(TINY_RECIPE), "--distill.iterations=2", "--distill.student_every=2", "--data.real=real"],
    )[0]


def test_one_update_in_the_order_of_the_algorithm(config: RunConfig) -> None:
    coordinator, said = noted(config, teacher=("real",), critic=("fake", "logits"))
    iterations = coordinator.run(0)
    next(iterations)
    assert said == [
        "student.rollout(context) → video",
        "wait student.rollout",
        "teacher.score(video,context) → real",
        "critic.score(video,context) → fake",
        "wait teacher.score",
        "wait critic.score",
        "student.judge(real,fake)",
        "wait student.judge",
        "student.pullback()",
        "wait student.pullback",
        "student.step()",
        "wait student.step",
        "student.rollout(context) → video",
        "wait student.rollout",
        "critic.update(video,context)",
        # The next iteration's, before anybody waits for the critic.
        "student.rollout(context) → video",
        "wait critic.update",
    ]
    said.clear()
    assert [done for done, _ in iterations] == [2]
    assert said == [
        "wait student.rollout",
        "critic.update(video,context)",
        "wait critic.update",
    ]


def test_a_new_leaf_is_asked_for_by_its_name_and_gradient_finds_its_way_back(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = Loss(lambda leaves, _: leaves["depth"].mean(), reads=("depth", "data_depth"), flows=("depth",))
    monkeypatch.setitem(objectives.LOSSES, "depth", loss)
    objective = replace(config.distill.objective, weights={"depth": 1.0})
    config = replace(config, distill=replace(config.distill, objective=objective))
    assert not config.distill.needs_teacher
    coordinator, said = noted(config, critic=("fake", "logits", "depth"))
    next(coordinator.run(0))
    asked = [each for each in said[1 : said.index("student.step()")] if not each.startswith("wait")]
    assert asked == [
        "critic.score(video,context) → depth",
        "critic.score(video,context) → depth",
        "student.judge(depth,data_depth) → depth",
        "critic.pullback(depth) → gradient",
        "student.pullback(critic_gradient)",
    ]
    scores = coordinator.critic.plans[:2]
    assert [plan.gradient for plan in scores] == [True, False]
    assert [plan.noise[-1] for plan in scores] == ["score", "score-data"]
    # Videos and data are compared at the same timesteps, under noise of their own.
    samples = list(range(4))
    (noise, timestep), (fresh, same) = (
        plan.draw(torch.zeros(4, 2, 1, 2, 2), samples, config.score) for plan in scores
    )
    assert torch.equal(same, timestep) and len(timestep.unique()) == 4
    assert not torch.equal(fresh, noise)


def test_a_loss_that_is_not_finite_is_never_stepped_on(config: RunConfig) -> None:
    coordinator, said = noted(config, teacher=("real",), critic=("fake",))
    coordinator.student.measures["loss"] = float("nan")
    with pytest.raises(FloatingPointError, match=r"^student loss is nan in iteration 0 \(prompt batch 0\)"):
        next(coordinator.run(0))
    assert said[-1] == "wait student.judge" and "student.step()" not in said


def stepped(*numbers: tuple[int, float]) -> list[dict[str, float]]:
    return [{"steps": float(steps), "grad_norm": norm} for steps, norm in numbers]


def test_an_update_that_is_not_finite_is_dropped_and_counted_where_the_recipe_says_so(
    config: RunConfig,
) -> None:
    config = replace(
        config, distill=replace(config.distill, iterations=30, student_every=1, not_finite="drop")
    )
    coordinator, _ = noted(config, teacher=("real",), critic=("fake",))
    coordinator.student.measures["loss"] = math.nan
    coordinator.student.steps += stepped((7, 1.0), (7, math.inf), (8, 1.0))
    metrics = [measured for (_, measured), _ in zip(coordinator.run(0), range(3), strict=False)]
    assert [each.get("student/dropped") for each in metrics] == [None, 1.0, None]
    assert all("student/loss" not in each for each in metrics)
    assert [each.get("student/grad_norm") for each in metrics] == [1.0, None, 1.0]
    coordinator.student.steps += stepped(*[(8, math.inf)] * 20)
    with pytest.raises(FloatingPointError, match="in iteration 12 ") as stopped:
        list(coordinator.run(3))
    assert stopped.value.since == 3  # nine were dropped since then, and this is the tenth

    # A run that has fewer must not drop them all.
    short = replace(config, distill=replace(config.distill, iterations=5, student_every=2))
    coordinator, _ = noted(short, teacher=("real",), critic=("fake",))
    coordinator.student.steps += stepped(*[(7, math.inf)] * 3)
    with pytest.raises(FloatingPointError, match="in iteration 4 "):
        list(coordinator.run(0))


def test_an_update_is_one_step_of_each_role(config: RunConfig) -> None:
    config = replace(config, distill=replace(config.distill, student_every=1))
    for numbers, said in (((7, 9), "made 9 steps, where there should be 8"), ((7, 7), "made 7 steps")):
        coordinator, _ = noted(config, teacher=("real",), critic=("fake",))
        coordinator.student.steps += stepped(*[(steps, 1.0) for steps in numbers])
        with pytest.raises(Fault, match=said):
            list(coordinator.run(0))


def test_memory_is_the_most_of_any_rank_and_verb() -> None:
    """Other numbers are means over ranks, and over verbs."""

    class Answered(WorkerGroup):
        def __init__(self, *answers: dict[str, float]):
            super().__init__("student", [])
            self.answers = answers

        def wait(self, references: object) -> object:
            return list(self.answers)

    timer = Timer(["student"])
    for verb, *memory in (("rollout", 3.0, 5.0), ("pullback", 2.0, 4.0)):
        answers = ({"seconds": 1.0, "loss": most, "memory": most} for most in memory)
        timer.add(verb, "student", Request(Answered(*answers), verb, []).wait())
    metrics = timer.metrics(4.0)
    assert metrics["memory/student"] == 5.0 and metrics["student/loss"] == 3.5
    assert metrics["idle/student"] == 0.5 and "student/memory" not in metrics
