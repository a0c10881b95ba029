"""Twenty faults in one run, and what each cost: `python -m tests.benchmarks.faults` makes
docs/results/faults.md, and with `--replicas`, where those roll out, docs/results/faults_replicas.md.

A tiny recipe is distilled on a Ray cluster of two nodes on this machine, by the command that a person uses,
with a real MLflow server beside it. Faults hit at random moments that follow from a seed. The weights at the
end are compared with those of a run that nothing disturbed, and what is left behind is looked for.
"""

import argparse
import json
import math
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import torch

from infra import storage
from tests.chaos import Action, Moment, before, injected, send, spoil
from tests.cluster import TwoNodeCluster, two_node_cluster
from tests.fixtures import TINY_RECIPE, furnished
from tests.mlflow_server import Server
from tests.orchestrator.test_resume import history
from workers.model_directory import ModelDirectory

ROOT = Path(__file__).parents[2]
EVERY = 4
"""Iterations from one fault to the next, and between two checkpoints."""
KINDS: dict[str, tuple[str, str]] = {
    "SIGKILL a student rank in pullback": ("student", "pullback"),
    "SIGKILL a student rank in rollout": ("student", "rollout"),
    "SIGKILL a student rank in step": ("student", "step"),
    "SIGKILL a student rank while it writes a checkpoint": ("student", "write"),
    "SIGKILL the critic in update": ("critic", "update"),
    "SIGKILL the critic in score": ("critic", "score"),
    "SIGKILL the critic while it copies for a checkpoint": ("critic", "snapshot"),
    "SIGKILL a teacher rank in score": ("teacher", "score"),
    "SIGKILL the other teacher rank in score": ("teacher", "score"),
    "SIGSTOP a student rank in rollout": ("student", "rollout"),
    "SIGSTOP the critic in update": ("critic", "update"),
    "SIGSTOP a teacher rank in score": ("teacher", "score"),
    "SIGKILL a node's raylet": ("critic", "update"),
    "SIGKILL the driver": ("critic", "update"),
    "SIGTERM to the driver": ("critic", "update"),
    "out of memory in a student rank": ("student", "rollout"),
    "out of memory in the critic": ("critic", "update"),
    "the store fails a student rank that reads prompts": ("student", "rollout"),
    "the store fails a checkpoint": ("student", "snapshot"),
    "the tracking server is down": ("critic", "update"),
}
ITERATIONS = EVERY * len(KINDS) + EVERY
SETTINGS = {
    "distill.iterations": ITERATIONS,
    "distill.student_every": 2,
    "distill.checkpoint_every": EVERY,
    "distill.sample_every": 0,
    "distill.faults.silence_s": 10,
    "distill.faults.backoff_s": 0.1,
    "distill.roles.student.ranks": 2,
    "distill.roles.teacher.ranks": 2,
    "distill.roles.student.engine.zero_stage": 2,
    "placement.mode": "disaggregated",
    "tracking.system_metrics_every_s": 0,
}
REPLICAS: dict[str, Any] = {
    "distill.replay": True,
    "distill.roles.rollout.ranks": 2,
    "distill.roles.rollout.cpus": 0.5,
}
"""Settings with which the faults of student ranks that roll out are those of replicas."""


def kinds(replicas: bool) -> dict[str, tuple[str, str]]:
    """The kinds of fault, and the role and the call that each hits."""
    if not replicas:
        return KINDS
    elsewhere = ("student", "rollout"), ("rollout", "rollout")
    return {
        kind.replace("student rank", "replica") if moment == elsewhere[0] else kind: (
            elsewhere[1] if moment == elsewhere[0] else moment
        )
        for kind, moment in KINDS.items()
    }


def schedule(seed: int, replicas: bool) -> list[tuple[str, int]]:
    """Every kind of fault once, in a random order, with the iteration from which on it is due."""
    draw = random.Random(seed)
    order = draw.sample(list(kinds(replicas)), len(KINDS))
    return [(kind, EVERY * place + 1 + draw.randrange(2)) for place, kind in enumerate(order)]


class Log:
    """Lines of JSON, from whichever process."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, what: str, **more: Any) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps({"time": time.time(), "what": what, **more}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []


# --- in the driver's process


def action(kind: str, folder: Path) -> Action:
    rank = 1 if "other" in kind else 0
    if kind.startswith("out of memory"):
        return before(spoil("memory", rank))
    if kind.startswith("the store fails a") and kind.endswith("reads prompts"):
        return before(spoil("storage", rank))
    if kind == "the store fails a checkpoint":
        return before(lambda _: _fail_once(storage))
    if kind == "SIGKILL the driver":
        return lambda _: os.kill(os.getpid(), signal.SIGKILL)
    if kind == "SIGTERM to the driver":
        return lambda _: os.kill(os.getpid(), signal.SIGTERM)
    if kind in ("SIGKILL a node's raylet", "the tracking server is down"):
        return lambda _: (folder / "asked").write_text(kind)  # of the process that has started them
    return send(signal.SIGSTOP if kind.startswith("SIGSTOP") else signal.SIGKILL, rank)


def _fail_once(module: Any) -> None:
    begin = module.begin

    def fail(path: Any) -> str:
        module.begin = begin
        raise storage.StorageError("the store does not answer, as the test wants it")

    module.begin = fail


def drive(folder: Path, seed: int, replicas: bool, arguments: list[str]) -> int:
    """The command, with the faults that are still to come."""
    from orchestrator.recovery import Recovery
    from pipelines import cli

    log = Log(folder / "log.jsonl")
    had = {line["kind"] for line in log.read() if line["what"] == "injected"}
    moments = {
        Moment(*kinds(replicas)[kind], at): (kind, action(kind, folder))
        for kind, at in schedule(seed, replicas)
        if kind not in had
    }

    def done(moment: Moment, iteration: int) -> None:
        log.write("injected", kind=moments[moment][0], iteration=iteration)

    progressed, recovered = Recovery.progressed, Recovery.recovered

    def progress(recovery: Recovery, at: int) -> None:
        log.write("done", done=at)
        progressed(recovery, at)

    def recover(recovery: Recovery, at: int) -> Any:
        event = recovered(recovery, at)
        told = {"kind": event.kind, "role": event.role, "at": event.at, "why": event.what}
        log.write("recovered", done=at, seconds=event.seconds, **told)
        return event

    Recovery.progressed, Recovery.recovered = progress, recover  # type: ignore[method-assign]
    with injected({moment: each for moment, (_, each) in moments.items()}, done):
        return cli.main(arguments)


# --- in the process that watches


def words(root: Path, output: str, cluster: TwoNodeCluster, tracking: str, replicas: bool) -> list[str]:
    settings = {**SETTINGS, "root": root, "distill.output": output, "tracking.uri": tracking}
    settings |= REPLICAS if replicas else {}
    return [
        "distill",
        str(TINY_RECIPE),
        *(f"--{name}={value}" for name, value in settings.items()),
        f"--address={cluster.address}",
    ]


class Watcher(threading.Thread):
    """Kills and restarts what a driver does not own, when that asks for it."""

    def __init__(self, folder: Path, cluster: TwoNodeCluster, server: Server):
        super().__init__(daemon=True)
        self.folder, self.cluster, self.server, self.ended = folder, cluster, server, threading.Event()
        self.start()

    def run(self) -> None:
        asked = self.folder / "asked"
        while not self.ended.wait(0.02):
            if not asked.exists() or not (kind := asked.read_text()):
                continue
            asked.unlink()
            if kind == "the tracking server is down":
                self.server.kill()
                time.sleep(5)  # how long it is down
                self.server.ensure()
                continue
            raylet = self.cluster.raylet("second")
            assert raylet is not None
            os.kill(raylet, signal.SIGKILL)
            time.sleep(5)  # until another node comes
            self.cluster.add("second")


def disturbed(
    folder: Path, root: Path, seed: int, cluster: TwoNodeCluster, server: Server, replicas: bool
) -> int:
    """Run the command until it ends well, handing it in again where it ends otherwise; how often."""
    arguments, starts = words(root, f"disturbed-{seed}", cluster, server.uri, replicas), 0
    watcher = Watcher(folder, cluster, server)
    while True:
        starts += 1
        own = ["-m", "tests.benchmarks.faults", "--drive", str(folder), str(seed)]
        own += ["--replicas", "--"] if replicas else ["--"]
        resume = ["--resume"] if starts > 1 else []
        with open(folder / f"driver-{starts}.log", "w") as log:
            driver = subprocess.run(
                [sys.executable, *own, *arguments, *resume],
                cwd=ROOT,
                env=cluster.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        Log(folder / "log.jsonl").write("driver ended", code=driver.returncode)
        if driver.returncode == 0:
            watcher.ended.set()
            watcher.join()
            return starts
        if driver.returncode not in (-signal.SIGKILL, 143) or starts > 5:
            raise RuntimeError(f"ended with {driver.returncode}: {Path(log.name).read_text()[-3000:]}")


def left_behind(output: Path, environment: dict[str, str], address: str) -> list[str]:
    """What a run should have taken with it, and has not."""
    look = (
        f"import ray, json; ray.init(address={address!r}, logging_level='error', log_to_driver=False);"
        "from ray.util.placement_group import placement_group_table as t;"
        "from ray._private.state import actors;"
        "print(json.dumps([a['ActorClassName'] for a in actors().values() if a['State'] != 'DEAD']"
        " + [g['name'] or 'placement group' for g in t().values() if g['state'] != 'REMOVED']))"
    )
    deadline = time.monotonic() + 30
    while True:  # Ray takes actors of a driver that was killed with it, a moment later
        found = subprocess.run(
            [sys.executable, "-c", look], env=environment, capture_output=True, text=True, check=True
        )
        left = json.loads(found.stdout.strip().splitlines()[-1])
        if not left or time.monotonic() > deadline:
            break
        time.sleep(1)
    files = [str(path.relative_to(output)) for path in output.rglob("*") if path.name.startswith(".")]
    return [*left, *files, *(["lock.json"] if (output / "lock.json").exists() else [])]


@contextmanager
def served(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    server.ensure()
    try:
        yield server
    finally:
        server.kill()


def measure(seeds: list[int], out: Path, replicas: bool) -> None:
    """Run every seed, and write the page anew after each."""
    found: dict[str, Any] = {"iterations": ITERATIONS, "every": EVERY, "replicas": replicas, "runs": []}
    with (
        tempfile.TemporaryDirectory() as directory,
        two_node_cluster(
            cpus_per_node=3,
            RAY_health_check_initial_delay_ms="1000",
            RAY_health_check_period_ms="500",
            RAY_health_check_timeout_ms="2000",
            RAY_health_check_failure_threshold="4",
        ) as cluster,
        served(Path(directory) / "mlflow") as server,
    ):
        root = Path(directory)
        furnished(root)
        began = time.time()
        whole = subprocess.run(
            [sys.executable, "-m", "pipelines.cli", *words(root, "whole", cluster, server.uri, replicas)],
            cwd=ROOT,
            env=cluster.environment,
            capture_output=True,
            text=True,
        )
        if whole.returncode:
            raise RuntimeError(whole.stdout + whole.stderr)
        found["undisturbed_s"] = time.time() - began
        expected = weights(root / "whole")
        numbers = tracked(server.uri, "whole")
        for seed in seeds:
            folder = root / f"seed-{seed}"
            folder.mkdir()
            began = time.time()
            starts = disturbed(folder, root, seed, cluster, server, replicas)
            run = {"seed": seed, "seconds": time.time() - began, "began": began, "starts": starts}
            own = weights(root / f"disturbed-{seed}")
            run["equal"] = all(torch.equal(own[name], each) for name, each in expected.items())
            run["tracked_once_and_equal"] = tracked(server.uri, f"disturbed-{seed}") == numbers
            run["left"] = left_behind(root / f"disturbed-{seed}", cluster.environment, cluster.address)
            run["log"] = Log(folder / "log.jsonl").read()
            found["runs"].append(run)
            print(json.dumps({key: value for key, value in run.items() if key != "log"}), flush=True)
            write(found, out)


def weights(output: Path) -> dict[str, torch.Tensor]:
    model = ModelDirectory(output / "model")
    return {name: model.get(name) for name in model.keys()}  # noqa: SIM118 (not a mapping)


def tracked(uri: str, name: str) -> dict[str, dict[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    places = [each.experiment_id for each in client.search_experiments()]
    (run,) = client.search_runs(places, f"attributes.run_name = 'distill {name}'")
    return history(uri, run.info.run_id)


def costs(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each fault: when it was injected, when it was recovered from, and when the run was further than before.

    A fault may be seen an update later: a rollout that is made ahead fails when it is used.
    """
    found, updates = [], [line for line in log if line["what"] == "done"]
    injections = [line for line in log if line["what"] == "injected"]
    ends = [line["time"] for line in injections[1:]] + [math.inf]
    for line, end in zip(injections, ends, strict=True):
        own = [each for each in log if line["time"] < each["time"] < end]
        over = next((each for each in own if each["what"] in ("recovered", "driver ended")), None)
        fault = {"kind": line["kind"], "iteration": line["iteration"], "time": line["time"]}
        if over is None or over.get("code") == 0:  # it cost the run nothing
            found.append({**fault, "seen_as": "", "recovered_s": None, "lost_s": None})
            continue
        before = max((each["done"] for each in updates if each["time"] <= over["time"]), default=0)
        again = next(each for each in updates if each["time"] > over["time"] and each["done"] > before)
        recovered = over["what"] == "recovered"
        found.append(
            {
                **fault,
                "seen_as": over["kind"] if recovered else "resubmitted",
                "recovered_s": over["time"] - line["time"] if recovered else None,
                "lost_s": again["time"] - line["time"],
            }
        )
    return found


def write(found: dict[str, Any], folder: Path) -> None:
    """The page, its plot, and all that was measured."""
    import matplotlib

    name = "faults_replicas" if found["replicas"] else "faults"
    storage.write_text(folder / f"{name}.json", json.dumps(found))

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(len(found["runs"]), 1, figsize=(11, 2.4 * len(found["runs"])), squeeze=False)
    for axis, run in zip(axes[:, 0], found["runs"], strict=True):
        points = [
            (line["time"] - run["began"], line["done"]) for line in run["log"] if line["what"] == "done"
        ]
        axis.plot(*zip(*points, strict=True), color="0.3", linewidth=1)
        for fault in costs(run["log"]):
            since = fault["time"] - run["began"]
            axis.axvspan(since, since + (fault["lost_s"] or 0), color="tab:red", alpha=0.15, linewidth=0)
            axis.plot([since], [fault["iteration"]], "x", color="tab:red", markersize=5)
        axis.set_ylabel(f"updates, seed {run['seed']}")
    axes[-1, 0].set_xlabel("seconds (crosses: faults; shaded: until the run was further than before)")
    figure.tight_layout()
    figure.savefig(folder / f"{name}.png", dpi=90)
    by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds(found["replicas"])}
    for run in found["runs"]:
        for fault in costs(run["log"]):
            by_kind[fault["kind"]].append(fault)

    def spread(values: list[float]) -> str:
        values = sorted(values)
        if len(values) < 2:
            return f"{values[0]:.1f}" if values else "–"
        return f"{values[len(values) // 2]:.1f} ({values[0]:.1f} to {values[-1]:.1f})"

    rows = []
    for kind, faults in by_kind.items():
        seen = ", ".join(dict.fromkeys(each["seen_as"] or "goes on" for each in faults))
        recovered = spread([each["recovered_s"] for each in faults if each["recovered_s"] is not None])
        lost = spread([each["lost_s"] for each in faults if each["lost_s"] is not None])
        rows.append(f"| {kind} | {seen} | {recovered} | {lost} |")
    runs = [
        f"| {run['seed']} | {sum(each['what'] == 'injected' for each in run['log'])} | {run['starts']} | "
        f"{run['seconds']:.0f} | {'yes' if run['equal'] else 'NO'} | "
        f"{'yes' if run['tracked_once_and_equal'] else 'NO'} | {', '.join(run['left']) or 'nothing'} |"
        for run in found["runs"]
    ]
    option, titled, rolling = (
        (" --replicas", ", where replicas roll out", "two replicas that roll out, ")
        if found["replicas"]
        else ("", "", "")
    )
    storage.write_text(
        folder / f"{name}.md",
        "\n".join(
            [
                f"# Twenty faults in one run{titled}",
                "",
                f"`python -m tests.benchmarks.faults{option}` distils the tests' tiny recipe on a Ray "
                "cluster of two nodes (two raylets on one machine), with two student ranks under ZeRO-2, "
                f"{rolling}two replicated teacher ranks and a critic, for {found['iterations']} iterations, "
                "a checkpoint after every "
                f"{found['every']}. Twenty faults hit it, one in every {found['every']} iterations, in an "
                "order and at moments that follow from the seed. It is the command that a person uses; a "
                "driver that ended is started again with `--resume`, and a node whose raylet was killed "
                "comes back after five seconds.",
                "",
                f"On {os.cpu_count()} cores ({platform.machine()}), torch {torch.__version__}, ray "
                f"{ray.__version__}. Undisturbed, the run takes {found['undisturbed_s']:.0f} s.",
                "",
                "| seed | faults | starts of the driver | seconds | weights equal to the bit | every update "
                "once in MLflow, with the same numbers | left behind |",
                "|---|---|---|---|---|---|---|",
                *runs,
                "",
                "What each cost, over the seeds: seconds from the fault to the moment that updates go on, "
                "and until the run had done one more update than before it; median, least and most. A "
                "process is taken for hung after 10 s of silence here (`distill.faults.silence_s`, 60 by "
                "default). Ray tells of a lost node some seconds later; where the next fault came sooner, "
                "both were recovered from at once, and the seconds stand with the latter.",
                "",
                "| fault | seen as | recovered, s | lost, s |",
                "|---|---|---|---|",
                *rows,
                "",
                f"![The runs over time]({name}.png)",
                "",
            ]
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results")
    parser.add_argument("--replicas", action="store_true", help="replicas roll out")
    parser.add_argument("--drive", nargs=2, metavar=("FOLDER", "SEED"))
    parser.add_argument("words", nargs="*")
    asked = parser.parse_args()
    if asked.drive:
        sys.exit(drive(Path(asked.drive[0]), int(asked.drive[1]), asked.replicas, asked.words))
    asked.out.mkdir(parents=True, exist_ok=True)
    measure(asked.seeds, asked.out, asked.replicas)


if __name__ == "__main__":
    main()
