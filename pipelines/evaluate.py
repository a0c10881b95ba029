"""`self-forcing evaluate`: teacher, initial and distilled student, measured on moving digits.

All three generate videos for the same prompts, the students from the same noise, in Ray tasks; a classifier of digits reads every frame, and
`model/metrics.py` compares with held-out real videos, frame index by frame index, inside the trained length and beyond it.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ray
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from infra import storage
from infra.tracking import Tracker
from model.metrics import (
    Estimate,
    diversity_ratio,
    kernel_distance,
    mean_over_videos,
)
from orchestrator.cluster import release, reserve
from orchestrator.config import RunConfig
from pipelines.console import Display, say
from pipelines.digits.digit_reader import DigitReader, load_or_train, read_videos
from pipelines.digits.metrics import correct_digits, followed_motion
from pipelines.digits.moving_digits import CANVAS, DIRECTIONS, PROMPTS, expected_shift, parse_prompt
from pipelines.report import Report, Row, write_report
from workers.dataset import ParquetDataset
from workers.generator import Generator
from workers.model_directory import ModelDirectory

READER_SEED = 0
"""The reader is one instrument for all runs, whatever their seed."""
REFERENCE_VIDEOS = 400
"""Real videos that others are compared with; more would narrow no interval that matters."""
SHEET = tuple(PROMPTS[i] for i in (0, 13, 26, 39))
"""Prompts on the contact sheet: four digits, four directions."""


@dataclass(frozen=True)
class Videos:
    """Videos of frames in 8 bits, as real ones are stored."""

    pixels: Tensor
    """uint8 `[N, F, 1, 16, 16]`."""
    prompts: Sequence[str]
    """N prompts of moving digits."""

    def __getitem__(self, part: slice) -> "Videos":
        return Videos(self.pixels[part], self.prompts[part])

    def frames(self) -> Tensor:
        """float32 in [−1, 1]."""
        return self.pixels.float() / 127.5 - 1

    def numbers(self) -> Tensor:
        """Each prompt as an integer, digit by digit and direction by direction, `[N]`."""
        parsed = [parse_prompt(prompt) for prompt in self.prompts]
        return torch.tensor(
            [digit * len(DIRECTIONS) + DIRECTIONS.index(direction) for digit, direction in parsed]
        )


@dataclass(frozen=True)
class Job:
    """The videos that one model makes."""

    model: str
    manifest: str
    """Hash of the model's manifest, which names its weights."""
    seed: int
    videos: int
    frames: int
    sampler: Mapping[str, Any] | None
    """A teacher's steps, guidance and negative_prompt; none for a student, whose checkpoint says how it generates."""

    def identity(self) -> dict[str, Any]:
        """What decides the videos; wherever the model lies."""
        sampler = self.sampler and dict(self.sampler)
        numbers = {"seed": self.seed, "videos": self.videos, "frames": self.frames}
        return {"manifest": self.manifest, **numbers, "sampler": sampler, "prompts": list(PROMPTS)}


def evaluate(config: RunConfig, *, tracker: Tracker | None, resume: bool) -> Report:
    """Measure the three models on the connected cluster, and write the report to `evaluate.output`.

    With `resume`, videos that a model made with the same weights, settings and seed are not made again.
    Raises ValueError where a model is missing, makes no moving digits, or the real videos are too few or too short.
    """
    began = time.monotonic()
    config = config.located()
    models = open_models(config)
    card = models["distilled"].card
    rollout = card.rollout
    assert rollout is not None, "a student's card says how it generates"
    jobs = {name: job_of(config, model) for name, model in models.items()}
    trained = card.video.frames
    videos, rows = measure_models(config, models, jobs, chunk=rollout.chunk, trained=trained, resume=resume)
    report = Report(
        config=config,
        models={
            name: {"path": job.model, "manifest": job.manifest, "lineage": dict(models[name].card.lineage)}
            for name, job in jobs.items()
        },
        rows=rows,
        trained=trained,
        chunk=rollout.chunk,
        steps=len(rollout.steps),
        samples=samples(videos),
        sample_prompts=SHEET,
        seconds=time.monotonic() - began,
    )
    write_report(report, tracker)
    return report


def measure_models(
    config: RunConfig,
    models: Mapping[str, ModelDirectory],
    jobs: Mapping[str, Job],
    *,
    chunk: int,
    trained: int,
    resume: bool,
) -> tuple[dict[str, Videos], dict[str, Row]]:
    """Videos and measurements of each model and, under `real`, of real videos; `chunk` and `trained` are in frames."""
    real, reference = real_videos(config)
    for model in models.values():
        role = config.distill.roles.teacher if model.card.kind == "teacher" else config.distill.roles.student
        bundle = {"CPU": config.evaluate.threads, "GPU": role.gpus}
        release(reserve([bundle], purpose="evaluation", timeout_s=config.placement.timeout_s))

    # Training takes a while the first time, so it goes on beside the generation of videos.
    reader = _task(config, train_reader).remote(f"{config.root}/outputs/digit_reader")
    features = _task(config, read).remote(reader, reference)
    videos = {"real": real, **make_videos(config, jobs, resume=resume)}
    say("evaluate: measuring")
    settings = {"chunk": chunk, "trained": trained, "seed": config.seed}
    names = ["real", *models]
    measuring = [
        _task(config, measure).remote(reader, videos[name], features, reference.numbers(), **settings)
        for name in names
    ]
    return videos, dict(zip(names, _get(measuring), strict=True))


def samples(videos: Mapping[str, Videos]) -> dict[str, Tensor]:
    """One video of each prompt on the contact sheet, uint8 `[P, F, 1, H, W]`; blank where a set of videos has none."""

    def pick(made: Videos, prompt: str) -> Tensor:
        if prompt in made.prompts:
            return made.pixels[list(made.prompts).index(prompt)]
        return torch.zeros_like(made.pixels[0])

    return {name: torch.stack([pick(made, prompt) for prompt in SHEET]) for name, made in videos.items()}


def make_videos(config: RunConfig, jobs: Mapping[str, Job], *, resume: bool) -> dict[str, Videos]:
    """The videos of every job, generated in Ray tasks of one batch each, and stored under `evaluate.output` model by model."""
    settings, roles = config.evaluate, config.distill.roles
    made = _stored(settings.output, jobs) if resume else {}
    parts: dict[str, list[Any]] = {}
    for name, job in jobs.items():
        if name not in made:
            task = _task(config, generate, gpus=(roles.teacher if name == "teacher" else roles.student).gpus)
            starts = range(0, settings.videos, settings.batch)
            samples = [range(first, min(first + settings.batch, settings.videos)) for first in starts]
            parts[name] = [task.remote(job, part) for part in samples]
    waiting = {reference: name for name, references in parts.items() for reference in references}
    try:
        with Display("evaluate", len(jobs) * settings.videos, done=len(made) * settings.videos) as display:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                display.update(display.done + len(_get(done)), {})
                name = waiting.pop(done)
                if name not in waiting.values():
                    made[name] = _store(settings.output, name, jobs[name], torch.cat(_get(parts[name])))
    finally:
        for reference in waiting:
            ray.cancel(reference)
    return made


def _task(config: RunConfig, function: Callable[..., Any], *, gpus: float = 0.0) -> Any:
    """`function` as a Ray task with `evaluate.threads` CPUs, for as many torch threads."""
    threads = config.evaluate.threads

    def run(*arguments: Any, **settings: Any) -> Any:
        torch.set_num_threads(threads)
        return function(*arguments, **settings)

    return ray.remote(run).options(name=f"evaluate.{function.__name__}", num_cpus=threads, num_gpus=gpus)


def open_models(config: RunConfig) -> dict[str, ModelDirectory]:
    """Teacher, initial and distilled student; ValueError, naming the setting, where one is missing or does not fit."""
    settings, distill = config.evaluate, config.distill
    for name in ("videos", "batch", "teacher_steps", "threads"):
        if getattr(settings, name) < 1:
            raise ValueError(f"evaluate.{name} is {getattr(settings, name)}; it must be at least 1.")
    paths = {
        "teacher": ("distill.teacher", distill.teacher, "pretrain"),
        "initial": ("distill.student", distill.student, "initialize"),
        "distilled": ("distill.output", f"{distill.output}/model", "distill"),
    }
    models = {}
    for name, (setting, path, command) in paths.items():
        if not storage.is_complete(path):
            raise ValueError(
                f"there is no complete {name} model at {path}; run `self-forcing {command}` first, or set {setting}."
            )
        models[name] = model = ModelDirectory(path)
        wanted = "teacher" if name == "teacher" else "student"
        if model.card.kind != wanted:
            raise ValueError(
                f"{setting}: the model at {path} is a {model.card.kind}, and evaluation needs a {wanted} there."
            )
        video, codec = model.card.video, model.card.video.make_codec()
        if codec is None or codec.decode(torch.zeros(1, 1, *video.shape[1:])).shape[2:] != (
            1,
            CANVAS,
            CANVAS,
        ):
            raise ValueError(
                f"{setting}: the model at {path} makes no frames of 1×{CANVAS}×{CANVAS}; evaluation reads moving digits."
            )
        if video.frames > settings.frames:
            raise ValueError(
                f"evaluate.frames is {settings.frames}, less than the {video.frames} frames that the model at {path} is trained on; "
                f"use at least {video.frames}."
            )
    return models


def real_videos(config: RunConfig) -> tuple[Videos, Videos]:
    """Two disjoint sets of held-out videos: one to measure as if a model had made it, one to compare with.

    ValueError where the data set is too small or its videos are shorter than `evaluate.frames`.
    """
    path, settings = config.data.held_out, config.evaluate
    data = ParquetDataset(path, ["prompt", "video"])
    frames = len(data.row(0)["video"])
    if frames < settings.frames:
        raise ValueError(
            f"evaluate.frames is {settings.frames}, and the videos of data.held_out at {path} have {frames}; "
            f"use at most {frames}, or prepare longer ones with data.held_out_frames."
        )
    count = min(settings.videos, len(data) // 2)
    if count < 2:
        raise ValueError(f"data.held_out at {path} holds {len(data)} videos; evaluation needs at least 4.")
    rows = [data.row(i) for i in range(min(len(data), count + max(count, REFERENCE_VIDEOS)))]
    pixels = _to_pixels(torch.stack([row["video"][: settings.frames] for row in rows]))
    videos = Videos(pixels, [row["prompt"] for row in rows])
    return videos[:count], videos[count:]


def job_of(config: RunConfig, model: ModelDirectory) -> Job:
    """The videos that evaluation asks of a model."""
    with storage.reading(model.path) as directory:
        manifest = json.loads((directory / storage.MANIFEST).read_text())["sha256"]
    settings, role = config.evaluate, config.distill.roles.teacher
    if model.card.kind == "student":
        return Job(model.path, manifest, config.seed, settings.videos, settings.frames, None)
    sampler = {
        "steps": settings.teacher_steps,
        "guidance": settings.teacher_guidance,
        "negative_prompt": role.negative_prompt,
    }
    return Job(model.path, manifest, config.seed, settings.videos, model.card.video.frames, sampler)


def _stored(output: str, jobs: Mapping[str, Job]) -> dict[str, Videos]:
    """Videos that earlier runs finished with the same weights, settings and seed."""
    stored = {}
    for name, job in jobs.items():
        path = f"{output}/videos/{name}"
        if storage.is_complete(path) and storage.read_metadata(path) == job.identity():
            storage.verify(path)
            with storage.reading(path) as directory:
                stored[name] = Videos(
                    load_file(directory / "videos.safetensors")["pixels"], _prompts(range(job.videos))
                )
            say(f"evaluate: the videos of {job.model} are there already")
    return stored


def _store(output: str, name: str, job: Job, pixels: Tensor) -> Videos:
    path = f"{output}/videos/{name}"
    staging = storage.begin(path)
    with storage.writing(staging) as directory:
        save_file({"pixels": pixels}, directory / "videos.safetensors")
    storage.publish(staging, path, job.identity())
    return Videos(pixels, _prompts(range(job.videos)))


def _prompts(samples: range) -> list[str]:
    return [PROMPTS[i % len(PROMPTS)] for i in samples]


def _to_pixels(frames: Tensor) -> Tensor:
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte()


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


def generate(job: Job, samples: range) -> Tensor:
    """A Ray task: some of a job's videos, uint8 `[len(samples), F, 1, 16, 16]`."""
    generator = _generator(job.model, job.manifest, torch.get_num_threads())
    noise = [(job.seed, "evaluate", i) for i in samples]
    if job.sampler is None:
        latents = generator.student(_prompts(samples), noise, generator.frames_of_chunks(job.frames))
    else:
        latents = generator.teacher(_prompts(samples), noise, **job.sampler)
    return _to_pixels(generator.decode(latents)[:, : job.frames])


def train_reader(directory: str) -> DigitReader:
    """A Ray task: the digit reader, trained unless an earlier run stored it in `directory`."""
    return load_or_train(directory, READER_SEED)


def read(reader: DigitReader, videos: Videos) -> Tensor:
    """A Ray task: features `[N, F, D]`."""
    return read_videos(reader, videos.frames())[1]


def measure(
    reader: DigitReader,
    videos: Videos,
    reference_features: Tensor,
    reference_prompts: Tensor,
    *,
    chunk: int,
    trained: int,
    seed: int,
) -> Row:
    """A Ray task: every metric of one set of videos.

    `reference_features` `[M, F′, D]` and `reference_prompts` `[M]` are of real videos, F′ ≥ F. `chunk` and `trained` are in frames.
    """
    count, frames = videos.pixels.shape[:2]
    logits, features = read_videos(reader, videos.frames())
    numbers, real = videos.numbers(), reference_features[:, :frames]
    correct = correct_digits(logits, numbers // len(DIRECTIONS))
    shifts = torch.tensor([expected_shift(DIRECTIONS[number % len(DIRECTIONS)]) for number in numbers])
    # Nothing precedes the first frame.
    followed = torch.cat([torch.full((count, 1), math.nan), followed_motion(videos.frames(), shifts)], dim=1)
    by_frame = {
        "digit_accuracy": mean_over_videos(correct, seed=seed),
        "motion_following": mean_over_videos(followed, seed=seed),
        "diversity": _undefined(frames),
        "kernel_distance": kernel_distance(features, real, seed=seed),
    }
    if all(len(prompts.unique()) < len(prompts) for prompts in (numbers, reference_prompts)):
        by_frame["diversity"] = diversity_ratio(
            features, numbers, correct, real_features=real, real_prompts=reference_prompts, seed=seed
        )
    chunks = [slice(first, min(first + chunk, frames)) for first in range(0, frames, chunk)]
    spans = [*chunks, slice(0, trained), slice(trained, frames), slice(0, frames)]
    averages = {metric: _average(estimate, spans) for metric, estimate in by_frame.items()}
    for metric, values in (("digit_accuracy", correct), ("motion_following", followed)):
        per_video = torch.stack([values[:, span].nanmean(1) for span in spans], dim=1)
        averages[metric] = mean_over_videos(per_video, seed=seed)

    def pick(which: Any) -> dict[str, Estimate]:
        return {
            metric: Estimate(e.value[which], e.low[which], e.high[which]) for metric, e in averages.items()
        }

    return Row(frames, by_frame, pick(slice(0, len(chunks))), pick(-3), pick(-2), pick(-1))


def _undefined(frames: int) -> Estimate:
    nothing = torch.full((frames,), math.nan)
    return Estimate(nothing, nothing, nothing)


def _average(estimate: Estimate, spans: Sequence[slice]) -> Estimate:
    """Means of an estimate over spans of frames, `[S]`; the interval is never too narrow, however frames depend on each other."""

    def mean(part: Tensor) -> Tensor:
        return torch.stack([part[span].nanmean() for span in spans])

    return Estimate(mean(estimate.value), mean(estimate.low), mean(estimate.high))
