"""The roles' real actors, of which a test session needs many configurations: each actor is started once and then rebuilt.

What a rebuilt rank runs is the worker's own code under the worker's own engine; only the process and its process group are reused.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from torch import Tensor

from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.worker_group import WorkerGroup
from pipelines.distill import worker_settings
from workers.actor import Rank
from workers.critic import CriticWorker
from workers.prompts import PromptWorker
from workers.scorers import TeacherWorker
from workers.student import StudentWorker


class _Reusable(Rank):
    """A rank that becomes a worker with other settings, and notes the first gradients it makes."""

    def __init__(self, *, rank: int, ranks: int):
        Rank.__init__(self, rank=rank, ranks=ranks, threads=1)

    def build(self) -> None:
        """Nothing yet: `become` builds."""

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


class ReusablePrompts(PromptWorker):
    def __init__(self) -> None:
        pass

    def become(self, *arguments: Any) -> None:
        PromptWorker.__init__(self, *arguments)


KINDS = {"student": ReusableStudent, "teacher": ReusableTeacher, "critic": ReusableCritic}


class Groups:
    """Groups of one and of two ranks of every role."""

    def __init__(self) -> None:
        self.prompts = ray.remote(ReusablePrompts).options(num_cpus=0).remote()
        self.made = {
            (role, ranks): WorkerGroup(
                role,
                [
                    ray.remote(kind).options(num_cpus=0).remote(rank=rank, ranks=ranks)
                    for rank in range(ranks)
                ],
            )
            for role, kind in KINDS.items()
            for ranks in (1, 2)
        }
        for group in self.made.values():
            group.start(timeout_s=120)

    def close(self) -> None:
        for actor in [self.prompts, *(actor for group in self.made.values() for actor in group.actors)]:
            ray.kill(actor)

    def coordinator(self, config: RunConfig) -> Coordinator:
        """A coordinator of freshly built roles; its predecessor's are gone."""
        distill, roles = config.distill, config.distill.roles
        settings = worker_settings(config)
        ranks = {"student": roles.student.ranks, "teacher": roles.teacher.ranks, "critic": roles.critic.ranks}
        groups = {role: self.made[role, ranks[role]] for role in KINDS}
        pending = {role: group.broadcast("become", settings[role]) for role, group in groups.items()}
        ray.get(self.prompts.become.remote(config.data.train, config.seed, distill.student, config.data.real))
        for role, group in groups.items():
            group.wait(pending[role])
        uncond = self.prompts.unconditional.remote(
            roles.teacher.negative_prompt, roles.teacher.negative_embedding
        )
        return Coordinator(config, **groups, prompts=self.prompts, uncond=uncond)


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
