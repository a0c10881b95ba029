"""The updates of a run that goes on when it loses workers.

A scorer that learns nothing is made anew in the middle of an update, which starts from `score` again. Where
a group that learns is lost, it is made anew, and every group that learns returns to one checkpoint: those
that are well only read it. What was rolled out ahead is thrown away, and the updates since are made again,
with the same numbers, for nothing random depends on when or where it is drawn.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from infra.storage import StorageError
from orchestrator.checkpoints import Checkpoints
from orchestrator.cluster import Draining
from orchestrator.coordinator import Coordinator, Metrics
from orchestrator.fault import Fault
from orchestrator.pulses import Pulses
from orchestrator.recovery import LEARNING, Event, FaultConfig, GivenUp, Recovery
from orchestrator.roles import Roles
from orchestrator.run_state import RunState

ROOM_EVERY_S = 1.0
"""Seconds between two looks at whether nodes have come."""


@dataclass
class Supervisor:
    """One run's updates and what keeps them going."""

    state: RunState
    roles: Roles
    checkpoints: Checkpoints
    faults: FaultConfig
    returned: Callable[[Event], None]
    """Told of every fault that is overcome, before updates go on; what is known of later ones is void."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def __post_init__(self) -> None:
        faults, self.done = self.faults, self.state.done
        self.recovery = Recovery(faults, self.clock, furthest=self.done)
        self._draining = Draining(self.clock)
        self._last: int | None = None  # updates after which the run ended
        self.pulses = Pulses(faults.silence_s, faults.stuck_s, faults.replace_s, self.clock)
        for group in self.roles.groups.values():
            group.look = self.look
        self.coordinator = self._coordinator(self.state.done, self.state.position)

    def look(self) -> None:
        """Raises the Fault of a rank that is lost or hangs, if there is one."""
        self.pulses.look(self.roles.groups)

    def run(self, after: Callable[[int, Metrics], bool], finish: Callable[[int], str]) -> str:
        """All updates, `after` each of which is told how many are done, and may end the run; what `finish`
        makes of the last state.

        GivenUp where a fault cannot be overcome.
        """
        while True:
            try:
                if self._updated(after):
                    return finish(self.done)
            except Fault as fault:
                self._overcome(fault)

    def _updated(self, after: Callable[[int, Metrics], bool]) -> bool:
        """Updates up to the last, or up to a moment at which groups change their size; whether it was the
        last."""
        if self._last == self.done:
            return True
        for done, metrics in self.coordinator.run(self.done):
            self.done = done
            self.recovery.progressed(done)
            if after(done, metrics):
                self._last = done
                return True
            every = self.faults.snapshot_every
            if every and done % every == 0 and self.checkpoints.begun != done:
                self.checkpoints.hold(done, self.coordinator.plan.position(done, "student", 0))
            if self.checkpoints.begun == done and self._grown():
                return False
        return True

    def leaving(self) -> set[str]:
        """Ids of nodes with ranks that Ray has begun to drain since this was last asked."""
        return self._draining.begun({node for role in self.roles.groups for node in self.roles.nodes(role)})

    def mend(self, fault: Fault) -> None:
        """Make a scorer that learns nothing anew, in the middle of an update; what cannot be mended there is
        raised."""
        if fault.role != "teacher":
            raise fault
        while True:
            self.sleep(self.recovery.failed(fault, self.done))
            if not self.roles.has_places(fault.role):
                raise fault
            try:
                found = self.pulses.survey(self.roles.groups)
                if lost := next((role for role in LEARNING if role in found), None):
                    raise next(iter(found[lost].values()))
                teacher = self.roles.config.distill.roles.teacher
                alone = teacher.zero_stage == 0 and teacher.sequence == 1
                if alone and fault.role in found:
                    self.roles.replace(fault.role, found[fault.role])
                else:
                    self.roles.rebuild(fault.role)
                critic = self.roles.groups["critic"]
                critic.wait(critic.broadcast("forget"))
            except Fault as another:
                if another.role in LEARNING:
                    raise
                fault = another
            else:
                self.pulses.started(self.roles.groups)
                self.returned(self.recovery.recovered(self.done))
                return

    def _overcome(self, fault: Fault) -> None:
        """Bring every group that learns back to one checkpoint, with all that are lost made anew."""
        while True:
            self.sleep(self.recovery.failed(fault, self.done))
            try:
                self.done, position = self._return(fault)
            except Fault as another:
                fault = another
            else:
                self.coordinator = self._coordinator(self.done, position)
                self.returned(self.recovery.recovered(self.done))
                return

    def _return(self, fault: Fault) -> tuple[int, int]:
        """Updates and samples of the data that the checkpoint holds."""
        lost = {fault.role, *self.pulses.survey(self.roles.groups)}
        lost |= self.pulses.torn({role: self.roles.groups[role] for role in LEARNING if role not in lost})
        for role in lost:
            self.roles.stop(role)
        self.checkpoints.abandon()  # only now: it waits for ranks, and those that hang answer when they end
        self._find_room()
        lost |= self.roles.resized
        self.roles.rebuild(*(role for role in self.roles.groups if role in lost))
        done, position = self.checkpoints.restore()
        if done == 0:  # back to what they started from
            self.roles.rebuild(*(role for role in LEARNING if role not in lost))
        return done, position

    def _find_room(self) -> None:
        """Wait until there is room for every role, on fewer ranks where it may have fewer."""
        limit = self.faults.replace_s
        until = self.clock() + limit
        while not self.roles.fit():
            if self.clock() >= until:
                raise GivenUp(
                    f"distill: nodes were lost, and nothing took their place within {limit:g} s "
                    "(distill.faults.replace_s); --resume continues from the newest checkpoint once there is "
                    "room, and min_ranks of a role lets it go on with less."
                )
            self.sleep(ROOM_EVERY_S)

    def _grown(self) -> bool:
        """Take nodes that are back, right after a checkpoint; whether any group has changed."""
        if self.roles.config is self.roles.full or not self.roles.more_room():
            return False
        try:
            self.checkpoints.end()
        except StorageError:  # said at the next look; the next checkpoint is another occasion
            return False
        self.roles.fit()
        self.roles.rebuild(*(role for role in self.roles.groups if role in self.roles.resized))
        self.coordinator = self._coordinator(*self.checkpoints.restore())
        return True

    def _coordinator(self, done: int, position: int) -> Coordinator:
        self.pulses.started(self.roles.groups)
        return Coordinator(self.roles.config, self.roles.groups, since=(done, position), mend=self.mend)
