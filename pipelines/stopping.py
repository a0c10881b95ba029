"""Ending a run by request: with a checkpoint, and only then.

SIGTERM (which is how Ray stops a job, and Kubernetes a pod) or Ctrl-C asks for it, and a second one ends the
process at once. A stage asks `Stopping` after each update.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from pipelines.console import say

_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
_foreign = False  # whether the output belongs to another process by now, so that nothing may be written there


class Stopped(SystemExit):
    """A run that ended by request, with a checkpoint; the exit code is that of a process that it ended."""

    def __init__(self, code: int, done: int):
        super().__init__(code)
        self.done = done


@dataclass
class Stopping:
    """What was asked of a stage that is under way."""

    stage: str
    by: signal.Signals | None = None

    def __bool__(self) -> bool:
        """Whether the run is to end after the update that is under way."""
        return self.by is not None

    def stop(self, done: int) -> Stopped:
        """What to raise once the checkpoint after `done` updates is stored."""
        assert self.by is not None
        say(
            f"{self.stage}: stopped by {_NAMES[self.by]} after {done} updates, with a checkpoint; --resume "
            "goes on from there."
        )
        return Stopped(_CODES[self.by], done)


@contextmanager
def stoppable(stage: str) -> Iterator[Stopping]:
    """Inside the block, which runs in the main thread, signals ask; Ray's own handlers come back after it."""
    stopping = Stopping(stage)

    def asked(number: int, _: Any) -> None:
        by = signal.Signals(number)
        if stopping or _foreign:
            if by == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(_CODES[by])
        stopping.by = by
        say(
            f"{stage}: {_NAMES[by]}: ends after the update that is under way, with a checkpoint; "
            "once more ends it at once."
        )

    before = {number: signal.signal(number, asked) for number in _CODES}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def at_once() -> None:
    """End this process's run from another thread, with nothing more written to its output."""
    global _foreign
    _foreign = True
    os.kill(os.getpid(), signal.SIGINT)
