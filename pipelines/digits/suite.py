"""The suite `digits`: a classifier reads the digit in every frame, and the content must move as the prompt
says.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.metrics import Estimate, diversity_ratio, kernel_distance, mean_over_videos
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.digits.digit_reader import DigitReader, load_or_train, read_videos
from pipelines.digits.metrics import correct_digits, followed_motion
from pipelines.digits.moving_digits import CANVAS, DIRECTIONS, PROMPTS, expected_shift, parse_prompt
from pipelines.suite import Compared, Metric, Row, Suite, Verdict, Videos, row_of
from workers.data_check import check
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory, TextConfig

READER_SEED = 0
"""The reader is one instrument for all runs, whatever their seed."""
REFERENCE_VIDEOS = 400
"""Real videos that others are compared with; more would narrow no interval that matters."""
SHEET = tuple(PROMPTS[i] for i in (0, 13, 26, 39))
"""Prompts on the contact sheet: four digits, four directions."""


@dataclass(frozen=True)
class Prepared:
    """The instrument, and what it sees in the real videos that others are compared with."""

    reader: DigitReader
    features: Tensor
    """`[M, F, D]`."""
    prompts: Tensor
    """`[M]`, as numbers."""


def numbers(prompts: Sequence[str]) -> Tensor:
    """Each of N prompts as an integer, digit by digit and direction by direction, `[N]`."""
    parsed = [parse_prompt(prompt) for prompt in prompts]
    return torch.tensor(
        [digit * len(DIRECTIONS) + DIRECTIONS.index(direction) for digit, direction in parsed]
    )


class Digits(Suite):
    title = "Evaluation on moving digits"
    version = 1
    metrics: ClassVar = {
        "digit_accuracy": Metric(
            "digit accuracy",
            "drift.png",
            "a classifier, trained on scans of the training split, reads each frame.",
            share=True,
        ),
        "motion_following": Metric(
            "motion following",
            "motion.png",
            "whether the content moved from the frame before as the prompt says.",
            share=True,
        ),
        "diversity": Metric(
            "diversity within a prompt, real = 1",
            "diversity.png",
            "how far apart the correctly read frames of one prompt are in the classifier's features, as a "
            "share of how "
            "far apart real ones are.",
        ),
        "kernel_distance": Metric(
            "kernel distance to real videos",
            "distance.png",
            "unbiased squared maximum mean discrepancy between the classifier's features of generated and "
            "real "
            "frames of one index; the real videos' row compares two disjoint sets of real videos.",
        ),
    }
    headline = "digit_accuracy"
    # Diversity is not among them, for neither more nor less of it is better; a model that makes few different
    # videos has a larger kernel distance.
    compared: ClassVar = {
        "digit_accuracy_inside": Compared(1, 0.02),
        "digit_accuracy_beyond": Compared(1, 0.02),
        "motion_following_overall": Compared(1, 0.02),
        "kernel_distance_overall": Compared(-1, 0.02),
    }
    shares = ("digit_accuracy", "diversity")
    notes = (
        "Intervals of diversity and distance over several frames are means of the frames' intervals, hence "
        "never "
        "too narrow.",
    )

    def check(self, config: RunConfig, models: Mapping[str, ModelDirectory]) -> None:
        for name in ("prompts", "features"):
            if getattr(config.evaluate, name) is not None:
                raise ValueError(
                    f"evaluate.{name} is not used by evaluate.suite digits, which has its own; leave it out."
                )
        for name, model in models.items():
            video, codec = model.card.video, model.card.video.make_codec()
            one = torch.zeros(1, 1, *video.shape[1:])
            if codec is None or codec.decode(one).shape[2:] != (1, CANVAS, CANVAS):
                raise ValueError(
                    f"the {name} model at {model.path} makes no frames of 1×{CANVAS}×{CANVAS}, which moving "
                    "digits "
                    "have; evaluate.suite video measures any."
                )

    def prompts(self, config: RunConfig) -> list[str]:
        return list(PROMPTS)

    def held_out(
        self, config: RunConfig, models: Mapping[str, ModelDirectory]
    ) -> tuple[Videos, Videos] | None:
        path, settings, skip = config.data.held_out, config.evaluate, config.data.skip_damaged
        data = ParquetDataset(path, ["prompt", "video"], skip_damaged=skip)
        frames = len(data.row(0)["video"])
        if frames < settings.frames:
            raise ValueError(
                f"evaluate.frames is {settings.frames}, and the videos of data.held_out at {path} have "
                f"{frames}; "
                f"use at most {frames}, or prepare longer ones with data.source_settings.held_out_frames."
            )
        wanted = replace(config.video, frames=settings.frames)
        text = TextConfig()
        for note in check("data.held_out", path, text, None, video=wanted, longer=True, skip_damaged=skip):
            say(f"evaluate: {note}")
        count = min(settings.videos, len(data) // 2)
        if count < 2:
            raise ValueError(
                f"data.held_out at {path} holds {len(data)} videos; evaluation needs at least 4."
            )
        rows = [data.row(i) for i in range(min(len(data), count + max(count, REFERENCE_VIDEOS)))]
        pixels = torch.stack([row["video"][: settings.frames] for row in rows])
        pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
        videos = Videos([row["prompt"] for row in rows], pixels)
        return videos[:count], videos[count:]

    def prepare(self, config: RunConfig, reference: Videos | None) -> Prepared:
        """The reader is trained, unless an earlier run stored it."""
        assert reference is not None, "held_out gives one or raises"
        reader = load_or_train(f"{config.root}/outputs/digit_reader", READER_SEED)
        return Prepared(reader, read_videos(reader, reference.frames())[1], numbers(reference.prompts))

    def measure(self, prepared: Any, videos: Videos, *, chunk: int, trained: int, seed: int) -> Row:
        frames = videos.frames()
        count, length = frames.shape[:2]
        logits, features = read_videos(prepared.reader, frames)
        prompts, real = numbers(videos.prompts), prepared.features[:, :length]
        correct = correct_digits(logits, prompts // len(DIRECTIONS))
        shifts = torch.tensor([expected_shift(DIRECTIONS[number % len(DIRECTIONS)]) for number in prompts])
        # Nothing precedes the first frame.
        followed = torch.cat([torch.full((count, 1), math.nan), followed_motion(frames, shifts)], dim=1)
        nothing = torch.full((length,), math.nan)
        by_frame = {
            "digit_accuracy": mean_over_videos(correct, seed=seed),
            "motion_following": mean_over_videos(followed, seed=seed),
            "diversity": Estimate(nothing, nothing, nothing),
            "kernel_distance": kernel_distance(features, real, seed=seed),
        }
        if all(len(each.unique()) < len(each) for each in (prompts, prepared.prompts)):
            by_frame["diversity"] = diversity_ratio(
                features, prompts, correct, real_features=real, real_prompts=prepared.prompts, seed=seed
            )
        values = {"digit_accuracy": correct, "motion_following": followed}
        return row_of(by_frame, values=values, references={}, chunk=chunk, trained=trained, seed=seed)

    def sheet(self, prompts: Sequence[str]) -> list[str]:
        return list(SHEET)

    def verdicts(self, rows: Mapping[str, Row]) -> list[Verdict]:
        """What a distillation is asked for: quality, motion, diversity, and no drift. Asked of all three
        models only."""
        if not {"teacher", "initial", "distilled"} <= rows.keys():
            return []
        real, teacher, initial, distilled = (
            rows[name] for name in ("real", "teacher", "initial", "distilled")
        )
        accuracy = "digit_accuracy"

        def share(metric: str) -> Tensor:
            return distilled.inside[metric].value / teacher.inside[metric].value

        def gap(upper: Estimate, lower: Estimate) -> Tensor:
            """Between two intervals; negative where they overlap."""
            return upper.low - lower.high

        gaps = gap(distilled.by_chunk[accuracy], initial.by_chunk[accuracy])[1:]
        asked = {
            "the reader's accuracy on held-out real videos": (real.overall[accuracy].value, 0.98),
            "the teacher's digit accuracy": (teacher.inside[accuracy].value, 0.9),
            "distilled student: digit accuracy inside the trained length, as a share of the teacher's": (
                share(accuracy),
                0.9,
            ),
            "distilled student: motion following inside the trained length": (
                distilled.inside["motion_following"].value,
                0.9,
            ),
            "distilled student: diversity inside the trained length, as a share of the teacher's": (
                share("diversity"),
                0.7,
            ),
            "digit accuracy, distilled above initial: the smallest gap between 95 % intervals from the "
            "second chunk on": (
                gaps.min() if len(gaps) else torch.tensor(math.nan),
                0.0,
            ),
            "digit accuracy, distilled above initial: the gap between 95 % intervals beyond the trained "
            "length": (
                gap(distilled.beyond[accuracy], initial.beyond[accuracy]),
                0.0,
            ),
            "digit accuracy, distilled above initial: the difference on average": (
                distilled.overall[accuracy].value - initial.overall[accuracy].value,
                0.0,
            ),
        }
        return [Verdict(claim, value.item(), bound) for claim, (value, bound) in asked.items()]


SUITE = Digits()
