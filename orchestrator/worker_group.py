"""N ranks of a role as one handle: say the same to all of them, or share samples out over them.

Tensors go from worker to worker through the object store; here are only references, and `Stats` to read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from orchestrator.fault import Fault, told
from workers.actor import Stats
from workers.batch import Batch

CONNECT_TIMEOUT_S = 600.0
LOOK_EVERY_S = 2.0
"""Seconds between two looks at the ranks while somebody waits for them."""


class WorkerGroup:
    """The actors of one role, rank by rank."""

    def __init__(
        self, role: str, actors: Sequence[ActorHandle], makes: Sequence[str] = (), together: int = 1
    ):
        """`makes` are the predictions that they can be asked for, if they are scorers; `together` is how many
        ranks get the same samples, and share the work on them."""
        self.role = role
        self.actors = list(actors)
        self.makes = tuple(makes)
        self.together = together
        self.look: Callable[[], None] = lambda: None
        """Called now and then while somebody waits; raises what keeps the answer from ever coming."""

    def start(self, timeout_s: float = CONNECT_TIMEOUT_S) -> list[ObjectRef]:
        """Ask for the process group to be formed and the models to be built."""
        address, port = self.wait(self.ask(0, "address"))
        return self.broadcast("start", address, port, timeout_s)

    def broadcast(self, method: str, *arguments: Any) -> list[ObjectRef]:
        """The same call on every rank."""
        return [self.ask(rank, method, *arguments) for rank in range(len(self.actors))]

    def ask(self, rank: int, method: str, *arguments: Any) -> ObjectRef:
        """A call on one rank; `Worker.call` is the other half."""
        call: Any = self.actors[rank].call.options(name=f"{self.role}.{method}")
        return call.remote(method, *arguments)

    def scatter(
        self, verb: str, plan: Any, batch: Batch, makes: Sequence[str] = ()
    ) -> tuple["Request", Batch]:
        """Ask for a verb, samples shared out evenly: each rank, or ranks that work together, gets the plan
        and a part of each column.

        Returns what to wait for, and the columns `makes` of what the verb makes, in the order of the samples;
        what nobody names is neither sent nor kept. `Worker.answer` is the other half.
        """
        groups = len(self.actors) // self.together
        share = len(batch) // groups
        if share * groups != len(batch):
            raise ValueError(f"{len(batch)} samples do not divide over {groups} {self.role} ranks.")
        stats: list[ObjectRef] = []
        made: dict[str, list[ObjectRef]] = {name: [] for name in makes}
        for rank, actor in enumerate(self.actors):
            group, place = divmod(rank, self.together)
            part = batch.rows(group * share, (group + 1) * share)
            references = [reference for column in part.columns.values() for reference in column]
            # What ranks make together, the first of them has as well.
            wanted = list(made) if place == 0 else []
            ask: Any = actor.answer.options(name=f"{self.role}.{verb}", num_returns=1 + len(wanted) * share)
            answer = ask.remote(verb, plan, part.samples, list(part.columns), wanted, *references)
            first, *rest = answer if wanted else [answer]
            stats.append(first)
            if not wanted:
                continue
            for index, column in enumerate(made.values()):
                column += rest[index * share : (index + 1) * share]
        return Request(self, verb, stats), Batch(batch.samples, made)

    def wait(self, references: Any) -> Any:
        """`ray.get`, with a worker's own failure raised as what it was, and whatever else as a Fault."""
        while True:
            try:
                return ray.get(references, timeout=LOOK_EVERY_S)
            except ray.exceptions.GetTimeoutError:
                self.look()
            except ray.exceptions.RayError as error:
                # Chained, so that --traceback shows where in the worker it was.
                raise told(self.role, error) from error


@dataclass(frozen=True)
class Request:
    """A verb that a group was asked for."""

    group: WorkerGroup
    verb: str
    stats: list[ObjectRef]  # what each rank will have measured

    def wait(self) -> Stats:
        """Wait until every rank is done: the mean of their numbers, and the most `memory`.

        Fault where ranks are at different steps.
        """
        answers: list[Mapping[str, float]] = self.group.wait(self.stats)
        if len(steps := {answer.get("steps") for answer in answers}) > 1:
            what = f"{self.group.role} ranks are at different steps: {steps}"
            raise Fault(self.group.role, "code", what)
        return {
            name: (max if name == "memory" else fmean)(answer[name] for answer in answers)
            for name in answers[0]
        }
