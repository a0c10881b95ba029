"""What the roles do together, on real actors: overlap against the same in sequence, and how long a run takes
to begin."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray

from infra import storage
from orchestrator.cluster import connect
from orchestrator.config import RunConfig
from orchestrator.coordinator import Coordinator
from orchestrator.roles import Roles, placed_roles
from orchestrator.worker_group import WorkerGroup
from tests.benchmarks.speed import CUDA, SIZES, Figure, figure
from tests.fixtures import furnished
from workers.batch import Batch

EVERY = 5
"""Critic updates for one of the student: a cycle."""
CYCLES = 2
"""That are timed of each run, after one that is not."""
FRAMES = 9
"""Latent frames of a video at most."""
PINNED = {"student": {0}, "teacher": {1}, "critic": {1}}
BOTH = {role: {0, 1} for role in PINNED}


@dataclass(frozen=True)
class Way:
    """How a cycle is run, and the cores that each role has."""

    overlap: bool
    replay: bool
    cores: Mapping[str, set[int]]


IN_SEQUENCE = "roles with cores of their own, in sequence"
WAYS = {
    IN_SEQUENCE: Way(overlap=False, replay=False, cores=PINNED),
    "roles with cores of their own, overlapped": Way(overlap=True, replay=False, cores=PINNED),
    "roles with cores of their own, overlapped, replayed": Way(overlap=True, replay=True, cores=PINNED),
    "roles that share the cores, in sequence": Way(overlap=False, replay=False, cores=BOTH),
    "roles that share the cores, overlapped": Way(overlap=True, replay=False, cores=BOTH),
}


@dataclass(frozen=True)
class Cycle:
    """Seconds of one cycle."""

    wall: float
    busy: dict[str, float]
    driver: float  # of its process's CPU


def config_of(size: str, root: Path) -> RunConfig:
    """A run of a size's models with random weights."""
    sizes = SIZES[size]
    # fmt: off
    network = {name: getattr(sizes.network, name) for name in (
        "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_len", "text_dim", "freq_dim",
    )}
    # fmt: on
    channels, (height, width) = sizes.network.in_dim, sizes.side
    frames = min(sizes.frames, FRAMES)
    video = {
        "frames": frames, "channels": channels, "height": height, "width": width, "codec": "none",
    }  # fmt: skip
    device = ["--distill.roles.student.gpus=0.33", "--distill.roles.teacher.gpus=0.33"]
    return furnished(
        root,
        overrides=[
            f"--teacher={json.dumps(network)}",
            f"--student={json.dumps(network)}",
            f"--video={json.dumps(video)}",
            "--rollout="
            + json.dumps({"chunk": sizes.rollout.chunk, "window": None, "positions": "absolute"}),
            "--rollout.steps=[1000,750,500,250]",
            "--distill.iterations=1000000",
            f"--distill.student_every={EVERY}",
            "--distill.batch=2",
            "--distill.exit_groups=2",
            "--distill.roles.student.engine.accumulation=2",
            *([*device, "--distill.roles.critic.gpus=0.33"] if CUDA else []),
        ],
    )


def cycles(roles: Roles, way: Way) -> list[Cycle]:
    """Cycles of one way, from student update to student update."""
    groups = roles.groups
    if not CUDA:
        for role, cores in way.cores.items():
            own = cores & set(range(os.cpu_count() or 1))
            groups[role].wait([each.__ray_call__.remote(_pin, own) for each in groups[role].actors])
    distill = replace(roles.config.distill, overlap=way.overlap, replay=way.replay)
    coordinator = Coordinator(replace(roles.config, distill=distill), groups)
    found, measured, began, cpu = [], [], 0.0, 0.0
    for done, metrics in coordinator.run(0):
        measured.append(metrics)
        if done % EVERY == 0:
            now, used = time.perf_counter(), time.process_time()
            if done > EVERY:
                busy = {
                    role: sum(each[name] for each in measured for name in each if f"seconds/{role}_" in name)
                    for role in groups
                }
                found.append(Cycle(now - began, busy, used - cpu))
            began, cpu, measured = now, used, []
        if done == EVERY * (1 + CYCLES):
            break
    for group in groups.values():
        group.wait(group.broadcast("forget"))
    return found


def _pin(_: Any, cores: set[int]) -> None:
    # All threads that there are, for Ray's own serve the calls.
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def moved(roles: Roles) -> float:
    """MiB that one cycle puts into the object store."""
    made: list[Any] = []
    scatter = WorkerGroup.scatter

    def noted(group: WorkerGroup, *arguments: Any, **how: Any) -> tuple[Any, Batch]:
        request, batch = scatter(group, *arguments, **how)
        made.extend(each for column in batch.columns.values() for each in column)
        return request, batch

    WorkerGroup.scatter = noted  # type: ignore[method-assign]
    try:
        for done, _ in Coordinator(roles.config, roles.groups).run(0):
            if done == EVERY:
                break
    finally:
        WorkerGroup.scatter = scatter  # type: ignore[method-assign]
    for group in roles.groups.values():
        group.wait(group.broadcast("forget"))
    return sum(ray.get(each).nbytes for each in made) / 2**20


def overlap(size: str, rounds: int) -> Iterator[Figure]:
    """Cycles in every way, in turns, on the same actors."""
    if size.startswith("wan"):  # which is for cards of their own
        return
    with tempfile.TemporaryDirectory() as folder, connect("local"):
        config = config_of(size, Path(folder))
        with placed_roles(config, grows=False) as roles:
            roles.start(*roles.groups)
            found: dict[str, list[Cycle]] = {name: [] for name in WAYS}
            for _ in range(max(1, rounds // 3)):
                for name, way in WAYS.items():
                    found[name] += cycles(roles, way)
            size_moved = moved(roles)
    walls = {name: [each.wall for each in taken] for name, taken in found.items()}
    for name, wall in walls.items():
        yield figure("roles", size, name, IN_SEQUENCE, wall, walls[IN_SEQUENCE], wall, "s")
    for name, taken in found.items():
        busiest = [max(each.busy.values()) for each in taken]
        what = f"{name}: a cycle"
        yield figure("roles", size, what, "its busiest role alone", walls[name], busiest, walls[name], "s")
        driver = [each.driver for each in taken]
        what = f"{name}: the coordinator's CPU"
        yield figure("roles", size, what, "a cycle", driver, walls[name], driver, "s")
        for role in taken[0].busy:
            idle = [1 - each.busy[role] / each.wall for each in taken]
            what = f"{name}: the {role} waits"
            seconds = [share * each.wall for share, each in zip(idle, taken, strict=True)]
            yield figure("roles", size, what, "a cycle", seconds, walls[name], seconds, "s")
    yield Figure(
        "roles", size, "moved through the object store, a cycle", "", 1.0, 1.0, 1.0, size_moved, "MiB"
    )


def start(size: str, rounds: int) -> Iterator[Figure]:
    """From the command to the first update's checkpoint, and from `--resume` to the next one."""
    if size != "quickstart":  # the recipe's own
        return
    imports, first, resumed = [], [], []
    for _ in range(max(1, rounds // 3)):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            config = furnished(root, "quickstart")
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import torch, ray, deepspeed, mlflow"], check=True)
            imports.append(time.perf_counter() - began)
            words = [
                "quickstart",
                f"--root={root}",
                "--distill.checkpoint_every=1",
                "--distill.sample_every=0",
            ]
            for iterations, taken, more in ((1, first, []), (2, resumed, ["--resume"])):
                own = [*words, f"--distill.iterations={iterations}", *more]
                taken.append(_until(own, f"{config.distill.output}/checkpoints/{iterations:07}"))
    for what, taken in (
        ("imports alone", imports),
        ("to the first update", first),
        ("to one resumed", resumed),
    ):
        yield figure("start", size, what, "imports alone", taken, imports, taken, "s")


def _until(words: Sequence[str], path: str) -> float:
    """Seconds until a command has published a checkpoint; it then ends."""
    began, taken = time.perf_counter(), 0.0
    command = [sys.executable, "-m", "pipelines.cli", "distill", *words]
    with tempfile.TemporaryFile() as said, subprocess.Popen(command, stdout=said, stderr=said) as running:
        while not taken and running.poll() is None:
            time.sleep(0.05)
            taken = time.perf_counter() - began if storage.is_complete(path) else 0.0
        if running.wait() or not taken:
            said.seek(0)
            raise RuntimeError(said.read().decode()[-3000:])
    return taken
