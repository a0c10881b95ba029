"""What the supervisor does about lost groups, over many updates, with groups that only take time."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from orchestrator.checkpoints import Cadence
from orchestrator.config import RunConfig
from orchestrator.fault import Fault
from orchestrator.recovery import Event, FaultConfig
from orchestrator.roles import ranks_of
from orchestrator.run_state import RunState
from orchestrator.supervisor import GivenUp, Supervisor
from pipelines import cli
from tests.benchmarks.scale import Clock, Cluster, Group, SimulatedCheckpoints, SimulatedRoles
from tests.fixtures import TINY_RECIPE


class Run:
    """A run of simulated groups, and what became of it."""

    def __init__(self, config: RunConfig, output: Path, *, away_s: float = 0.0, replace_s: float = 1e9):
        self.clock = Clock()
        self.cluster = Cluster(self.clock, random.Random(0), 1e15, away_s)
        options: Mapping[str, list[Any]] = {
            role: [{}] * each.ranks for role, each in ranks_of(config).items()
        }
        self.roles = SimulatedRoles(config, options)
        self.roles.begin(self.cluster)
        self.checkpoints = SimulatedCheckpoints(
            RunState("distill", str(output), {}, keep=2), self.roles.groups
        )
        self.made: list[int] = []
        self.events: list[Event] = []
        self.sizes: list[int] = []
        faults = FaultConfig(attempts=4, backoff_s=0.0, replace_s=replace_s)
        self.supervisor = Supervisor(
            self.checkpoints.state,
            self.roles,
            self.checkpoints,
            faults,
            self.events.append,
            clock=self.clock,
            sleep=self.clock.sleep,
        )

    def lose(self, role: str) -> None:
        group: Any = self.roles.groups[role]
        group.lost = self.clock.now

    def run(self, losses: Mapping[int, str], every: int = 4) -> str:
        """Lose a role once so many updates are done."""
        left = dict(losses)

        def after(done: int, metrics: Mapping[str, float]) -> bool:
            self.made.append(done)
            self.sizes.append(self.group("critic").ranks)
            if done % every == 0:
                self.checkpoints.begin(done, self.supervisor.coordinator.plan.position(done, "student", 0))
            if done in left:
                self.lose(left.pop(done))
            return False

        return self.supervisor.run(after, str)

    def group(self, role: str) -> Group:
        found: Any = self.roles.groups[role]
        return found


def config(*more: str) -> RunConfig:
    words = ["--distill.iterations=12", "--distill.student_every=2", *more]
    return cli.parse("distill", [str(TINY_RECIPE), *words])[0]


def test_a_lost_teacher_costs_no_update_and_a_lost_learner_those_since_the_checkpoint(tmp_path: Path) -> None:
    run = Run(config(), tmp_path)
    assert run.run({5: "teacher", 7: "student", 10: "critic"}) == "12"
    assert [(event.role, event.at, event.back_to) for event in run.events] == [
        ("teacher", 6, 6),
        ("student", 7, 4),
        ("critic", 10, 8),
    ]
    assert run.made == [1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 9, 10, 11, 12]


def test_without_a_checkpoint_everything_begins_again(tmp_path: Path) -> None:
    run = Run(config(), tmp_path)
    before = {role: run.group(role).lost for role in ("student", "teacher", "critic")}
    run.run({2: "critic"})
    assert run.made[:4] == [1, 2, 1, 2]
    made_anew = {role for role, lost in before.items() if run.group(role).lost != lost}
    assert made_anew == {"student", "critic"}


def test_a_fault_while_the_model_is_written_is_overcome_too(tmp_path: Path) -> None:
    run = Run(config(), tmp_path)
    tried: list[int] = []

    def after(done: int, metrics: Mapping[str, float]) -> bool:
        if done == 8:
            run.checkpoints.begin(done, 0)
        return done == 8  # patience has ended it

    def finish(done: int) -> str:
        tried.append(done)
        if len(tried) == 1:
            raise Fault("student", "lost", "lost while it wrote")
        return "model"

    assert run.supervisor.run(after, finish) == "model" and tried == [8, 8]


def test_it_waits_for_nodes_or_goes_on_with_less_and_grows_at_a_checkpoint(tmp_path: Path) -> None:
    ranks = [f"--distill.roles.{role}.ranks=4" for role in ("student", "critic")]
    fewer = [f"--distill.roles.{role}.min_ranks=1" for role in ("student", "critic")]
    waiting = Run(config(*ranks), tmp_path / "waits", away_s=1000.0)
    waiting.run({6: "critic"})
    assert set(waiting.sizes) == {4} and waiting.events[0].seconds > 1000
    # Away for a few updates: two ranks until the first checkpoint after that.
    run = Run(config(*ranks, *fewer), tmp_path / "shrinks", away_s=250.0)
    run.run({6: "critic"})
    assert run.made == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8, 9, 10, 11, 12]
    assert run.sizes == [4] * 6 + [2] * 4 + [4] * 4
    assert run.roles.config is run.roles.full
    hopeless = Run(config(*ranks), tmp_path / "ends", away_s=1e6, replace_s=10.0)
    with pytest.raises(GivenUp, match=r"nothing took their place within 10 s \(distill\.faults\.replace_s\)"):
        hopeless.run({6: "critic"})


def test_a_checkpoint_is_due_by_updates_minutes_or_request() -> None:
    clock = Clock()
    cadence = Cadence(10, 5.0, clock)
    assert not cadence.due(9) and cadence.due(10)
    clock.now += 299
    assert not cadence.due(11)
    clock.now += 1
    assert cadence.due(12) and not cadence.due(13)
    assert cadence.due(14, asked=True)
    clock.now += 299
    assert not cadence.due(15)
