"""A thousand ranks on one core: `python -m tests.benchmarks.scale` makes docs/results/scale.md.

The coordinator, the supervisor, recovery, the layout of ranks and the run's state on disk are the product's
own; the groups are simulated. They have the same verbs, take the time that a table says on a clock that
nobody waits for, and are lost at random.
"""

import argparse
import json
import math
import os
import platform
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import fmean, median
from typing import Any

import ray

from infra import storage
from orchestrator.checkpoints import Checkpoints
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.fault import Fault
from orchestrator.recovery import LEARNING, FaultConfig
from orchestrator.roles import Roles, actor_class, ranks_of
from orchestrator.run_state import RunState
from orchestrator.supervisor import Supervisor
from orchestrator.worker_group import Request, WorkerGroup
from pipelines import cli
from tests.fixtures import TINY_RECIPE
from workers.batch import Batch

ROOT = Path(__file__).parents[2]
HOUR = 3600.0
SECONDS = {
    "rollout": 20.0, "score": 6.0, "judge": 0.1, "pullback": 15.0, "step": 1.0, "update": 10.0,
}  # fmt: skip
"""What a verb takes with all ranks: about a 14B recipe on 1,000 GPUs; each run has its own share of it."""
RESTART, LOAD, COPY, DETECT = 120.0, 60.0, 8.0, 10.0
"""Seconds to make a group anew, to read a checkpoint, to copy one to host memory (which training waits for),
and until a lost rank is noticed."""
RANKS = {"student": 512, "teacher": 256, "critic": 256}


@dataclass
class Clock:
    now: float = 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass
class Cluster:
    """Ranks that are lost at random, each after `mtbf_s` on average; their nodes return after `away_s`."""

    clock: Clock
    draw: random.Random
    mtbf_s: float
    away_s: float = 0.0
    back: dict[str, float] = field(default_factory=dict)
    """When the lost node of a role is there again."""

    def next_loss(self, ranks: int) -> float:
        return self.clock.now + self.draw.expovariate(ranks / self.mtbf_s)


class Group:
    """A group that makes nothing, in simulated time."""

    actors: Sequence[Any] = ()
    look: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, role: str, makes: tuple[str, ...], ranks: int, cluster: Cluster):
        self.role, self.makes, self.cluster = role, makes, cluster
        self.full = ranks
        self.anew(ranks)

    def anew(self, ranks: int) -> None:
        self.ranks, self.free, self.steps = ranks, self.cluster.clock.now, 0
        self.lost = self.cluster.next_loss(ranks)

    def scatter(self, verb: str, plan: Any, batch: Batch, makes: Sequence[str] = ()) -> tuple[Any, Batch]:
        began = max(self.free, self.cluster.clock.now)
        self.free = began + SECONDS[verb] * self.full / self.ranks
        return _Asked(self, verb, self.free), Batch(batch.samples, {name: batch.samples for name in makes})

    def broadcast(self, method: str, *_: Any) -> list[Any]:
        return []

    def wait(self, references: Any) -> Any:
        return references


@dataclass
class _Asked:
    group: Any
    verb: str
    until: float

    def wait(self) -> dict[str, float]:
        group, clock = self.group, self.group.cluster.clock
        if self.until > group.lost:
            clock.now = max(clock.now, group.lost) + DETECT
            group.cluster.back[group.role] = clock.now + group.cluster.away_s
            raise Fault(group.role, "node", "its node is gone")
        clock.now = max(clock.now, self.until)
        stats = {"seconds": 0.0, "loss": 1.0}
        if self.verb in ("step", "update"):
            group.steps += 1
            stats["steps"] = float(group.steps)
        return stats


class SimulatedRoles(Roles):
    """Roles of simulated groups. A role that has lost a node has half its places until that is back."""

    def begin(self, cluster: Cluster) -> None:
        self.cluster = cluster
        made = {"student": (), "teacher": ("real",), "critic": ("fake", "logits")}
        for role, ranks in ranks_of(self.config).items():
            self.groups[role] = Group(role, made[role], ranks.ranks, cluster)  # type: ignore[assignment]

    def room(self) -> dict[str, list[Any]]:
        now, back = self.cluster.clock.now, self.cluster.back
        return {
            role: list(each)[: len(each) // 2] if back.get(role, 0.0) > now else list(each)
            for role, each in self.options.items()
        }

    def has_places(self, role: str) -> bool:
        return self.cluster.back.get(role, 0.0) <= self.cluster.clock.now

    def stop(self, role: str) -> None:
        pass

    def replace(self, role: str, ranks: Any) -> None:
        self.rebuild(role)

    def rebuild(self, *roles: str) -> None:
        self.cluster.clock.now += RESTART if roles else 0.0
        for role in roles:
            ranks = ranks_of(self.config)[role]
            self._made[role] = ranks
            self.groups[role].anew(ranks.ranks)  # type: ignore[attr-defined]


class SimulatedCheckpoints(Checkpoints):
    """The run's real state on disk, without what ranks would write."""

    def begin(self, done: int, position: int) -> None:
        # A copy comes after what a group was asked ahead, and before what it is asked next.
        trained: list[Any] = [self.groups[role] for role in LEARNING]
        clock = trained[0].cluster.clock
        clock.now = max(clock.now, *(group.free for group in trained)) + COPY
        for group in trained:
            group.free = clock.now
        self.state.publish(storage.begin(self.state.path(done)), done, position)
        self.begun, self.saved = done, self.state.at(done, position)

    def end(self) -> dict[str, float]:
        return {}

    def restore(self) -> tuple[int, int]:
        self.groups["student"].cluster.clock.now += LOAD  # type: ignore[attr-defined]
        return self.saved.done, self.saved.position


def config_of(iterations: int, *, fewest: int | None) -> RunConfig:
    words = [f"--distill.iterations={iterations}", "--distill.student_every=5", "--distill.batch=1024"]
    for role, ranks in RANKS.items():
        words.append(f"--distill.roles.{role}.ranks={ranks}")
        if fewest is not None:
            words.append(f"--distill.roles.{role}.min_ranks={ranks // fewest}")
    return cli.parse("distill", [str(TINY_RECIPE), *words])[0]


def simulate(
    config: RunConfig, every: int, mtbf_h: float, seed: int, *, away_s: float = 0.0
) -> dict[str, float]:
    """A whole run: its simulated hours, the share of updates made again, faults, and seconds of CPU."""
    clock = Clock()
    cluster = Cluster(clock, random.Random(seed), mtbf_h * HOUR, away_s)
    began = time.process_time()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as output:
        state = RunState("distill", output, {}, keep=2)
        options: Mapping[str, list[Any]] = {
            role: [{}] * each.ranks for role, each in ranks_of(config).items()
        }
        roles = SimulatedRoles(config, options)
        roles.begin(cluster)
        checkpoints = SimulatedCheckpoints(state, roles.groups)
        faults = FaultConfig(attempts=1000, backoff_s=0.0, replace_s=1e12)
        supervisor = Supervisor(
            state, roles, checkpoints, faults, lambda event: None, clock=clock, sleep=clock.sleep
        )
        made = 0

        def after(done: int, metrics: Mapping[str, float]) -> bool:
            nonlocal made
            made += 1
            if done % every == 0:
                checkpoints.begin(done, supervisor.coordinator.plan.position(done, "student", 0))
            return False

        supervisor.run(after, str)
    iterations = config.distill.iterations
    return {
        "again": (made - iterations) / iterations,
        "faults": len(supervisor.recovery.events),
        "hours": clock.now / HOUR,
        "cpu_s": time.process_time() - began,
        "updates": made,
    }


@cache
def iteration_s() -> float:
    """Seconds of an iteration where nothing is lost and no checkpoint is made, on average."""
    count = 200
    return simulate(config_of(count, fewest=None), count + 1, 1e12, 0)["hours"] * HOUR / count


# --- what the coordinator itself costs


class Handle:
    """An actor of which nobody is asked anything."""

    def __init__(self) -> None:
        self.answer = self.call = self

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, verb: str, plan: Any, samples: Any, columns: Any, makes: Any, *tensors: Any) -> Any:
        count = len(makes) * len(samples)
        return [_STATS, *range(count)] if makes else _STATS


_STATS = {"seconds": 1.0, **{f"number {index}": 1.0 for index in range(12)}}


class Counted(WorkerGroup):
    """The product's group, of actors that answer at once."""

    calls = 0

    def scatter(self, verb: str, plan: Any, batch: Batch, makes: Sequence[str] = ()) -> tuple[Request, Batch]:
        Counted.calls += len(self.actors)
        return super().scatter(verb, plan, batch, makes)

    def wait(self, references: Any) -> Any:
        return references


def own_logic(config: RunConfig, updates: int) -> tuple[float, float]:
    """Seconds of CPU, and calls of actors, of an iteration with all ranks."""
    made = {"student": (), "teacher": ("real",), "critic": ("fake", "logits")}
    groups = {
        role: Counted(role, [Handle() for _ in range(each.ranks)], made[role])  # type: ignore[misc]
        for role, each in ranks_of(config).items()
    }
    Counted.calls, began = 0, time.process_time()
    for done, _ in Coordinator(config, groups).run(0):
        if done == updates:
            break
    return (time.process_time() - began) / updates, Counted.calls / updates


class NoOp:
    """A real actor that does nothing with what it is given; without PyTorch, so that many fit here."""

    def answer(self, *_: object) -> dict[str, float]:
        return {"seconds": 0.0}

    def call(self, *_: object) -> None:
        pass


def ray_calls(actors: int, rounds: int) -> dict[str, float]:
    """Seconds of a scatter and of its answers, over real actors without samples, and the driver's CPU."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        make = actor_class(NoOp).options(num_cpus=0)
        group = WorkerGroup("noop", [make.remote() for _ in range(actors)])
        group.wait(group.broadcast("forget"))
        wall, cpu = [], []
        for _ in range(rounds):
            began, used = time.perf_counter(), time.process_time()
            request, _ = group.scatter("nothing", None, Batch())
            request.wait()
            wall.append(time.perf_counter() - began)
            cpu.append(time.process_time() - used)
        return {"wall_s": median(wall) / actors, "cpu_s": median(cpu) / actors}
    finally:
        ray.shutdown()


def goodput(config: RunConfig, run: Mapping[str, float]) -> float:
    """The time that the updates take by themselves, as a share of all time."""
    return config.distill.iterations * iteration_s() / HOUR / run["hours"]


# --- the page


def measure(updates: int, seeds: int, actors: int) -> dict[str, Any]:
    found: dict[str, Any] = {"updates": updates, "seeds": seeds, "actors": actors}
    config = config_of(updates, fewest=None)
    found["own_cpu_s"], found["calls"] = own_logic(config, 40)
    found["ray"] = ray_calls(actors, 30)
    iteration = found["iteration_s"] = iteration_s()
    found["intervals"] = []
    for mtbf_h in (2_000.0, 10_000.0, 50_000.0):
        mean_s = mtbf_h * HOUR / sum(RANKS.values())
        row: dict[str, Any] = {"mtbf_h": mtbf_h, "between_faults_h": mean_s / HOUR, "goodput": {}}
        row["young"] = math.sqrt(2 * COPY * mean_s) / iteration
        ratio = COPY / (2 * mean_s)
        daly = math.sqrt(2 * COPY * mean_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - COPY
        row["daly"] = daly / iteration
        shorter = config_of(min(updates, 2_000), fewest=None)
        for every in (2, 5, 10, 20, 40, 80, 160):
            runs = [simulate(shorter, every, mtbf_h, seed) for seed in range(seeds)]
            row["goodput"][every] = fmean(goodput(shorter, run) for run in runs)
        found["intervals"].append(row)
        print(json.dumps(row), flush=True)
    found["long"] = simulate(config, 20, 10_000.0, 0)
    found["long"]["goodput"] = goodput(config, found["long"])
    print(json.dumps(found["long"]), flush=True)
    found["elastic"] = []
    for away_h in (0.5, 2.0, 8.0):
        row = {"away_h": away_h}
        for name, fewest in (("waits", None), ("shrinks", 4)):
            one = config_of(2_000, fewest=fewest)
            runs = [simulate(one, 20, 10_000.0, seed, away_s=away_h * HOUR) for seed in range(seeds)]
            row[name] = fmean(goodput(one, run) for run in runs)
        found["elastic"].append(row)
        print(json.dumps(row), flush=True)
    return found


def page(found: Mapping[str, Any]) -> str:
    ranks = sum(RANKS.values())
    calls, own, each = found["calls"], found["own_cpu_s"], found["ray"]
    long = found["long"]
    lines = [
        "# A thousand ranks, simulated",
        "",
        "`python -m tests.benchmarks.scale`: the coordinator, the supervisor, recovery, the choice of ranks "
        f"and the run's state on disk are the product's own; {ranks:,} ranks ({RANKS['student']} student, "
        f"{RANKS['teacher']} teacher, {RANKS['critic']} critic) are simulated, on a clock of their own. "
        f"{os.cpu_count()} cores ({platform.machine()}), ray {ray.__version__}.",
        "",
        "## What the coordinator costs",
        "",
        f"An iteration of a batch of 1,024 samples makes {calls:,.0f} calls of actors, and takes the "
        f"coordinator {1e3 * own:.0f} ms of CPU without Ray (one student update in five; the goal is 50 ms).",
        "",
        f"A call of a real actor that does nothing costs {1e6 * each['cpu_s']:.0f} µs of the driver's CPU, "
        f"and {1e6 * each['wall_s']:.0f} µs of time until its answer is there, measured with "
        f"{found['actors']} of them on this machine (which they share with the driver). Extrapolated, "
        f"Ray's calls of an iteration cost {calls * each['cpu_s']:.1f} s of the driver's CPU.",
        "",
        f"An iteration of this size takes about {found['iteration_s']:.0f} s, so that is "
        f"{100 * calls * each['cpu_s'] / found['iteration_s']:.0f} % of it. A call per node instead of one "
        "per rank would divide it by eight; at a thousand ranks it is not what limits a run, so there is "
        "none.",
        "",
        "## How often to make a checkpoint",
        "",
        f"Goodput: the time that the updates take by themselves, as a share of all time. Training waits "
        f"{COPY:g} s for a checkpoint; a fault costs {DETECT:g} s to be noticed, {RESTART:g} s for the group "
        f"and {LOAD:g} s for the checkpoint to be read. An iteration takes {found['iteration_s']:.0f} s. "
        f"Mean of {found['seeds']} seeds of {min(found['updates'], 2000):,} iterations.",
        "",
        "| a rank fails every | the run every | "
        + " | ".join(map(str, found["intervals"][0]["goodput"]))
        + " | "
        "best | Young | Daly |",
        "|---|---|" + "---|" * (len(found["intervals"][0]["goodput"]) + 3),
    ]
    for row in found["intervals"]:
        best = max(row["goodput"], key=lambda every: row["goodput"][every])
        cells = " | ".join(f"{each:.3f}" for each in row["goodput"].values())
        lines.append(
            f"| {row['mtbf_h']:,.0f} h | {row['between_faults_h']:.1f} h | {cells} | {best} | "
            f"{row['young']:.0f} | {row['daly']:.0f} |"
        )
    lines += [
        "",
        "Columns are iterations between checkpoints. Young's formula is √(2 · copy · time between faults), "
        "Daly's its refinement (doi 10.1145/361147.361115, 10.1016/j.future.2004.11.016).",
        "",
        f"{found['updates']:,} iterations with a rank failing every 10,000 h and a checkpoint every 20: "
        f"goodput {long['goodput']:.3f} over {long['hours']:,.0f} simulated hours with "
        f"{long['faults']:,.0f} faults, "
        f"{100 * long['again']:.1f} % of the updates made again; it took {long['cpu_s']:.0f} s of CPU "
        f"({1e3 * long['cpu_s'] / long['updates']:.2f} ms an update, the writing of checkpoints included).",
        "",
        "## When nodes are away",
        "",
        "A lost node takes half of a role's places with it and comes back later. Either the run waits, or "
        "the role goes on with fewer ranks (`min_ranks` a quarter) and grows at the first checkpoint after.",
        "",
        "| away for | goodput, waits | goodput, shrinks and grows |",
        "|---|---|---|",
        *(f"| {row['away_h']:g} h | {row['waits']:.3f} | {row['shrinks']:.3f} |" for row in found["elastic"]),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=100_000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--actors", type=int, default=64)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "scale.md")
    asked = parser.parse_args()
    found = measure(asked.updates, asked.seeds, asked.actors)
    storage.write_text(asked.out, page(found))


if __name__ == "__main__":
    main()
