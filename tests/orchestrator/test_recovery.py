"""What is done about a fault, path by path; no Ray, and a clock that the test winds."""

import pytest

from orchestrator.fault import Fault, Kind
from orchestrator.recovery import FaultConfig, GivenUp, Recovery


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def fault(role: str = "critic", kind: Kind = "lost") -> Fault:
    return Fault(role, kind, f"{role} {kind}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def recovery(clock: Clock) -> Recovery:
    return Recovery(FaultConfig(attempts=4, backoff_s=1), clock)


@pytest.mark.parametrize("kind", ["lost", "hung", "memory", "peer", "code"])
def test_the_same_fault_twice_at_one_update_ends_the_run(recovery: Recovery, kind: Kind) -> None:
    recovery.failed(fault(kind=kind), 7)
    recovery.recovered(4)
    for done in (5, 6, 7):
        recovery.progressed(done)
    said = f"distill: update 7 failed twice in the same way: critic {kind}. What helps: "
    with pytest.raises(GivenUp, match=said):
        recovery.failed(fault(kind=kind), 7)
    assert [event.back_to for event in recovery.events] == [4, None]


@pytest.mark.parametrize("kind", ["node", "storage"])
def test_what_comes_from_outside_may_come_again(recovery: Recovery, kind: Kind) -> None:
    for _ in range(3):
        recovery.failed(fault(kind=kind), 7)
        recovery.recovered(4)
    with pytest.raises(GivenUp):  # but not for ever
        recovery.failed(fault(kind=kind), 7)


def test_another_fault_at_that_update_or_the_same_at_another_is_none_twice(recovery: Recovery) -> None:
    for role, kind, done in (("critic", "lost", 7), ("student", "lost", 7), ("critic", "hung", 7)):
        recovery.failed(fault(role, kind), done)
        recovery.recovered(7)
    recovery.progressed(8)  # that update is behind
    recovery.failed(fault("critic", "lost"), 8)
    recovery.recovered(7)
    recovery.progressed(8)
    recovery.failed(fault("critic", "lost"), 7)


def test_attempts_are_bounded_waited_for_and_whole_again_after_a_new_update(recovery: Recovery) -> None:
    recovery.progressed(10)

    def delays(count: int) -> list[float]:
        found = []
        for done in range(count):
            found.append(recovery.failed(fault(), done))
            recovery.recovered(0)
            recovery.progressed(done + 1)  # made again, and not new
        return found

    assert delays(3) == [0, 1, 2]
    recovery.progressed(11)
    assert delays(3) == [0, 1, 2]
    said = r"4 faults in a row without a new update \(distill\.faults\.attempts is 4\)"
    with pytest.raises(GivenUp, match=said):
        recovery.failed(fault(), 9)


def test_what_fails_on_the_way_back_counts_as_an_attempt_and_says_nothing_of_the_update(
    recovery: Recovery, clock: Clock
) -> None:
    recovery.failed(fault(), 7)
    clock.now = 5.0
    recovery.failed(fault(), 7)
    clock.now = 9.0
    event = recovery.recovered(4)
    assert (event.at, event.back_to, event.seconds) == (7, 4, 9.0)
    assert recovery.in_a_row == 2 and len(recovery.events) == 1
    clock.now = 20.0
    recovery.failed(fault(), 6)
    clock.now = 21.0
    assert recovery.recovered(4).seconds == 1.0
