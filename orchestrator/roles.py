"""The roles of a distillation: which there are, and how each one's group is made, started, stopped and made
anew."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from infra.storage.local import started
from model.watch import Reference
from orchestrator.cluster import release
from orchestrator.config import RunConfig
from orchestrator.layout import fitted
from orchestrator.placement import Options, place, there
from orchestrator.pulses import THREAD
from orchestrator.stages import AdaptedRole, RanksConfig
from orchestrator.worker_group import WorkerGroup
from workers.actor import Worker
from workers.critic import CriticWorker
from workers.prompts import TrainingData
from workers.rollout import RolloutWorker
from workers.student import StudentWorker
from workers.teacher import TeacherWorker

WORKERS: dict[str, type[Worker]] = {
    "student": StudentWorker,
    "teacher": TeacherWorker,
    "critic": CriticWorker,
    "rollout": RolloutWorker,
}


def actor_class(kind: type) -> Any:
    """What makes actors of a kind of rank; beside its calls, each gives signs of life."""
    remote: Any = ray.remote
    return remote(concurrency_groups={THREAD: 1})(kind)


def ranks_of(config: RunConfig) -> dict[str, RanksConfig]:
    """The roles with devices that the run needs. A teacher that the objective does not read is none."""
    roles = config.distill.roles
    teacher: dict[str, RanksConfig] = {"teacher": roles.teacher} if config.distill.needs_teacher else {}
    replicas: dict[str, RanksConfig] = {"rollout": roles.rollout} if roles.rollout.ranks else {}
    return {"student": roles.student, **teacher, "critic": roles.critic, **replicas}


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
            "compile": distill.compile,
            "gather": distill.gather,
            **learning(roles.student),
        },
        "rollout": {
            "model": distill.student,
            "data": data,
            "rollout": config.rollout,
            "dtype": roles.rollout.dtype,
            "compile": distill.compile,
        },
        "teacher": {
            "model": distill.teacher,
            "data": data,
            "score": config.score,
            "zero_stage": roles.teacher.zero_stage,
            "dtype": roles.teacher.dtype,
            "guidance": roles.teacher.guidance,
            "sequence": roles.teacher.sequence,
            "negative_prompt": roles.teacher.negative_prompt,
            "negative_embedding": roles.teacher.negative_embedding,
        },
        "critic": {
            "model": distill.critic or distill.teacher,
            "data": data,
            "score": config.score,
            "discriminator": distill.discriminator,
            "relativistic": "data_logits" in distill.objective.reads,
            "sequence": roles.critic.sequence,
            **learning(roles.critic),
        },
    }


@ray.remote(num_cpus=0, max_retries=0)
def _kill(pid: int, since: int) -> None:
    if started(pid) == since:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@dataclass
class Roles:
    """The groups of one run, made from its config with the Ray options of each rank."""

    config: RunConfig
    options: Mapping[str, Sequence[Options]]
    workers: Mapping[str, type[Worker]] = field(default_factory=lambda: WORKERS)
    groups: dict[str, WorkerGroup] = field(default_factory=dict)
    reference: Reference | None = None
    """What the student's videos are compared with, while it learns."""
    processes: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    """Of each role's ranks: the id of the node, the process there, and when it was started."""

    full: RunConfig = field(init=False)
    """With as many ranks as the run was begun with; `config` has fewer while nodes are missing."""
    _used: dict[str, list[Options]] = field(default_factory=dict)
    _made: dict[str, RanksConfig] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.full, self._used = self.config, {role: list(each) for role, each in self.options.items()}
        self._made = dict(ranks_of(self.config))

    def make(self) -> None:
        """Create every group's actors; they know nothing of each other yet."""
        for role in self.options:
            ranks = ranks_of(self.config)[role]
            together = ranks.ranks // ranks.groups
            self.groups[role] = WorkerGroup(role, self._actors(role), self.workers[role].makes, together)

    def start(self, *roles: str) -> None:
        """Build the models of some groups, side by side, and give each what it needs of the others."""
        starting = [(self.groups[role], self.groups[role].start()) for role in roles]
        for group, references in starting:
            group.wait(references)
            self.processes[group.role] = group.wait(group.broadcast("process"))
        if "student" in roles:
            student = self.groups["student"]
            student.wait(student.broadcast("refer", self.reference))

    def stop(self, role: str) -> None:
        """End a group's actors, those that are lost or hang included."""
        for rank in range(len(self.groups[role].actors)):
            self._end(role, rank)

    def _end(self, role: str, rank: int) -> None:
        """Ray asks a process to end; one that is stopped does not hear it and would keep its place, so it is
        also killed where it runs."""
        ray.kill(self.groups[role].actors[rank])
        processes = self.processes.get(role, [])
        if rank < len(processes):
            node, pid, since = processes[rank]
            where = NodeAffinitySchedulingStrategy(node, soft=False)
            _kill.options(scheduling_strategy=where).remote(pid, since)

    def nodes(self, role: str) -> list[str]:
        """Ids of the nodes that its ranks run on."""
        return [node for node, *_ in self.processes.get(role, ())]

    def rebuild(self, *roles: str) -> None:
        """Actors of some groups anew, in the same places and as they were at the start of the run.

        A group stays the same object for all who hold it. What it had learned is to be loaded, and what the
        other groups were asked with references to what it had made is to be asked again.
        """
        for role in roles:
            self.stop(role)
        for role in roles:
            self.groups[role].actors = self._actors(role)
        self.start(*roles)

    def replace(self, role: str, ranks: Iterable[int]) -> None:
        """Some ranks of a group anew, where they need no others: those of a replicated teacher."""
        group, started = self.groups[role], []
        for rank in ranks:
            self._end(role, rank)
            group.actors[rank] = self._actor(role, rank)
            started.append(group.ask(rank, "start", "", 0, 0.0))
        group.wait(started)
        self.processes[role] = group.wait(group.broadcast("process"))

    def room(self) -> dict[str, list[Options]]:
        """For each role the places of its ranks that are there now."""
        return {role: there(each) for role, each in self.options.items()}

    def fit(self) -> bool:
        """Choose as many ranks of each role as there is room for; whether there is for enough.

        What changes is the config; the groups whose size it changes are to be rebuilt.
        """
        room = self.room()
        config = self._fitted(room)
        if config is None:
            return False
        self.config = config
        self._used = {role: each[: ranks_of(config)[role].ranks] for role, each in room.items()}
        return True

    def more_room(self) -> bool:
        """Whether there is room for more ranks of some role than it has."""
        config = self._fitted(self.room())
        return config is not None and config != self.config

    def _fitted(self, room: Mapping[str, Sequence[Options]]) -> RunConfig | None:
        return fitted(self.full, {role: len(each) for role, each in room.items()})

    def has_places(self, role: str) -> bool:
        """Whether the places of all its ranks are there."""
        return len(there(self._used[role])) == len(self._used[role])

    @property
    def resized(self) -> set[str]:
        """Roles whose groups have another size, or other micro-batches, than the config says."""
        return {role for role in self.groups if self._made.get(role) != ranks_of(self.config)[role]}

    def _actors(self, role: str) -> list[ActorHandle]:
        return [self._actor(role, rank) for rank in range(len(self._used[role]))]

    def _actor(self, role: str, rank: int) -> ActorHandle:
        ranks, settings = ranks_of(self.config)[role], settings_of(self.config)[role]
        self._made[role] = ranks
        make = actor_class(self.workers[role]).options(**self._used[role][rank])
        return make.remote(rank=rank, ranks=ranks.ranks, threads=ranks.threads, **settings)


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
