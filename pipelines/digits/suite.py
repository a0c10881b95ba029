"""The suite `digits`: a classifier reads the digit in every frame, and the content must move as prompted."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.codec import to_bytes
from model.metrics import Estimate, diversity_ratio, kernel_distance
from orchestrator.config import RunConfig
from pipelines.console import say
from pipelines.digits.digit_reader import DigitReader, load, read_videos
from pipelines.digits.metrics import correct_digits, followed_motion
from pipelines.digits.moving_digits import CANVAS, DIRECTIONS, PROMPTS, expected_shift, parse_prompt
from pipelines.suite import CLAMPED, Compared, Metric, Row, Suite, Verdict, Videos, held_out_rows, row_of
from workers.data_check import check
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory, TextConfig

SHEET = tuple(PROMPTS[i] for i in (0, 13, 26, 39))
"""Prompts on the contact sheet: four digits, four directions."""


@dataclass(frozen=True)
class Prepared:
    """The instrument, and what it sees in the real videos that others are compared with."""

    reader: DigitReader
    features: Tensor  # `[M, F, D]`
    prompts: Tensor  # `[M]`, as numbers


def numbers(prompts: Sequence[str]) -> Tensor:
    """Each of N prompts as an integer, digit by digit and direction by direction, `[N]`."""
    parsed = map(parse_prompt, prompts)
    return torch.tensor([digit * len(DIRECTIONS) + DIRECTIONS.index(way) for digit, way in parsed])


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
        "clamped": CLAMPED,
        "diversity": Metric(
            "diversity within a prompt, real = 1",
            "diversity.png",
            "how far apart the correctly read frames of one prompt are in the classifier's features, as a "
            "share of how far apart real ones are.",
        ),
        "kernel_distance": Metric(
            "kernel distance to real videos",
            "distance.png",
            "unbiased squared maximum mean discrepancy between the classifier's features of generated and "
            "real frames of one index; the real videos' row compares two disjoint sets of real videos.",
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
        "never too narrow.",
    )

    def check(self, config: RunConfig, models: Mapping[str, ModelDirectory]) -> None:
        for name in ("prompts", "features"):
            if getattr(config.evaluate, name) is not None:
                raise ValueError(
                    f"evaluate.{name} is not used by evaluate.suite digits, which has its own; leave it out."
                )
        for name, model in models.items():
            video, codec = model.card.video, model.card.video.make_codec()
            if codec is None or codec.shape((1, *video.shape[1:]))[1:] != (1, CANVAS, CANVAS):
                raise ValueError(
                    f"the {name} model at {model.path} makes no frames of 1×{CANVAS}×{CANVAS}, which moving "
                    "digits have; evaluate.suite video measures any."
                )

    def prompts(self, config: RunConfig) -> list[str]:
        return list(PROMPTS)

    def held_out(
        self, config: RunConfig, models: Mapping[str, ModelDirectory]
    ) -> tuple[Videos, Videos] | None:
        path, frames, skip = config.data.held_out, config.evaluate.frames, config.data.skip_damaged
        data = ParquetDataset(path, ["prompt", "video"], skip_damaged=skip)
        longest = len(data.row(0)["video"])
        if longest < frames:
            raise ValueError(
                f"evaluate.frames is {frames}, and the videos of data.held_out at {path} have {longest}; use "
                f"at most {longest}, or prepare longer ones with data.source_settings.held_out_frames."
            )
        wanted, text = replace(config.video, frames=frames), TextConfig()
        for note in check("data.held_out", path, text, None, video=wanted, longer=True, skip_damaged=skip):
            say(f"evaluate: {note}")
        count, rows = held_out_rows(config, data)
        pixels = to_bytes(torch.stack([row["video"][:frames] for row in rows]))
        videos = Videos([row["prompt"] for row in rows], pixels)
        return videos[:count], videos[count:]

    def prepare(self, config: RunConfig, reference: Videos | None) -> Prepared:
        assert reference is not None, "held_out gives one or raises"
        reader = load()
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
        diversity = Estimate.undefined(length)
        if all(len(each.unique()) < len(each) for each in (prompts, prepared.prompts)):
            diversity = diversity_ratio(
                features, prompts, correct, real_features=real, real_prompts=prepared.prompts, seed=seed
            )
        return row_of(
            {
                "digit_accuracy": correct,
                "motion_following": followed,
                "clamped": videos.clamped_shares(),
            },
            others={"diversity": diversity, "kernel_distance": kernel_distance(features, real, seed=seed)},
            chunk=chunk,
            trained=trained,
            seed=seed,
        )

    def sheet(self, prompts: Sequence[str]) -> list[str]:
        return list(SHEET)

    def verdicts(self, rows: Mapping[str, Row]) -> list[Verdict]:
        """Asked of all three models only: quality, motion, diversity, and no drift."""
        if not {"teacher", "initial", "distilled"} <= rows.keys():
            return []
        teacher, initial, distilled = (rows[name] for name in ("teacher", "initial", "distilled"))
        accuracy, inside = "digit_accuracy", "inside the trained length"

        def share(metric: str) -> Tensor:
            return distilled.inside[metric].value / teacher.inside[metric].value

        def gap(span: str) -> Tensor:
            """Between the intervals of accuracy; negative where they overlap."""
            return getattr(distilled, span)[accuracy].low - getattr(initial, span)[accuracy].high

        gaps = gap("by_chunk")[1:]
        above = distilled.overall[accuracy].value - initial.overall[accuracy].value
        motion = distilled.inside["motion_following"].value
        student, gain = "distilled student:", "digit accuracy, distilled above initial: the"
        asked = [
            ("the reader's accuracy on held-out real videos", rows["real"].overall[accuracy].value, 0.98),
            ("the teacher's digit accuracy", teacher.inside[accuracy].value, 0.9),
            (f"{student} digit accuracy {inside}, as a share of the teacher's", share(accuracy), 0.9),
            (f"{student} motion following {inside}", motion, 0.9),
            (f"{student} diversity {inside}, as a share of the teacher's", share("diversity"), 0.7),
            (
                f"{gain} smallest gap between 95 % intervals from the second chunk on",
                gaps.min() if len(gaps) else torch.tensor(math.nan),
                0.0,
            ),
            (f"{gain} gap between 95 % intervals beyond the trained length", gap("beyond"), 0.0),
            (f"{gain} difference on average", above, 0.0),
        ]
        return [Verdict(claim, value.item(), bound) for claim, value, bound in asked]


SUITE = Digits()
