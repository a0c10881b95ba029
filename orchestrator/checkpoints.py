"""Checkpoints of a distillation, written beside training.

Training waits while every rank copies what it learned to host memory. What follows (writing, uploading,
hashing, publishing, pruning) goes on meanwhile, one checkpoint at a time.
"""

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Event
from typing import Self

from infra import storage
from infra.storage import StorageError
from orchestrator.run_state import RunState
from orchestrator.worker_group import WorkerGroup

LEARNING = ("student", "critic")
"""Roles whose state a checkpoint holds."""
LONGEST_LOOK_S = 1.0
"""Seconds at most between two looks at whether the ranks have written."""


def load(path: str, groups: Mapping[str, WorkerGroup]) -> None:
    """Every rank of a role that learns reads its part of a checkpoint."""
    for role in LEARNING:
        groups[role].wait(groups[role].broadcast("load", path, role))


@dataclass
class Checkpoints:
    """The checkpoints of one run; leaving the block waits for the last, unless an error ends it."""

    state: RunState
    groups: Mapping[str, WorkerGroup]
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoints"))
    _writing: "tuple[int, Future[float]] | None" = None
    _gone: Event = field(default_factory=Event)

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

    @property
    def pending(self) -> int | None:
        """Updates of the checkpoint that is being written, if any."""
        return None if self._writing is None else self._writing[0]

    def _write(self, done: int, position: int) -> float:
        began, pause = time.perf_counter(), 0.01
        staging = storage.begin(self.state.path(done))
        groups = [self.groups[role] for role in LEARNING]
        for group in groups:
            group.wait(group.broadcast("write", staging, group.role))
        while not all(all(group.wait(group.broadcast("written"))) for group in groups):
            if self._gone.wait(pause):
                raise StorageError(f"{self.state.path(done)} was given up with the run.")
            pause = min(2 * pause, LONGEST_LOOK_S)
        self.state.publish(staging, done, position)
        return time.perf_counter() - began
