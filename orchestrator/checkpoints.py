"""Checkpoints of a distillation, written beside training.

Training waits while every rank copies what it learned to host memory. What follows (writing, uploading,
hashing, publishing, pruning) goes on meanwhile, one checkpoint at a time.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event
from typing import Self

import ray
from ray import ObjectRef

from infra import storage
from infra.storage import StorageError
from orchestrator.fault import Fault
from orchestrator.recovery import LEARNING
from orchestrator.run_state import RunState
from orchestrator.worker_group import WorkerGroup

LONGEST_LOOK_S = 1.0
"""Seconds at most between two looks at whether the ranks have written."""


def load(path: str, groups: Mapping[str, WorkerGroup]) -> None:
    """Every rank of a role that learns reads its part of a checkpoint."""
    loading = [(groups[role], groups[role].broadcast("load", path, role)) for role in LEARNING]
    for group, references in loading:
        group.wait(references)


@dataclass
class Cadence:
    """When a checkpoint is due: after so many updates, or so many minutes after the last."""

    every: int
    minutes: float | None
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._last = self.clock()

    def due(self, done: int, *, asked: bool = False) -> bool:
        """Whether one is, after `done` updates, or where it is `asked` for; then it counts as made."""
        passed = self.minutes is not None and self.clock() - self._last >= 60 * self.minutes
        if asked or passed or done % self.every == 0:
            self._last = self.clock()
            return True
        return False


@dataclass(frozen=True)
class Held:
    """A state in the memory of the nodes: one object a rank, of which Ray knows where it is."""

    done: int
    position: int
    parts: Mapping[str, list[ObjectRef]]
    """By role, rank by rank."""

    def there(self, groups: Mapping[str, WorkerGroup]) -> bool:
        """Whether all of it has been copied, for groups of as many ranks as these."""
        references = [each for parts in self.parts.values() for each in parts]
        ready, _ = ray.wait(references, num_returns=len(references), timeout=0, fetch_local=False)
        same = all(len(groups[role].actors) == len(parts) for role, parts in self.parts.items())
        return same and len(ready) == len(references)


@dataclass
class Checkpoints:
    """The checkpoints of one run; leaving the block waits for the last, unless an error ends it."""

    state: RunState
    groups: Mapping[str, WorkerGroup]
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoints"))
    _writing: "tuple[int, Future[float]] | None" = None
    _gone: Event = field(default_factory=Event)
    begun: int | None = None
    """Updates of the last one that was begun."""
    saved: RunState = field(init=False)
    """The run after the newest that is there; none that was found damaged when the run began."""
    _held: list[Held] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.saved = self.state

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if kind is None:
                self.end()
        finally:
            self._gone.set()
            self._thread.shutdown(wait=kind is None)

    def begin(self, done: int, position: int) -> None:
        """Begin the checkpoint after `done` updates, which used `position` samples of the data, once the one
        before has ended.

        Waits for copies alone. FloatingPointError, with nothing begun, where what was learned is not finite.
        """
        assert self._writing is None, "one at a time"
        copies = [(self.groups[role], self.groups[role].broadcast("snapshot")) for role in LEARNING]
        for group, references in copies:
            group.wait(references)
        self._writing = done, self._thread.submit(self._write, done, position)
        self.begun = done

    def look(self) -> dict[str, float]:
        """As `end`, but never waits: of what is still being written the next look may tell."""
        return self.end() if self._writing is not None and self._writing[1].done() else {}

    def end(self) -> dict[str, float]:
        """Wait until what was begun is published: how long all of it took. StorageError where it cannot
        be."""
        if self._writing is None:
            return {}
        (_, writing), self._writing = self._writing, None
        return {"seconds/checkpoint_stored": writing.result()}

    def hold(self, done: int, position: int) -> None:
        """Have a copy of the state after `done` updates made in the memory of the nodes; waits for nothing.

        The one before stays until it is there.
        """
        parts = {role: self.groups[role].broadcast("hold") for role in LEARNING}
        newest = [each for each in self._held if each.there(self.groups)][-1:]
        self._held = [*newest, Held(done, position, parts)]

    def restore(self) -> tuple[int, int]:
        """Every rank of a role that learns returns to the newest state that is whole, in memory or in a
        checkpoint: its updates, and the samples of the data that they used; (0, 0) where there is none.
        """
        saved, (held, self._held) = self.saved, (self._held, [])
        for each in reversed(held):
            if each.done > saved.done and each.there(self.groups) and self._received(each):
                for role in LEARNING:
                    self.groups[role].wait(self.groups[role].broadcast("take"))
                return each.done, each.position
        if saved.checkpoint:
            load(saved.checkpoint, self.groups)
        return saved.done, saved.position

    def _received(self, held: Held) -> bool:
        """Whether every rank has got its part: those on a node that is gone are gone with it, and what is not
        finite was never copied."""
        try:
            for role, parts in held.parts.items():
                group = self.groups[role]
                group.wait([group.ask(rank, "receive", part) for rank, part in enumerate(parts)])
        except (Fault, FloatingPointError):
            return False
        return True

    def abandon(self) -> None:
        """Wait until what was begun has ended, well or not: after the loss of a rank it may be either."""
        with suppress(Exception):
            self.end()

    @property
    def pending(self) -> int | None:
        """Updates of the checkpoint that is being written, if any."""
        return None if self._writing is None else self._writing[0]

    def _write(self, done: int, position: int) -> float:
        began = time.perf_counter()
        staging = storage.begin(self.state.path(done))
        groups = [self.groups[role] for role in LEARNING]
        try:
            for group in groups:
                group.wait(group.broadcast("write", staging, group.role))
            for group in groups:
                for rank in range(len(group.actors)):
                    self._wait_for(group, rank)
            self.state.publish(staging, done, position)
            self.saved = self.state.at(done, position)
        except BaseException:
            self._remove(staging, groups)
            raise
        return time.perf_counter() - began

    def _wait_for(self, group: WorkerGroup, rank: int) -> None:
        """Wait until a rank has written its part; StorageError where it cannot, or the run is over."""
        pause = 0.01
        while not group.wait(group.ask(rank, "written")):
            if self._gone.wait(pause):
                raise StorageError("The checkpoint was given up with the run.")
            pause = min(2 * pause, LONGEST_LOOK_S)

    def _remove(self, staging: str, groups: Sequence[WorkerGroup]) -> None:
        """Remove what was written of a checkpoint that came to nothing, once nobody writes there any more."""
        for group in groups:
            for rank in range(len(group.actors)):
                with suppress(Exception):  # of a rank that is lost, nothing more comes
                    self._wait_for(group, rank)
        with suppress(StorageError):  # then it is left, and later cleaned
            storage.discard(staging)
