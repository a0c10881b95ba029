"""What to do about a fault: a state machine that does nothing itself, and knows no clock but the one it is
given.

A fault that comes again at the same update, as a bad batch, a mistake in the code or too little memory would,
ends the run with an account; so do too many faults without a new update in between. Any other is worth
another attempt, which `supervisor` makes.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from infra.settings import at_least, positive
from orchestrator.fault import Fault, Kind

LEARNING = ("student", "critic")
"""Roles whose state a checkpoint holds."""
_FROM_OUTSIDE: tuple[Kind, ...] = ("node", "storage")
"""Kinds that say nothing about the update at which they happen."""
_LIKELY: Mapping[Kind, str] = {
    "lost": "something in this update may end the process, such as the system's killer of processes that "
    "take too much memory: look at the node's log",
    "node": "nodes are lost faster than updates are made",
    "hung": "raise {stage}.faults.stuck_s if its calls take that long",
    "memory": "lower {stage}.batch, raise the role's engine.accumulation, or turn on its "
    "activation_checkpointing",
    "peer": "ranks cannot reach each other: look at the network between the nodes",
    "storage": "look at the storage",
    "code": "this is a mistake in the code or in this batch of the data: --traceback shows where",
}


@dataclass(frozen=True)
class RetryConfig:
    """What a stage does about lost ranks."""

    attempts: int = 8
    """Faults in a row, without an update made between them that was not made before, that end the run; 1 ends
    it at the first."""
    backoff_s: float = 1.0
    """Seconds before the second attempt in a row; each further one waits twice as long, a minute at most."""

    def __post_init__(self) -> None:
        at_least(self, 1, "attempts")
        at_least(self, 0, "backoff_s")


@dataclass(frozen=True)
class FaultConfig(RetryConfig):
    """What a distillation does about lost workers."""

    silence_s: float = 60.0
    """Seconds without a sign of life after which a process counts as hung."""
    stuck_s: float = 1800.0
    """Seconds in one call, such as a rollout or the reading of a checkpoint, after which it does."""
    replace_s: float = 600.0
    """Seconds to wait for something in place of a lost node, where a group may not go on with fewer ranks."""
    snapshot_every: int = 0
    """Iterations between copies of the training state in the memory of the nodes (Ray's object store), which
    a lost process does not take with it; 0 makes none. At 14B two copies of 390 GB over all nodes."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "replace_s", "snapshot_every")
        positive(self, "silence_s", "stuck_s")


class GivenUp(RuntimeError):
    """A run that ends because of a fault, with an account of it."""


@dataclass(frozen=True)
class Event:
    """One fault and what it cost."""

    at: int
    """Updates that were done when it was found."""
    role: str
    kind: Kind
    what: str
    back_to: int | None = None
    """Updates that were done after recovery; None if there was none."""
    seconds: float = 0.0
    """From the moment that it was found to the moment that updates went on."""


@dataclass
class Recovery:
    """The faults of one run so far."""

    config: RetryConfig
    clock: Callable[[], float] = time.monotonic
    stage: str = "distill"
    furthest: int = 0
    """Most updates that were ever done."""
    in_a_row: int = 0
    """Faults since then."""
    events: list[Event] = field(default_factory=list)
    _seen: dict[tuple[int, str, Kind], str] = field(default_factory=dict)
    _open: tuple[Event, float] | None = None

    def progressed(self, done: int) -> None:
        """`done` updates are made: those that had faults are behind, and attempts are whole again."""
        self._seen = {key: what for key, what in self._seen.items() if key[0] >= done}
        if done > self.furthest:
            self.furthest, self.in_a_row = done, 0

    def failed(self, fault: Fault, done: int) -> float:
        """Seconds to wait before another attempt after a fault that was met after `done` updates.

        GivenUp where none is worth it.
        """
        recovering = self._open is not None
        since = self.clock() if self._open is None else self._open[1]
        self._open = Event(done, fault.role, fault.kind, str(fault)), since
        self.in_a_row += 1
        key = (done, fault.role, fault.kind)
        # What fails while groups are made anew says nothing of the update.
        if not recovering and fault.kind not in _FROM_OUTSIDE:
            if key in self._seen:
                raise self._given_up(f"update {done} failed twice in the same way") from fault
            self._seen[key] = str(fault)
        if self.in_a_row >= self.config.attempts:
            raise self._given_up(
                f"{self.in_a_row} faults in a row without a new update ({self.stage}.faults.attempts is "
                f"{self.config.attempts})"
            ) from fault
        waits = self.in_a_row - 2
        return min(self.config.backoff_s * 2**waits, 60.0) if waits >= 0 else 0.0

    def recovered(self, done: int) -> Event:
        """Updates go on after `done` of them."""
        assert self._open is not None, "there was a fault"
        (event, since), self._open = self._open, None
        self.events.append(replace(event, back_to=done, seconds=self.clock() - since))
        return self.events[-1]

    def _given_up(self, why: str) -> GivenUp:
        assert self._open is not None
        event, since = self._open
        self.events.append(replace(event, seconds=self.clock() - since))
        helps = _LIKELY[event.kind].format(stage=self.stage)
        return GivenUp(
            f"{self.stage}: {why}: {event.what}. What helps: {helps}; then --resume continues from the "
            "newest checkpoint."
        )
