"""`self-forcing evaluate`: a suite measures teacher, initial and distilled student, as far as they are there.

All generate videos for the same prompts, the students from the same noise, in Ray tasks; the recipe's suite
measures them, frame index by frame index, inside the trained length and beyond it.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra import storage
from infra.tracking import Tracker
from model.codec import to_bytes
from model.watch import clamped_share
from orchestrator import run_state
from orchestrator.cluster import connect, release, reserve
from orchestrator.config import RunConfig
from pipelines import suites, vbench
from pipelines.console import Display, console, say, summary
from pipelines.report import SHEET, Report, summary_table, write_report
from pipelines.suite import Row, Suite, Videos
from pipelines.tracked import located, tracking
from workers.generator import Generator
from workers.model_directory import ModelDirectory


@dataclass(frozen=True)
class Job:
    """The videos that one model makes."""

    model: str
    manifest: str  # hash of the model's manifest, which names its weights
    seed: int
    videos: int
    frames: int
    sampler: Mapping[str, Any] | None
    """A teacher's steps, guidance and negative_prompt; none for a student, whose card says its own."""
    prompts: tuple[str, ...]  # one after the other, and from the start again
    latents: bool  # whether latents are kept beside pixels

    def identity(self) -> dict[str, Any]:
        """What decides the videos; wherever the model lies."""
        sampler = self.sampler and dict(self.sampler)
        numbers = {"seed": self.seed, "videos": self.videos, "frames": self.frames, "latents": self.latents}
        return {"manifest": self.manifest, **numbers, "sampler": sampler, "prompts": list(self.prompts)}

    def prompts_of(self, samples: range) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in samples]


class Measured(NamedTuple):
    """What evaluation made and found, by model and, under `real`, of real videos where there are any."""

    videos: dict[str, Videos]
    rows: dict[str, Row]
    reference: str  # what was compared with: held_out, teacher or none


def evaluate(
    config: RunConfig, *, tracker: Tracker | None, resume: bool, export: str | None = None
) -> Report:
    """Measure the models that are there on the connected cluster, and write the report to `evaluate.output`.

    With `resume`, videos that a model made with the same weights, settings and seed are not made again.
    `export` is a directory for the models' videos under the names that VBench expects. Raises ValueError
    where there is no student, or models, data and suite do not fit each other.
    """
    began = time.monotonic()
    config = config.located()
    suite = suites.find(config.evaluate.suite)
    models = open_models(config)
    suite.check(config, models)
    if export is not None:
        vbench.check(suite.prompts(config), config.evaluate.videos)
    card = student_of(models).card
    rollout, codec = card.rollout, card.video.make_codec()
    assert rollout is not None, "a student's card says how it generates"
    chunk, trained = (
        latents if codec is None else codec.frames(latents) for latents in (rollout.chunk, card.video.frames)
    )
    jobs = {name: job_of(config, suite, model) for name, model in models.items()}
    videos, rows, reference = measure_models(
        config, suite, models, jobs, chunk=chunk, trained=trained, resume=resume
    )
    if export is not None:
        vbench.export(export, {name: videos[name] for name in models}, fps=card.video.fps)
    sheet = suite.sheet(next(iter(jobs.values())).prompts)
    report = Report(
        config=config,
        suite=suite,
        reference=reference,
        models={
            name: {"path": job.model, "manifest": job.manifest, "lineage": dict(models[name].card.lineage)}
            for name, job in jobs.items()
        },
        rows=rows,
        trained=trained,
        chunk=chunk,
        steps=len(rollout.steps),
        first_steps=len(rollout.steps_at(0)),
        samples=samples(videos, sheet),
        sample_prompts=sheet,
        seconds=time.monotonic() - began,
    )
    write_report(report, tracker)
    return report


def measure_models(
    config: RunConfig,
    suite: Suite,
    models: Mapping[str, ModelDirectory],
    jobs: Mapping[str, Job],
    *,
    chunk: int,
    trained: int,
    resume: bool,
) -> Measured:
    """Videos and measurements; `chunk` and `trained` are in frames."""
    held_out = suite.held_out(config, models)
    for model in models.values():
        role = config.distill.roles.teacher if not model.card.causal else config.distill.roles.student
        bundle = {"CPU": config.evaluate.threads, "GPU": role.gpus}
        release(reserve([bundle], purpose="evaluation", timeout_s=config.placement.timeout_s))

    videos: dict[str, Videos] = {}
    source, reference, prepared = "none", None, None
    prepare = _task(config, suite.prepare)
    if held_out is not None:
        # Preparing may take a while, so it goes on beside the generation of videos.
        videos["real"], reference = held_out
        source, prepared = "held_out", prepare.remote(config, reference)
    videos |= make_videos(config, jobs, resume=resume)
    measured = dict(videos)
    half = config.evaluate.videos // 2
    if held_out is None and "teacher" in videos and half >= 2:
        # No video is compared with itself.
        source, made = "teacher", videos["teacher"]
        reference, measured["teacher"] = made[half:], made[:half]
    if prepared is None:
        prepared = prepare.remote(config, reference)
    say("evaluate: measuring")
    measure = _task(config, suite.measure)
    settings = {"chunk": chunk, "trained": trained, "seed": config.seed}
    rows = _get([measure.remote(prepared, each, **settings) for each in measured.values()])
    return Measured(videos, dict(zip(measured, rows, strict=True)), source)


def student_of(models: Mapping[str, ModelDirectory]) -> ModelDirectory:
    """The distilled student where there is one, else the initial one."""
    return models["distilled"] if "distilled" in models else models["initial"]


def samples(videos: Mapping[str, Videos], prompts: list[str]) -> dict[str, Tensor]:
    """One video of each of P prompts, uint8 `[P, F, channels, H, W]`; black where a set of videos has none.

    Where there are no pixels the first channel of the latents stands for them, in grey.
    """

    def pick(made: Videos, prompt: str) -> Tensor:
        shown = made.pixels
        if shown is None:
            assert made.latents is not None, "videos have pixels or latents"
            first = made.latents[:, :, :1].float()
            low, high = first.amin(), first.amax()
            shown = ((first - low) / (high - low).clamp(min=1e-6) * 255).round().byte()
        if prompt in made.prompts:
            return shown[list(made.prompts).index(prompt)]
        return torch.zeros_like(shown[0])

    return {name: torch.stack([pick(made, prompt) for prompt in prompts]) for name, made in videos.items()}


def make_videos(config: RunConfig, jobs: Mapping[str, Job], *, resume: bool) -> dict[str, Videos]:
    """The videos of every job, in that order: made in Ray tasks of a batch, stored by model."""
    settings, roles = config.evaluate, config.distill.roles
    made = _stored(settings.output, jobs) if resume else {}
    parts: dict[str, list[Any]] = {}
    for name, job in jobs.items():
        if name not in made:
            task = _task(config, generate, gpus=(roles.teacher if name == "teacher" else roles.student).gpus)
            starts = range(0, settings.videos, settings.batch)
            batches = [range(first, min(first + settings.batch, settings.videos)) for first in starts]
            parts[name] = [task.remote(job, part) for part in batches]
    waiting = {reference: name for name, references in parts.items() for reference in references}
    try:
        with Display("evaluate", len(jobs) * settings.videos, done=len(made) * settings.videos) as display:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                display.update(display.done + len(next(iter(_get(done).values()))), {})
                name = waiting.pop(done)
                if name not in waiting.values():
                    made[name] = _store(settings.output, name, jobs[name], _get(parts[name]))
    finally:
        for reference in waiting:
            ray.cancel(reference)
    return {name: made[name] for name in jobs}


def _task(config: RunConfig, function: Callable[..., Any], *, gpus: float = 0.0) -> Any:
    """`function` as a Ray task with `evaluate.threads` CPUs, for as many torch threads."""
    threads = config.evaluate.threads

    def run(*arguments: Any, **settings: Any) -> Any:
        torch.set_num_threads(threads)
        return function(*arguments, **settings)

    return ray.remote(run).options(name=f"evaluate.{function.__name__}", num_cpus=threads, num_gpus=gpus)


def open_models(config: RunConfig) -> dict[str, ModelDirectory]:
    """Teacher, initial and distilled student, as far as they are there.

    ValueError, naming the setting, where there is no student, or a model is damaged or does not fit.
    """
    settings, distill = config.evaluate, config.distill
    for name in ("videos", "batch", "teacher_steps", "threads"):
        if getattr(settings, name) < 1:
            raise ValueError(f"evaluate.{name} is {getattr(settings, name)}; it must be at least 1.")
    paths = {
        "teacher": ("distill.teacher", distill.teacher),
        "initial": ("distill.student", distill.student),
        "distilled": ("distill.output", f"{distill.output}/model"),
    }
    models = {}
    for name, (setting, path) in paths.items():
        if not storage.exists(path):
            continue
        models[name] = model = ModelDirectory(path)
        if model.card.causal != (name != "teacher"):
            is_, wanted = ("student", "teacher") if model.card.causal else ("teacher", "student")
            raise ValueError(
                f"{setting}: the model at {path} is a {is_}, and evaluation needs a {wanted} there."
            )
        if model.card.text.encoder == "embedded":
            raise ValueError(
                f"{setting}: the model at {path} takes embedded prompts, and evaluation writes its prompts "
                "as text; its text.encoder must be umt5."
            )
        if (trained := model.card.video.frames) > settings.frames:
            raise ValueError(
                f"evaluate.frames is {settings.frames}, less than the {trained} frames that the model at "
                f"{path} is trained on; use at least {trained}."
            )
    if not models.keys() & {"initial", "distilled"}:
        places = " nor ".join(f"at {path} ({setting})" for setting, path in list(paths.values())[1:])
        raise ValueError(
            f"there is no student to evaluate, neither {places}; run `self-forcing initialize` or "
            "`self-forcing distill` first, or set either."
        )
    for name, (setting, path) in paths.items():
        if name not in models:
            say(f"evaluate: there is no {name} model at {path} ({setting}); it is left out")
    return models


def job_of(config: RunConfig, suite: Suite, model: ModelDirectory) -> Job:
    """The videos that evaluation asks of a model."""
    manifest = storage.manifest_digest(model.path)
    settings, role = config.evaluate, config.distill.roles.teacher
    frames, sampler = settings.frames, None
    if not model.card.causal:
        frames = model.card.video.frames
        sampler = {
            "steps": settings.teacher_steps,
            "guidance": settings.teacher_guidance,
            "negative_prompt": role.negative_prompt,
        }
    return Job(
        model=model.path,
        manifest=manifest,
        seed=config.seed,
        videos=settings.videos,
        frames=frames,
        sampler=sampler,
        prompts=tuple(suite.prompts(config)),
        latents=suite.latents,
    )


def _stored(output: str, jobs: Mapping[str, Job]) -> dict[str, Videos]:
    """Videos that earlier runs finished with the same weights, settings and seed."""
    stored = {}
    for name, job in jobs.items():
        path = f"{output}/videos/{name}"
        if run_state.unlike(path, job.identity()) == "":
            with storage.reading(path) as directory:
                stored[name] = videos_of(job, load_file(directory / "videos.safetensors"))
            say(f"evaluate: the videos of {job.model} are there already")
    return stored


def _store(output: str, name: str, job: Job, parts: list[dict[str, Tensor]]) -> Videos:
    tensors = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    path = f"{output}/videos/{name}"
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        save_file(tensors, directory / "videos.safetensors")
    storage.publish(staging, path, {"identity": job.identity()})
    return videos_of(job, tensors)


def videos_of(job: Job, tensors: Mapping[str, Tensor]) -> Videos:
    made = (tensors.get(name) for name in ("pixels", "latents", "clamped"))
    return Videos(job.prompts_of(range(job.videos)), *made)


def _get(references: Any) -> Any:
    """`ray.get`, with a user's mistake that a task found raised as what it is."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, ValueError):
            raise ValueError(str(error.cause)) from None
        raise


@lru_cache(maxsize=1)
def _generator(model: str, manifest: str, threads: int) -> Generator:
    """Kept between the tasks that a worker process runs; `manifest` tells a model from its predecessor."""
    return Generator(model, threads)


def generate(job: Job, samples: range) -> dict[str, Tensor]:
    """A Ray task: the videos `samples`, `[len(samples), F, …]`: `pixels` in 8 bits where there is a codec,
    and `latents` where the job keeps them."""
    return made_by(_generator(job.model, job.manifest, torch.get_num_threads()), job, samples, "evaluate")


def made_by(generator: Generator, job: Job, samples: range, purpose: str) -> dict[str, Tensor]:
    """The same, by a generator of the job's model; another purpose is other noise."""
    prompts, noise = job.prompts_of(samples), [(job.seed, purpose, i) for i in samples]
    if job.sampler is None:
        latents = generator.student(prompts, noise, generator.frames_of_chunks(job.frames))
    else:
        latents = generator.teacher(prompts, noise, **job.sampler)
    made = {}
    if generator.codec is not None:
        frames = generator.codec.unclamped(latents[:, : job.frames])
        made["pixels"] = to_bytes(frames).contiguous()
        made["clamped"] = clamped_share(frames)
    if job.latents:
        made["latents"] = latents[:, : job.frames].float().contiguous()
    return made


def make_report(config: RunConfig, *, resume: bool, export: str | None = None) -> None:
    """Measure the models that are there, with a tracking run, and show the table."""
    student = student_of(open_models(config))
    with tracking(config, "evaluate", config.evaluate.output, dict(student.card.lineage)) as tracker:
        report = evaluate(config, tracker=tracker, resume=resume, export=export)
        console.print(summary_table(report))
        output = config.evaluate.output
        rows = {"report": f"{output}/report.md", "samples": f"{output}/{SHEET}"}
        summary("Evaluation", rows | {"tracking": tracker.how_to_open()})


def command(config: RunConfig, options: Any) -> None:
    config = located("evaluate", config)
    with connect(options.address):
        make_report(config, resume=options.resume, export=options.export_vbench)
