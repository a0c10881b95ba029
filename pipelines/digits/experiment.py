"""`self-forcing experiment NAME`: many trainings that differ in little, measured alike, in one table.

Cell by cell a model is trained (on from where it was stopped) and measured; a cell's measurements are
published whole, so what is there is not done again, and the report is written anew after each.
"""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from safetensors.torch import save_file

from infra import storage
from infra.provenance import git_commit, versions
from infra.tracking import Tracker
from orchestrator import run_state
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.digits.ablation import write_report
from pipelines.digits.cells import Experiment, config_of, open_experiment
from pipelines.digits.suite import SHEET, SUITE
from pipelines.distill import make_student
from pipelines.evaluate import job_of, measure_models, samples
from pipelines.initialize import make_initial
from pipelines.prepare import prepare
from pipelines.report import estimates_json
from pipelines.suite import Row
from pipelines.tracked import is_done, tracking
from workers.model_directory import ModelDirectory


def identity(config: RunConfig, stage: str, models: Mapping[str, ModelDirectory]) -> dict[str, Any]:
    """What decides a cell's numbers: settings, and the weights that it starts from."""
    trains: Literal["initialize", "distill"] = "initialize" if stage == "initialize" else "distill"
    found = run_state.settings(config, trains)
    if stage == "evaluate":
        found = {
            name: each for name, each in found.items() if name.startswith(("seed", "video.", "rollout."))
        }
    elif stage == "distill":
        found["distill.iterations"] = config.distill.iterations
        if (choice := config.distill.selection.choice) is not None:
            found["distill.selection"] = choice
    measured = ("videos", "frames", "batch", "teacher_steps", "teacher_guidance", "threads")
    found |= {f"evaluate.{name}": getattr(config.evaluate, name) for name in measured}
    found |= {"data.source": config.data.source, "data.source_settings": config.data.source_settings}
    weights = {f"weights.{role}": run_state.weights_digest(model.path) for role, model in models.items()}
    return found | weights


def run(experiment: Experiment, overrides: Sequence[str], cluster: Cluster) -> None:
    """Every cell that is not there yet, seed by seed, so that what is there compares like with like."""
    make = {"initialize": make_initial, "distill": make_student}
    shared = config_of(experiment, None, experiment.seeds[0], overrides)
    every = [(cell, seed) for seed in experiment.seeds for cell in experiment.cells]
    configs = {(cell.name, seed): config_of(experiment, cell, seed, overrides) for cell, seed in every}
    prepare(shared)
    if not is_done(shared, "initialize", shared.distill.student):
        make_initial(shared, resume=True)(cluster)
    start = {
        "teacher": ModelDirectory(shared.distill.teacher),
        "initial": ModelDirectory(shared.distill.student),
    }
    results = f"{shared.root}/{experiment.results}"
    done = f"{results}/cells"
    if not _is_done(f"{done}/references", shared, "evaluate", start):
        _measure(f"{done}/references", shared, "evaluate", start, start, 0.0)
    for number, (cell, seed) in enumerate(every, start=1):
        config, path = configs[cell.name, seed], f"{done}/{cell.name}-{seed}"
        if _is_done(path, config, cell.stage, start):
            continue
        say(f"experiment: cell {number} of {len(every)}, {cell.title}, seed {seed}")
        began = time.monotonic()
        output = getattr(config, cell.stage).output
        if not is_done(config, cell.stage, f"{output}/model"):
            make[cell.stage](config, resume=True)(cluster)
        trained = {cell.name: ModelDirectory(f"{output}/model")}
        _measure(path, config, cell.stage, start, trained, time.monotonic() - began)
        write_report(experiment, shared, done, overrides)
    with tracking(shared, "report", f"{shared.root}/outputs/{experiment.name}", {}) as tracker:
        for file in write_report(experiment, shared, done, overrides):
            tracker.artifact(file, "report")
    say(f"experiment: the report is {results}.md")


def _is_done(path: str, config: RunConfig, stage: str, start: Mapping[str, ModelDirectory]) -> bool:
    if unlike := run_state.unlike(path, identity(config, stage, start)):
        raise ValueError(f"{path} was measured otherwise: {unlike}; delete it, or choose another root.")
    return unlike is not None


def _measure(
    path: str,
    config: RunConfig,
    stage: str,
    start: Mapping[str, ModelDirectory],
    models: Mapping[str, ModelDirectory],
    trained_s: float,
) -> None:
    """Measure models and publish what was found as `path`."""
    began = time.monotonic()
    jobs = {name: job_of(config, SUITE, model) for name, model in models.items()}
    lineage = {role: run for model in models.values() for role, run in model.card.lineage.items()}
    with tracking(config, "evaluate", config.evaluate.output, lineage) as tracker:
        measured = measure_models(
            config, SUITE, models, jobs, chunk=config.rollout.chunk, trained=config.video.frames, resume=True
        )
        videos, rows = measured.videos, measured.rows
        if stage != "evaluate":
            # Real videos are the same for all cells; the references hold them.
            del videos["real"], rows["real"]
        for name, row in rows.items():
            _track(tracker, name, row)
        staging = storage.begin(path)
        with storage.writing(staging) as directory:
            found = {
                "seconds": {"train": round(trained_s, 1), "evaluate": round(time.monotonic() - began, 1)},
                "run_id": tracker.run_id,
                "made_with": versions() | git_commit(),
                "rows": {name: estimates_json(row.by_frame) for name, row in rows.items()},
            }
            (directory / "metrics.json").write_text(json.dumps(found, allow_nan=False))
            save_file(samples(videos, list(SHEET)), directory / "samples.safetensors")
        storage.publish(staging, path, {"identity": identity(config, stage, start)})


def _track(tracker: Tracker, name: str, row: Row) -> None:
    for frame in range(row.frames):
        values = {f"{name}/{metric}": row.by_frame[metric].value[frame].item() for metric in SUITE.metrics}
        tracker.metrics(frame, {key: value for key, value in values.items() if value == value})


def command(_: None, options: Any) -> None:
    chosen = open_experiment(options.name)
    config_of(chosen, None, chosen.seeds[0], options.overrides)  # before anything starts
    with connect(options.address) as cluster:
        run(chosen, options.overrides, cluster)
