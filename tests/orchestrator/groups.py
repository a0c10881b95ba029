"""The roles' real actors, in many configurations: each actor is started once and then rebuilt.

What a rebuilt rank runs is the worker's own code under the worker's own engine; only the process and its
process group are reused.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import ray
from ray.actor import ActorHandle
from torch import Tensor

from model.watch import Reference
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator, Metrics
from orchestrator.roles import Roles, actor_class, ranks_of, settings_of
from orchestrator.worker_group import WorkerGroup
from workers.actor import Rank, Worker
from workers.critic import CriticWorker
from workers.rollout import RolloutWorker
from workers.student import StudentWorker
from workers.teacher import TeacherWorker


class _Reusable(Rank):
    """A rank that becomes a worker with other settings, and notes the first gradients it makes."""

    def __init__(self, *, rank: int, ranks: int, threads: int, **settings: Any):
        Rank.__init__(self, rank=rank, ranks=ranks, threads=threads)
        self._settings = settings

    def start(self, address: str, port: int, timeout_s: float) -> None:
        """Whatever it becomes, its group is there; a replicated teacher that is made anew needs none."""
        if (
            "engine" not in self._settings
            and self._settings.get("zero_stage") == 0 == self._settings["sequence"] - 1
        ):
            self.build()
        else:
            Rank.start(self, address, port, timeout_s)

    def build(self) -> None:
        """What it is made with, if anything; else `become` builds."""
        if self._settings:
            self.become(self._settings)

    def become(self, settings: dict[str, Any]) -> None:
        self.__dict__.pop("engine", None)
        gc.collect()
        worker: Any = super()
        worker.__init__(rank=self.rank, ranks=self.ranks, threads=1, **settings)
        worker.build()
        self._first: dict[str, Tensor] = {}
        if "engine" in settings:
            step = self.engine.step

            def watched() -> Any:
                if not self._first:
                    with suppress(RuntimeError):  # a micro-batch that is not an update's last
                        self._first = self.engine.gradients()
                return step()

            self.engine.step = watched

    def first_gradients(self) -> dict[str, Tensor]:
        return self._first

    def weights(self, *, ema: bool = False) -> dict[str, Tensor]:
        """Whole fp32 weights by name; on all ranks at once, from rank 0."""
        tensors: dict[str, Tensor] = {}
        self.engine.export(tensors.__setitem__, ema=ema)
        return tensors


class ReusableStudent(_Reusable, StudentWorker):
    pass


class ReusableTeacher(_Reusable, TeacherWorker):
    pass


class ReusableCritic(_Reusable, CriticWorker):
    pass


class ReusableRollout(_Reusable, RolloutWorker):
    pass


KINDS: dict[str, type[Worker]] = {
    "student": ReusableStudent,
    "teacher": ReusableTeacher,
    "critic": ReusableCritic,
    "rollout": ReusableRollout,
}


class Groups:
    """Groups of one and of two ranks of every role, each of them made when it is first asked for."""

    def __init__(self) -> None:
        self.made: dict[tuple[str, int], WorkerGroup] = {}

    def group(self, role: str, ranks: int) -> WorkerGroup:
        """That group, whatever a test has left of it."""
        if (group := self.made.get((role, ranks))) is not None:
            self._repair(group, ranks)
            return group
        group = WorkerGroup(role, self._actors(role, ranks), KINDS[role].makes)
        group.wait(group.start(timeout_s=120))
        self.made[role, ranks] = group
        return group

    def _actors(self, role: str, ranks: int) -> list[ActorHandle]:
        make = actor_class(KINDS[role]).options(num_cpus=0)
        return [make.remote(rank=rank, ranks=ranks, threads=1) for rank in range(ranks)]

    def _repair(self, group: WorkerGroup, ranks: int) -> None:
        """A group that a test has left with lost ranks, or with others than its own, is made anew."""
        try:
            ray.get([actor.pulse.remote() for actor in group.actors])
            if len(group.actors) == ranks:
                return
        except ray.exceptions.RayActorError:
            pass
        for actor in group.actors:
            ray.kill(actor)
        group.actors = self._actors(group.role, ranks)
        group.wait(group.start(timeout_s=120))

    def close(self) -> None:
        """End all actors; they are made again when they are asked for."""
        for group in self.made.values():
            for actor in group.actors:
                ray.kill(actor)
        self.made.clear()

    def roles(self, config: RunConfig) -> Roles:
        """Freshly built roles; their predecessors are gone."""
        ranks, settings = ranks_of(config), settings_of(config)
        groups = {role: self.group(role, each.ranks) for role, each in ranks.items()}
        for role, group in groups.items():
            group.together = ranks[role].ranks // ranks[role].groups
        options = {role: [{"num_cpus": 0}] * len(group.actors) for role, group in groups.items()}
        pending = {role: group.broadcast("become", settings[role]) for role, group in groups.items()}
        for role, group in groups.items():
            group.wait(pending[role])
        return Roles(config, options, workers=KINDS, groups=groups)

    def coordinator(self, config: RunConfig) -> Coordinator:
        return Coordinator(config, self.roles(config).groups)


@contextmanager
def all_groups() -> Iterator[Groups]:
    groups = Groups()
    try:
        yield groups
    finally:
        groups.close()


def weights_of(group: WorkerGroup, *, ema: bool = False) -> dict[str, Tensor]:
    """The group's whole weights, from rank 0."""
    return ray.get([actor.weights.remote(ema=ema) for actor in group.actors])[0]


def first_gradients_of(group: WorkerGroup) -> dict[str, Tensor]:
    """The whole gradients of the group's first update, from rank 0."""
    return ray.get(group.actors[0].first_gradients.remote())


def measured(metrics: Metrics) -> Metrics:
    """What a run measured, without timings."""
    return {name: value for name, value in metrics.items() if not name.startswith(("seconds/", "idle/"))}


@dataclass
class _Started(Roles):
    """Roles that are built already."""

    built: bool = True

    def start(self, *roles: str) -> None:
        """At first they are."""
        if not self.built:
            super().start(*roles)
            return
        self.built = False
        for role, group in self.groups.items():
            self.processes[role] = group.wait(group.broadcast("process"))


@contextmanager
def reused_roles(groups: Groups, config: RunConfig, reference: Reference | None = None) -> Iterator[Roles]:
    """What `placed_roles` gives, on actors that are there: for runs of which other things are looked at than
    their start."""
    roles = groups.roles(config)
    student = roles.groups["student"]
    student.wait(student.broadcast("refer", reference))
    yield _Started(config, roles.options, workers=KINDS, groups=roles.groups, reference=reference)
    for group in roles.groups.values():
        group.look = lambda: None
