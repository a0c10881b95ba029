"""Signs of life of ranks: a process that is stopped, and one that stays in a call for too long, are found out
by a question that needs neither the stuck thread nor the collective that it waits in."""

import math
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle

from orchestrator.fault import Fault, told

THREAD = "pulse"
"""Name of the thread of an actor (Ray's concurrency group) that answers."""
LOOKS = 6
"""Questions within the silence after which a process counts as hung, for a call of every rank costs."""
Found = dict[str, dict[int, Fault]]
"""Faults by role and rank."""


@dataclass
class Pulses:
    """The last question that each rank was asked. Several threads may look."""

    silence_s: float
    """Seconds without an answer after which a process counts as hung."""
    stuck_s: float
    """Seconds in one call after which it does."""
    start_s: float
    """Seconds that a new process has for its first answer: it may wait for a place, and imports a lot."""
    clock: Callable[[], float] = time.monotonic
    _asked: dict[ActorHandle, tuple[ObjectRef, float]] = field(default_factory=dict)
    _at: dict[ActorHandle, str] = field(default_factory=dict)
    """The call that each rank that stands was at when it last answered."""
    _looked: float = -math.inf
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def look(self, groups: Mapping[str, Any]) -> None:
        """Never waits, and asks no more often than the silence calls for; Fault of the first rank that is
        lost or hangs."""
        if self.clock() - self._looked < self.silence_s / LOOKS:
            return
        self._looked = self.clock()
        for faults in self._faults(groups).values():
            raise next(iter(faults.values()))

    def started(self, groups: Mapping[str, Any]) -> None:
        """All ranks stand, so that none has the patience any more that a new process has."""
        with self._lock:
            for group in groups.values():
                for actor in group.actors:
                    self._at.setdefault(actor, "")

    def survey(self, groups: Mapping[str, Any]) -> Found:
        """What is wrong with any rank, once each has answered or was silent for too long."""
        with self._lock:
            self._asked.clear()
        self._faults(groups)  # asks
        asked = [reference for reference, _ in self._asked.values()]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=self.silence_s)
        return self._faults(groups)

    def torn(self, groups: Mapping[str, Any]) -> set[str]:
        """The groups of which some ranks stay in a call that others have left, or never came to: they wait
        in a collective for ever."""
        until = self.clock() + self.silence_s
        while True:
            if found := set(self.survey(groups)):
                return found
            mixed = {
                role
                for role, group in groups.items()
                if len({bool(self._at.get(actor)) for actor in group.actors}) > 1
            }
            if not mixed or self.clock() >= until:
                return mixed
            time.sleep(0.05)

    def _faults(self, groups: Mapping[str, Any]) -> Found:
        with self._lock:
            ranks = [(role, *each) for role in groups for each in enumerate(groups[role].actors)]
            self._asked = {actor: self._asked[actor] for *_, actor in ranks if actor in self._asked}
            self._at = {actor: self._at[actor] for *_, actor in ranks if actor in self._at}
            asked = [reference for reference, _ in self._asked.values()]
            ready = set(ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else ())
            found: Found = {}
            for role, rank, actor in ranks:
                fault = None
                if actor in self._asked:
                    reference, since = self._asked[actor]
                    if reference in ready:
                        fault = self._of(role, rank, actor, reference)
                        del self._asked[actor]
                    elif (silent := self.clock() - since) >= self._patience(actor):
                        what = f"{role} rank {rank} has given no sign of life for {silent:.0f} s"
                        fault = Fault(role, "hung", what)
                if fault is not None:
                    found.setdefault(role, {})[rank] = fault
                elif actor not in self._asked:
                    ask: Any = actor.pulse.options(concurrency_group=THREAD)
                    self._asked[actor] = ask.remote(), self.clock()
            return found

    def _patience(self, actor: ActorHandle) -> float:
        return self.silence_s if actor in self._at else self.start_s

    def _of(self, role: str, rank: int, actor: ActorHandle, answer: ObjectRef) -> Fault | None:
        try:
            self._at[actor], seconds = ray.get(answer)
        except ray.exceptions.RayError as error:
            lost = told(role, error)
            return lost if isinstance(lost, Fault) else Fault(role, "code", str(lost))
        if seconds < self.stuck_s:
            return None
        where = f"{role} rank {rank} has been in {self._at[actor]} for {seconds:.0f} s"
        return Fault(role, "hung", where)
