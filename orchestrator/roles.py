"""The roles of a distillation: which there are, and how each one's group is made, started, stopped and made
anew."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle

from model.watch import Reference
from orchestrator.cluster import release
from orchestrator.config import RunConfig
from orchestrator.placement import Options, place
from orchestrator.stages import AdaptedRole, RanksConfig
from orchestrator.worker_group import WorkerGroup
from workers.actor import Worker
from workers.critic import CriticWorker
from workers.prompts import TrainingData
from workers.student import StudentWorker
from workers.teacher import TeacherWorker

WORKERS: dict[str, type[Worker]] = {
    "student": StudentWorker,
    "teacher": TeacherWorker,
    "critic": CriticWorker,
}


def ranks_of(config: RunConfig) -> dict[str, RanksConfig]:
    """The roles with devices that the run needs. A teacher that the objective does not read is none."""
    roles = config.distill.roles
    teacher: dict[str, RanksConfig] = {"teacher": roles.teacher} if config.distill.needs_teacher else {}
    return {"student": roles.student, **teacher, "critic": roles.critic}


def settings_of(config: RunConfig) -> dict[str, dict[str, Any]]:
    """What the workers of each role are made with, beside their rank."""
    distill, roles = config.distill, config.distill.roles
    data = TrainingData(
        config.data.train,
        config.data.real,
        config.seed,
        distill.student,
        distill.batch,
        skip_damaged=config.data.skip_damaged,
    )

    def learning(role: AdaptedRole) -> dict[str, Any]:
        return {
            "engine": role.engine,
            "activation_checkpointing": role.activation_checkpointing,
            "adapters": role.adapters,
        }

    return {
        "student": {
            "model": distill.student,
            "data": data,
            "rollout": config.rollout,
            "objective": distill.objective,
            "score": config.score,
            "directions": distill.alarms.directions,
            **learning(roles.student),
        },
        "teacher": {
            "model": distill.teacher,
            "data": data,
            "score": config.score,
            "zero_stage": roles.teacher.zero_stage,
            "dtype": roles.teacher.dtype,
            "guidance": roles.teacher.guidance,
            "negative_prompt": roles.teacher.negative_prompt,
            "negative_embedding": roles.teacher.negative_embedding,
        },
        "critic": {
            "model": distill.critic or distill.teacher,
            "data": data,
            "score": config.score,
            "discriminator": distill.discriminator,
            "relativistic": "data_logits" in distill.objective.reads,
            **learning(roles.critic),
        },
    }


@dataclass
class Roles:
    """The groups of one run, made from its config with the Ray options of each rank."""

    config: RunConfig
    options: Mapping[str, Sequence[Options]]
    workers: Mapping[str, type[Worker]] = field(default_factory=lambda: WORKERS)
    groups: dict[str, WorkerGroup] = field(default_factory=dict)
    reference: Reference | None = None
    """What the student's videos are compared with, while it learns."""

    def make(self) -> None:
        """Create every group's actors; they know nothing of each other yet."""
        for role in self.options:
            self.groups[role] = WorkerGroup(role, self._actors(role), self.workers[role].makes)

    def start(self, *roles: str) -> None:
        """Build the models of some groups, side by side, and give each what it needs of the others."""
        starting = [(self.groups[role], self.groups[role].start()) for role in roles]
        for group, references in starting:
            group.wait(references)
        if "student" in roles:
            student = self.groups["student"]
            student.wait(student.broadcast("refer", self.reference))

    def stop(self, role: str) -> None:
        """End a group's actors, those that are lost included."""
        for actor in self.groups[role].actors:
            ray.kill(actor)

    def rebuild(self, role: str) -> None:
        """A group's actors anew, in the same places and as they were at the start of the run.

        The group stays the same object for all who hold it. What it had learned is to be loaded, and what the
        other groups were asked with references to what it had made is to be asked again.
        """
        self.stop(role)
        self.groups[role].actors = self._actors(role)
        self.start(role)

    def _actors(self, role: str) -> list[ActorHandle]:
        make: Any = ray.remote(self.workers[role])
        options, settings = self.options[role], settings_of(self.config)[role]
        ranks = ranks_of(self.config)[role]
        return [
            make.options(**option).remote(rank=rank, ranks=ranks.ranks, threads=ranks.threads, **settings)
            for rank, option in enumerate(options)
        ]


@contextmanager
def placed_roles(config: RunConfig, *, grows: bool, reference: Reference | None = None) -> Iterator[Roles]:
    """The roles of a run with room reserved for their actors, none of which outlives the block.

    `grows` is whether more nodes may come (see `place`).
    """
    placed, options = place(ranks_of(config), config.placement, grows=grows)
    roles = Roles(config, options, reference=reference)
    try:
        roles.make()
        yield roles
    finally:
        for role in roles.groups:
            roles.stop(role)
        release(placed)
