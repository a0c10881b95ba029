"""`self-forcing evaluate`: teacher, initial and distilled student, measured on moving digits.

All three generate videos for the same prompts, the students from the same noise, in Ray tasks; a classifier of digits reads every frame, and
`model/metrics.py` compares with held-out real videos, frame index by frame index, inside the trained length and beyond it.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
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
    correct_digits,
    diversity_ratio,
    followed_motion,
    kernel_distance,
    mean_over_videos,
)
from orchestrator.cluster import release, reserve
from orchestrator.config import RanksConfig, RunConfig
from pipelines.console import Display, say
from pipelines.digit_reader import DigitReader, load_or_train, read_videos
from pipelines.generate import Generator
from pipelines.moving_digits import CANVAS, DIRECTIONS, PROMPTS, expected_shift, parse_prompt
from pipelines.report import ROWS, Report, Row, write_report
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory

READER_SEED = 0
"""The reader is one instrument for all runs, whatever their seed."""
REFERENCE_VIDEOS = 400
"""Real videos that others are compared with; more would narrow no interval that matters."""
SHEET = (0, 13, 26, 39)
"""Videos for the contact sheet: four digits, four directions."""


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
    settings, roles = config.evaluate, config.distill.roles
    models = open_models(config)
    trained, rollout = models["distilled"].card.video.frames, models["distilled"].card.rollout
    real, reference = real_videos(config)
    resources = {"teacher": roles.teacher, "initial": roles.student, "distilled": roles.student}
    for role in resources.values():
        release(
            reserve(
                [_resources(role, settings.threads)],
                purpose="evaluation",
                timeout_s=config.placement.timeout_s,
            )
        )
    jobs = {name: _job(config, name, model) for name, model in models.items()}

    def task(function: Any, role: RanksConfig | None = None) -> Any:
        share = _resources(role, settings.threads)
        return ray.remote(function).options(num_cpus=share["CPU"], num_gpus=share.get("GPU", 0))

    reader = task(train_reader).remote(f"{config.root}/outputs/digit_reader", settings.threads)
    reference_features = task(read).remote(reader, reference, settings.threads)
    made = {"real": real, **_stored(settings.output, jobs if resume else {})}
    measured: dict[str, Any] = {}

    def start_measuring(name: str) -> None:
        measured[name] = task(measure).remote(
            reader,
            made[name],
            reference_features,
            reference.numbers(),
            chunk=rollout.chunk,
            trained=trained,
            seed=config.seed,
            threads=settings.threads,
        )

    for name in made:
        start_measuring(name)
    parts: dict[str, list[Any]] = {}
    waiting: dict[Any, str] = {}
    for name in (name for name in jobs if name not in made):
        starts = range(0, settings.videos, settings.batch)
        samples = [range(first, min(first + settings.batch, settings.videos)) for first in starts]
        parts[name] = [
            task(generate, resources[name]).remote(jobs[name], part, settings.threads) for part in samples
        ]
        waiting |= dict.fromkeys(parts[name], name)
    try:
        with Display(
            "evaluate", len(jobs) * settings.videos, done=(len(made) - 1) * settings.videos
        ) as display:
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                display.update(display.done + len(_get(done)), {})
                name = waiting.pop(done)
                if name not in waiting.values():
                    made[name] = _store(settings.output, name, jobs[name], torch.cat(_get(parts[name])))
                    start_measuring(name)
        say("evaluate: measuring")
        rows = dict(zip(ROWS, _get([measured[name] for name in ROWS]), strict=True))
    finally:
        for reference_ in waiting:
            ray.cancel(reference_)
    sheet = [i for i in SHEET if i < settings.videos and PROMPTS[i] in real.prompts]
    samples = {name: made[name].pixels[sheet] for name in jobs}
    report = Report(
        config=config,
        models={
            name: {"path": model.path, "manifest": jobs[name].manifest, "lineage": dict(model.card.lineage)}
            for name, model in models.items()
        },
        rows=rows,
        trained=trained,
        chunk=rollout.chunk,
        steps=len(rollout.steps),
        samples={"real": real.pixels[[real.prompts.index(PROMPTS[i]) for i in sheet]], **samples},
        sample_prompts=[PROMPTS[i] for i in sheet],
        seconds=time.monotonic() - began,
    )
    write_report(report, tracker)
    return report


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


def _job(config: RunConfig, name: str, model: ModelDirectory) -> Job:
    with storage.reading(model.path) as directory:
        manifest = json.loads((directory / storage.MANIFEST).read_text())["sha256"]
    settings, role = config.evaluate, config.distill.roles.teacher
    if name != "teacher":
        return Job(model.path, manifest, config.seed, settings.videos, settings.frames, None)
    sampler = {
        "steps": settings.teacher_steps,
        "guidance": role.guidance,
        "negative_prompt": role.negative_prompt,
    }
    return Job(model.path, manifest, config.seed, settings.videos, model.card.video.frames, sampler)


def _resources(role: RanksConfig | None, threads: int) -> dict[str, float]:
    """What one task needs: a CPU a thread, and the GPUs of one rank of the model's role."""
    return {"CPU": threads} | ({"GPU": role.gpus} if role and role.gpus else {})


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


def generate(job: Job, samples: range, threads: int) -> Tensor:
    """A Ray task: some of a job's videos, uint8 `[len(samples), F, 1, 16, 16]`."""
    torch.set_num_threads(threads)
    generator = _generator(job.model, job.manifest, threads)
    noise = [(job.seed, "evaluate", i) for i in samples]
    if job.sampler is None:
        latents = generator.student(_prompts(samples), noise, generator.frames_of_chunks(job.frames))
    else:
        latents = generator.teacher(_prompts(samples), noise, **job.sampler)
    return _to_pixels(generator.decode(latents)[:, : job.frames])


def train_reader(directory: str, threads: int) -> DigitReader:
    """A Ray task: the digit reader, trained unless an earlier run stored it in `directory`."""
    torch.set_num_threads(threads)
    return load_or_train(directory, READER_SEED)


def read(reader: DigitReader, videos: Videos, threads: int) -> Tensor:
    """A Ray task: features `[N, F, D]`."""
    torch.set_num_threads(threads)
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
    threads: int,
) -> Row:
    """A Ray task: every metric of one set of videos.

    `reference_features` `[M, F′, D]` and `reference_prompts` `[M]` are of real videos, F′ ≥ F. `chunk` and `trained` are in frames.
    """
    torch.set_num_threads(threads)
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
