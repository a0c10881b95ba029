"""N ranks of a role as one handle: say a verb to all of them, or share samples out over them.

Tensors go from worker to worker through the object store; this module holds references and reads `Stats` only.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from workers.actor import Stats

CONNECT_TIMEOUT_S = 600.0


class WorkerGroup:
    """The actors of one role, rank by rank."""

    def __init__(self, role: str, actors: Sequence[ActorHandle]):
        self.role = role
        self.actors = list(actors)

    def start(self, timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Form the process group and build the models."""
        address, port = self.wait(self.actors[0].address.remote())
        self.wait(self.broadcast("start", address, port, timeout_s))

    def broadcast(self, verb: str, *arguments: Any) -> list[ObjectRef]:
        """The same call on every rank."""
        return [getattr(actor, verb).remote(*arguments) for actor in self.actors]

    def scatter(
        self,
        verb: str,
        samples: Sequence[int],
        *columns: Sequence[ObjectRef],
        head: Sequence[Any] = (),
        results: int = 1,
    ) -> tuple[list[ObjectRef], ...]:
        """Share samples out evenly: a rank is called with `head`, its samples' indices, and its part of every column.

        Returns the ranks' `Stats`, then as many columns as the verb has `results`, one reference a sample in the order of `samples`.
        """
        share = len(samples) // len(self.actors)
        if share * len(self.actors) != len(samples):
            raise ValueError(
                f"{len(samples)} samples do not divide over {len(self.actors)} {self.role} ranks."
            )
        stats: list[ObjectRef] = []
        made: list[list[ObjectRef]] = [[] for _ in range(results)]
        for rank, actor in enumerate(self.actors):
            part = slice(rank * share, (rank + 1) * share)
            tensors = [reference for column in columns for reference in column[part]]
            call = getattr(actor, verb).options(num_returns=1 + results * share)
            answer = call.remote(*head, list(samples[part]), *tensors)
            first, *rest = answer if results else [answer]
            stats.append(first)
            for index, column in enumerate(made):
                column += rest[index * share : (index + 1) * share]
        return stats, *made

    def wait(self, references: Any) -> Any:
        """`ray.get`, with a worker's own failure raised as what it was."""
        try:
            return ray.get(references)
        except ray.exceptions.RayTaskError as error:
            for kind in (ValueError, FloatingPointError, RuntimeError):
                if isinstance(error.cause, kind):
                    # Chained, so that --traceback shows where in the worker it was.
                    raise kind(f"{self.role}: {error.cause}") from error
            raise
        except ray.exceptions.RayActorError as error:
            reason = str(error).splitlines()[0]
            raise RuntimeError(
                f"a {self.role} rank was lost ({reason}); --resume continues from the newest checkpoint."
            ) from None

    def stats(self, references: Sequence[ObjectRef]) -> Stats:
        """The mean of the ranks' numbers."""
        answers: list[Mapping[str, float]] = self.wait(list(references))
        return {name: fmean(answer[name] for answer in answers) for name in answers[0]}
