"""Self Forcing across actors (arXiv 2506.08009, algorithm 1): who does what when. It moves references, never tensors.

In every iteration: if it is a fifth, the student rolls out, is scored by the teacher and the current critic, pulls the gradient back and
steps. Then, every iteration, the critic trains on a fresh rollout of the student as it now is.

Between two student updates the student's weights stand still, so whatever rollout comes next is requested before the critic is waited for.
What is computed is the same to the bit; only when it is computed changes.
"""

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef
from ray.actor import ActorHandle

from model.objectives import Prediction
from model.score import ScorePlan
from orchestrator.config import RunConfig
from orchestrator.update_plan import Purpose, UpdatePlan
from orchestrator.worker_group import WorkerGroup

Metrics = dict[str, float]
Answers = tuple[str, WorkerGroup, list[ObjectRef]]
"""A verb, who was asked, and the references to what its ranks measured."""


@dataclass(frozen=True)
class Rollouts:
    """References to a batch of videos and what they were made from."""

    samples: list[int]
    contexts: list[ObjectRef]
    videos: list[ObjectRef]
    stats: list[ObjectRef]


@dataclass
class Coordinator:
    """The actors of one run, and what is asked of them."""

    config: RunConfig
    student: WorkerGroup
    teacher: WorkerGroup
    critic: WorkerGroup
    prompts: ActorHandle
    uncond: ObjectRef
    ahead: dict[tuple[int, Purpose, int], Rollouts] = field(default_factory=dict)

    @property
    def plan(self) -> UpdatePlan:
        return UpdatePlan(self.config)

    def run(self, start: int) -> Iterator[tuple[int, Metrics]]:
        """Iterations from `start` on, yielding how many are done and what was measured.

        Raises FloatingPointError, naming role, iteration and batch, where a number is not finite.
        """
        for iteration in range(start, self.config.distill.iterations):
            began = time.perf_counter()
            timer = Timer()
            if self.plan.updates_student(iteration):
                self.update_student(iteration, timer)
            self.update_critic(iteration, timer)
            yield iteration + 1, timer.metrics(time.perf_counter() - began)

    def update_student(self, iteration: int, timer: "Timer") -> None:
        plan = self.plan.score(iteration, "score")
        objective = self.config.distill.objective
        for part in range(self.plan.parts):
            made = self.rollout(iteration, "student", part)
            predictions, scored = self.score(made, plan, iteration, part)
            judged, *cotangents = self.student.scatter(
                "judge",
                made.samples,
                *(predictions[name] for name in objective.reads),
                results=len(objective.flows),
            )
            gradients, returned = self.pull_back(
                made.samples, dict(zip(objective.flows, cotangents, strict=True))
            )
            (pulled,) = self.student.scatter("pullback", made.samples, *gradients, results=0)
            timer.add("rollout", "student", self.student.stats(made.stats))
            for verb, scorer, stats in [*scored, *returned]:
                timer.add(verb, scorer.role, scorer.stats(stats))
            timer.add("judge", "student", self.finite("student", iteration, self.student.stats(judged)))
            timer.add("pullback", "student", self.student.stats(pulled))
        stepped = self.student.stats(self.student.broadcast("step"))
        timer.add("step", "student", self.finite("student", iteration, stepped))

    def score(
        self, made: Rollouts, plan: ScorePlan, iteration: int, part: int
    ) -> tuple[dict[Prediction, list[ObjectRef]], list[Answers]]:
        """The predictions that the objective reads. A scorer keeps its graph where gradient will flow back."""
        objective = self.config.distill.objective
        predictions: dict[Prediction, list[ObjectRef]] = {}
        answers: list[Answers] = []

        def ask(
            scorer: WorkerGroup, inputs: Any, plan: ScorePlan, *more: Any, keep: bool, results: int
        ) -> Any:
            stats, *columns = scorer.scatter("score", *inputs, head=(keep, plan, *more), results=results)
            answers.append(("score", scorer, stats))
            return columns

        inputs = (made.samples, made.videos, made.contexts)
        if "real" in objective.reads:
            keep = "real" in objective.flows
            (predictions["real"],) = ask(self.teacher, inputs, plan, self.uncond, keep=keep, results=1)
        names: tuple[Prediction, ...] = (
            ("fake", "logits") if self.config.distill.discriminator.taps else ("fake",)
        )
        keep = any(name in objective.flows for name in names)
        predictions |= zip(names, ask(self.critic, inputs, plan, keep=keep, results=len(names)), strict=True)
        if "data_logits" in objective.reads:
            data = self.data(self.plan.position(iteration, "student", part), len(made.samples))
            apart = self.plan.score(iteration, "score-data")
            _, predictions["data_logits"] = ask(
                self.critic, (made.samples, *data), apart, keep=False, results=2
            )
        return predictions, answers

    def pull_back(
        self, samples: list[int], cotangents: dict[Prediction, list[ObjectRef]]
    ) -> tuple[list[list[ObjectRef]], list[Answers]]:
        """What gradients with respect to predictions are with respect to the videos, from each scorer that made any."""
        gradients, answers = [], []
        makers: list[tuple[WorkerGroup, tuple[Prediction, ...]]] = [
            (self.teacher, ("real",)),
            (self.critic, ("fake", "logits")),
        ]
        for scorer, made in makers:
            names = [name for name in made if name in cotangents]
            if names:
                stats, gradient = scorer.scatter(
                    "pullback", samples, *(cotangents[name] for name in names), head=(names,)
                )
                gradients.append(gradient)
                answers.append(("pullback", scorer, stats))
        return gradients, answers

    def update_critic(self, iteration: int, timer: "Timer") -> None:
        plan = self.plan.score(iteration, "critic-score")
        made, columns = [], []
        for part in range(self.plan.parts):
            rollouts = self.rollout(iteration, "critic", part)
            made.append(rollouts)
            data: Any = ()
            if self.config.distill.discriminator.taps:
                data = self.data(self.plan.position(iteration, "critic", part), len(rollouts.samples))
            columns.append((rollouts.samples, rollouts.videos, rollouts.contexts, *data))
        samples, *tensors = (
            [each for column in parts for each in column] for parts in zip(*columns, strict=True)
        )
        size = len(samples) // self.config.distill.roles.critic.engine.accumulation
        updates = []
        for first in range(0, len(samples), size):
            part_of = slice(first, first + size)
            (stats,) = self.critic.scatter(
                "update", samples[part_of], *(column[part_of] for column in tensors), head=(plan,), results=0
            )
            updates.append(stats)
        if self.config.distill.overlap:
            self.look_ahead(iteration + 1)
        for rollouts in made:
            timer.add("rollout", "student", self.student.stats(rollouts.stats))
        for stats in updates:
            timer.add("update", "critic", self.finite("critic", iteration, self.critic.stats(stats)))

    def look_ahead(self, iteration: int) -> None:
        """Request the first rollout of a coming iteration; its weights are those of now."""
        if iteration < self.config.distill.iterations:
            purpose: Purpose = "student" if self.plan.updates_student(iteration) else "critic"
            self.ahead[iteration, purpose, 0] = self.rollout(iteration, purpose, 0)

    def rollout(self, iteration: int, purpose: Purpose, part: int) -> Rollouts:
        """The videos of one micro-batch, unless they were requested already."""
        if (iteration, purpose, part) in self.ahead:
            return self.ahead.pop((iteration, purpose, part))
        size = self.plan.size
        samples = list(range(part * size, (part + 1) * size))
        contexts, *data = self.inputs(self.plan.position(iteration, purpose, part), size)
        verb, plan = self.plan.videos(iteration, purpose)
        stats, videos = self.student.scatter(verb, samples, contexts, *data, head=(plan,))
        return Rollouts(samples, contexts, videos, stats)

    def inputs(self, position: int, size: int) -> list[list[ObjectRef]]:
        """Prompt embeddings of a batch, and videos of the data where the student starts from those."""
        if not self.config.distill.starts_from_data:
            return [self.contexts(position, size)]
        latents, contexts = self.data(position, size)
        return [contexts, latents]

    def data(self, position: int, size: int) -> tuple[list[ObjectRef], list[ObjectRef]]:
        """References to latents of the data and to the embeddings of their prompts."""
        both: Any = self.prompts.data.options(num_returns=2 * size).remote(position, size)
        return list(both[:size]), list(both[size:])

    def contexts(self, position: int, size: int) -> list[ObjectRef]:
        """References to the embeddings of `size` prompts."""
        references: Any = self.prompts.batch.options(num_returns=size).remote(position, size)
        return [references] if size == 1 else list(references)

    def finite(self, role: Purpose, iteration: int, stats: Metrics) -> Metrics:
        for name, value in stats.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{role} {name} is {value} in iteration {iteration} (prompt batch {self.plan.batch_index(iteration, role)}); "
                    "the newest whole checkpoint is kept: lower the learning rate and --resume."
                )
        return stats


class Timer:
    """Adds up what the roles report within one iteration."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = defaultdict(list)
        self.seconds: dict[str, float] = defaultdict(float)
        self.busy: dict[str, float] = {"student": 0.0, "teacher": 0.0, "critic": 0.0}

    def add(self, verb: str, role: str, stats: Metrics) -> None:
        seconds = stats["seconds"]
        self.seconds[f"seconds/{role}_{verb}"] += seconds
        self.busy[role] += seconds
        for name, value in stats.items():
            if name != "seconds":
                self.values[f"{role}/{name}"].append(value)

    def metrics(self, wall: float) -> Metrics:
        """Means of values, sums of seconds, and the share of the iteration in which a role had nothing to do.

        A rollout requested ahead counts in the iteration that uses it, so a single iteration's idle share may be off; their mean is not.
        """
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        idle = {f"idle/{role}": max(0.0, 1 - busy / wall) for role, busy in self.busy.items()}
        return {**means, **self.seconds, "seconds/iteration": wall, **idle}
