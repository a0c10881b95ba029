"""What each command does, from a config to a summary."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from infra import storage
from infra.tracking import Tracker
from orchestrator.cluster import Cluster, connect
from orchestrator.config import RunConfig
from pipelines import cli
from pipelines.console import console, progress, say, summary


def dispatch(command: str, arguments: Sequence[str]) -> int:
    """Run one command; ValueError for a user's mistake."""
    if command == "submit":
        from pipelines.submit import main

        return main(arguments)
    if command == "serve":
        from pipelines.serve import main as serve

        return serve(arguments)
    if command == "register":
        from pipelines.register import main as register

        return register(arguments)
    if command == "promote":
        from pipelines.promote import main as promote

        return promote(arguments)
    if command == "experiment":
        return experiment(arguments)
    config, options = cli.parse(command, arguments)
    if command == "generate":
        from pipelines.generate import generate_video

        if not options.model or options.prompt is None:
            raise ValueError(
                "generate needs --model, a directory of a student, and --prompt, what the video shows."
            )
        path = generate_video(
            model=options.model,
            prompt=options.prompt,
            frames=options.frames,
            seed=config.seed,
            output=options.output,
            image=options.image,
        )
        say(f"wrote {path}")
        return 0
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(config.root).is_absolute():
        say(
            f"{command}: root {config.root!r} lies in this job's working directory, which is deleted some time after the job;"
            " give --root an absolute path that every node can read."
        )
    config = config.located()
    if command == "prepare":
        prepare(config)
        return 0
    with connect(options.address) as cluster:
        if command == "run":
            run_all(config, cluster, resume=True)
        elif command == "evaluate":
            evaluate(config, cluster, options.resume, options.export_vbench)
        else:
            STAGES[command](config, cluster, options.resume)
    return 0


def prepare(config: RunConfig) -> None:
    """Write the moving-digit data sets that are not there yet."""
    from pipelines.digits.moving_digits import write_dataset

    data = config.data
    write_dataset(data.train, videos=data.videos, frames=config.video.frames, seed=config.seed, split="train")
    write_dataset(
        data.held_out,
        videos=data.held_out_videos,
        frames=data.held_out_frames,
        seed=config.seed + 1,
        split="held_out",
    )
    say(
        f"prepare: {data.videos} training videos in {data.train}, {data.held_out_videos} held-out ones in {data.held_out}"
    )


@contextmanager
def tracking(
    config: RunConfig, stage: str, output: str, parents: Mapping[str, str], resume_run_id: str | None = None
):
    """A tracker of one stage, and where to look at it."""
    with Tracker.start(
        config.tracking,
        folder=Path(output),
        run_name=f"{stage} {output.removeprefix(f'{config.root}/').removeprefix('outputs/')}",
        stage=stage,
        params=asdict(config),
        parents=parents,
        resume_run_id=resume_run_id,
    ) as tracker:
        say(f"{stage}: MLflow run {tracker.run_id}. {tracker.how_to_open()}")
        yield tracker


def run_id_of(newest: str | None) -> str | None:
    """The tracking run that a checkpoint belongs to."""
    return storage.read_metadata(newest).get("run_id") if newest else None


def pretrain(config: RunConfig, cluster: Cluster, resume: bool) -> None:
    from orchestrator.single_model import Stage, train
    from pipelines import pretrain as module

    stage = Stage("pretrain", config.pretrain, config.seed)
    previous = run_id_of(storage.newest_complete(stage.checkpoints)) if resume else None
    with tracking(config, "pretrain", config.pretrain.output, {}, previous) as tracker:
        path = train(
            stage,
            module.Pretrain(config, tracker.run_id),
            tracker=tracker,
            resume=resume,
            progress=partial(progress, stage.name, stage.settings.updates),
        )
        summary("Teacher", {"model": path, "tracking": tracker.how_to_open()})


def initialize(config: RunConfig, cluster: Cluster, resume: bool) -> None:
    from orchestrator.single_model import Stage, train
    from pipelines import initialize as module
    from pipelines.ode_pairs import write_pairs

    teacher = module.check(config)
    if config.initialize.method in ("ode", "causal_ode"):
        say(f"initialize: {config.initialize.pairs} ODE pairs in {config.initialize.pairs_path}")
        write_pairs(config)
    stage = Stage("initialize", config.initialize, config.seed)
    parents = dict(teacher.card.lineage)
    previous = run_id_of(storage.newest_complete(stage.checkpoints)) if resume else None
    with tracking(config, "initialize", config.initialize.output, parents, previous) as tracker:
        task = module.METHODS[config.initialize.method](
            config, {**parents, "initial_student": tracker.run_id}
        )
        path = train(
            stage,
            task,
            tracker=tracker,
            resume=resume,
            progress=partial(progress, stage.name, stage.settings.updates),
        )
        summary("Initial student", {"model": path, "tracking": tracker.how_to_open()})


def distill(config: RunConfig, cluster: Cluster, resume: bool) -> None:
    from pipelines import distill as module

    models = module.check_models(config)
    parents = {**models["teacher"].card.lineage, **models["student"].card.lineage}
    newest = storage.newest_complete(f"{config.distill.output}/checkpoints") if resume else None
    with tracking(config, "distill", config.distill.output, parents, run_id_of(newest)) as tracker:
        path = module.distill(config, tracker=tracker, resume=resume, grows=not cluster.started_here)
        samples = sorted(Path(config.distill.output).glob("samples/*.mp4"))
        rows = {"model": path, "tracking": tracker.how_to_open()}
        summary("Distilled student", rows | ({"sample video": str(samples[-1])} if samples else {}))


def evaluate(config: RunConfig, cluster: Cluster, resume: bool, export: str | None = None) -> None:
    from pipelines import evaluate as module
    from pipelines.report import SHEET, summary_table

    student = module.student_of(module.open_models(config))
    with tracking(config, "evaluate", config.evaluate.output, dict(student.card.lineage)) as tracker:
        report = module.evaluate(config, tracker=tracker, resume=resume, export=export)
        console.print(summary_table(report))
        output = config.evaluate.output
        rows = {
            "report": f"{output}/report.md",
            "samples": f"{output}/{SHEET}",
        }
        summary("Evaluation", rows | {"tracking": tracker.how_to_open()})


STAGES: dict[str, Callable[[RunConfig, Cluster, bool], Any]] = {
    "pretrain": pretrain,
    "initialize": initialize,
    "distill": distill,
    "evaluate": evaluate,
}


def experiment(arguments: Sequence[str]) -> int:
    """Every cell of an experiment that is not done yet, and its report."""
    from pipelines.digits import experiment as module

    if not arguments or arguments[0].startswith("-"):
        raise ValueError(
            "experiment needs a name first, for example `self-forcing experiment exposure-bias`."
        )
    chosen, overrides = module.open_experiment(arguments[0]), arguments[1:]
    _, options = cli.parse("evaluate", overrides)
    with connect(options.address) as cluster:

        def made_by(stage: Callable[[RunConfig, Cluster, bool], Any]) -> Callable[[RunConfig], None]:
            return lambda config: stage(config, cluster, True)

        make = {name: made_by(stage) for name, stage in STAGES.items()}
        module.run(chosen, overrides, make={"prepare": prepare, **make}, track=tracking)
    return 0


def run_all(config: RunConfig, cluster: Cluster, *, resume: bool) -> None:
    """Every stage whose model is not there yet, then the evaluation."""
    prepare(config)
    made = {
        "pretrain": config.distill.teacher,
        "initialize": config.distill.student,
        "distill": f"{config.distill.output}/model",
    }
    for stage, model in made.items():
        if storage.is_complete(model):
            say(f"{stage}: {model} is there already")
        else:
            STAGES[stage](config, cluster, resume)
    evaluate(config, cluster, resume)
