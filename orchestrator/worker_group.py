"""N ranks of a role as one handle: say the same to all of them, or share samples out over them.

Tensors go from worker to worker through the object store; here are only references, and `Stats` to read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from infra.storage import StorageError
from workers.actor import Stats
from workers.batch import Batch

CONNECT_TIMEOUT_S = 600.0


class WorkerGroup:
    """The actors of one role, rank by rank."""

    def __init__(self, role: str, actors: Sequence[ActorHandle], makes: Sequence[str] = ()):
        """`makes` are the predictions that they can be asked for, if they are scorers."""
        self.role = role
        self.actors = list(actors)
        self.makes = tuple(makes)

    def start(self, timeout_s: float = CONNECT_TIMEOUT_S) -> list[ObjectRef]:
        """Ask for the process group to be formed and the models to be built."""
        address, port = self.wait(self.actors[0].address.remote())
        return self.broadcast("start", address, port, timeout_s)

    def broadcast(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """The same call on every rank."""
        return [getattr(actor, method).remote(*arguments) for actor in self.actors]

    def scatter(
        self, verb: str, plan: Any, batch: Batch, makes: Sequence[str] = ()
    ) -> tuple["Request", Batch]:
        """Ask for a verb, samples shared out evenly: each rank gets the plan and a part of each column.

        Returns what to wait for, and the columns `makes` of what the verb makes, in the order of the samples;
        what nobody names is neither sent nor kept. `Worker.answer` is the other half.
        """
        share = len(batch) // len(self.actors)
        if share * len(self.actors) != len(batch):
            raise ValueError(f"{len(batch)} samples do not divide over {len(self.actors)} {self.role} ranks.")
        stats: list[ObjectRef] = []
        made: dict[str, list[ObjectRef]] = {name: [] for name in makes}
        for rank, actor in enumerate(self.actors):
            part = batch.rows(rank * share, (rank + 1) * share)
            references = [reference for column in part.columns.values() for reference in column]
            ask: Any = actor.answer.options(name=f"{self.role}.{verb}", num_returns=1 + len(made) * share)
            answer = ask.remote(verb, plan, part.samples, list(part.columns), list(made), *references)
            first, *rest = answer if made else [answer]
            stats.append(first)
            for index, column in enumerate(made.values()):
                column += rest[index * share : (index + 1) * share]
        return Request(self, verb, stats), Batch(batch.samples, made)

    def wait(self, references: Any) -> Any:
        """`ray.get`, with a worker's own failure raised as what it was."""
        try:
            return ray.get(references)
        except ray.exceptions.RayTaskError as error:
            for kind in (StorageError, ValueError, FloatingPointError, RuntimeError):
                if isinstance(error.cause, kind):
                    # Chained, so that --traceback shows where in the worker it was.
                    raise kind(f"{self.role}: {error.cause}") from error
            raise
        except ray.exceptions.RayActorError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"a {self.role} rank was lost ({reason}); --resume continues from the newest checkpoint."
            ) from None


@dataclass(frozen=True)
class Request:
    """A verb that a group was asked for."""

    group: WorkerGroup
    verb: str
    stats: list[ObjectRef]  # what each rank will have measured

    def wait(self) -> Stats:
        """Wait until every rank is done: the mean of their numbers, and the most `memory`."""
        answers: list[Mapping[str, float]] = self.group.wait(self.stats)
        return {
            name: (max if name == "memory" else fmean)(answer[name] for answer in answers)
            for name in answers[0]
        }
