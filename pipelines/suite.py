"""What an evaluation suite is: what it measures by frame index, and which numbers a promotion compares.

Generating, storing and resuming videos, intervals, the report and its pictures are common to all suites
(`pipelines/evaluate.py`, `pipelines/report.py`); only metrics belong to a suite. See docs/adding-a-suite.md.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from model.metrics import Estimate, difference_of_means, mean_over_videos
from orchestrator.config import RunConfig
from workers.dataset import ParquetDataset
from workers.model_directory import ModelDirectory

REFERENCE_VIDEOS = 400
"""Held-out videos that others are compared with; more would narrow no interval that matters."""


@dataclass(frozen=True)
class Videos:
    """Videos of one model, or real ones."""

    prompts: Sequence[str]  # N of them
    pixels: Tensor | None = None
    """uint8 `[N, F, channels, height, width]`; none where there is no codec to make them."""
    latents: Tensor | None = None  # float32 `[N, F, C, H, W]`, where the suite asks for them
    clamped: Tensor | None = None
    """Share of pixels that decoding clamped, `[N, F]`; none for videos that nobody decoded."""

    def __getitem__(self, part: slice) -> "Videos":
        every = (self.pixels, self.latents, self.clamped)
        return Videos(self.prompts[part], *(None if each is None else each[part] for each in every))

    def clamped_shares(self) -> Tensor:
        """`clamped`, NaN where nobody decoded."""
        if self.clamped is not None:
            return self.clamped
        made = self.pixels if self.pixels is not None else self.latents
        assert made is not None, "videos have pixels or latents"
        return torch.full(made.shape[:2], math.nan)

    def frames(self) -> Tensor:
        """float32 pixels in [−1, 1]."""
        assert self.pixels is not None, "who asks for frames has seen that there are pixels"
        return self.pixels.float() / 127.5 - 1


@dataclass(frozen=True)
class Row:
    """The videos of one model, or real ones, measured.

    Each mapping goes from a metric's name to its estimate, which is NaN where the metric is not defined, such
    as any beyond the trained length for a teacher.
    """

    frames: int  # of each video
    by_frame: Mapping[str, Estimate]  # `[frames]`
    by_chunk: Mapping[str, Estimate]  # `[chunks]`, means over a chunk's frames
    inside: Mapping[str, Estimate]  # scalars: means over the frames of the trained length
    beyond: Mapping[str, Estimate]  # over the frames after it
    overall: Mapping[str, Estimate]  # over all frames


@dataclass(frozen=True)
class Metric:
    """How a metric is shown."""

    words: str
    picture: str  # file of its curve; metrics that share one are its panels
    explained: str  # one line for the report: what it is, in which unit
    share: bool = False  # whether it lies between 0 and 1


CLAMPED = Metric(
    "share of pixels clamped",
    "clamped.png",
    "pixels that decoding would have put more than one of 255 steps beyond black or white.",
    share=True,
)
"""What any suite of videos can be asked: contrast that runs away shows here, for decoding hides it."""


@dataclass(frozen=True)
class Compared:
    """How a promotion compares a number."""

    sign: int  # 1 where more is better, −1 where less is
    margin: float  # by how much it may be worse, in its own unit


@dataclass(frozen=True)
class Verdict:
    """A claim about the models and whether the numbers support it."""

    claim: str
    value: float  # what was measured; NaN supports no claim
    bound: float  # the least that is asked for; a difference, whose bound is 0, must exceed it

    @property
    def met(self) -> bool:
        return self.value >= self.bound if self.bound else self.value > 0


class Suite(ABC):
    """One way to measure videos. It has no state: its methods run in Ray tasks, too."""

    title: str
    version: int
    """Raised with every change of what a number means; numbers of two versions are never compared."""
    metrics: ClassVar[Mapping[str, Metric]]
    headline: str  # the metric that is tabled chunk by chunk
    compared: ClassVar[Mapping[str, Compared]]
    """What a promotion compares: `METRIC_SPAN`, the span one of inside, beyond and overall."""
    latents = False  # whether it measures latents beside pixels
    shares: Sequence[str] = ()  # metrics that are also given as shares of the teacher's
    notes: Sequence[str] = ()
    """Lines for the report's section on how it was measured, beside the metrics' own."""

    @abstractmethod
    def check(self, config: RunConfig, models: Mapping[str, ModelDirectory]) -> None:
        """ValueError, in one sentence, where models or settings do not fit; nothing is started yet."""

    @abstractmethod
    def prompts(self, config: RunConfig) -> list[str]:
        """What the videos show, one prompt after the other and from the start again."""

    @abstractmethod
    def held_out(
        self, config: RunConfig, models: Mapping[str, ModelDirectory]
    ) -> tuple[Videos, Videos] | None:
        """Two disjoint sets of real videos: one to measure as if a model had made it, one to compare with.

        None where the recipe has none: the teacher's samples stand in. ValueError where they do not fit.
        """

    @abstractmethod
    def prepare(self, config: RunConfig, reference: Videos | None) -> Any:
        """What measuring needs, made once in a Ray task, if possible beside the generation of videos."""

    @abstractmethod
    def measure(self, prepared: Any, videos: Videos, *, chunk: int, trained: int, seed: int) -> Row:
        """A Ray task: every metric of one set of videos; `chunk` and `trained` are in frames."""

    def sheet(self, prompts: Sequence[str]) -> list[str]:
        """Prompts of the contact sheet."""
        return list(prompts[:4])

    def verdicts(self, rows: Mapping[str, Row]) -> list[Verdict]:
        """What is asked of the models whose rows there are."""
        return []

    def basis(self, config: RunConfig) -> dict[str, str]:
        """Besides suite and version, what must be equal for two models' numbers to be comparable at all."""
        return {}


def row_of(
    values: Mapping[str, Tensor],
    *,
    references: Mapping[str, Tensor] | None = None,
    others: Mapping[str, Estimate] | None = None,
    chunk: int,
    trained: int,
    seed: int,
) -> Row:
    """The row of means over videos, given video by video as `values` `[N, F]`, and of `others` `[F]`.

    A metric that is a difference has the values that are subtracted among the `references` `[M, F]`. Chunks
    and spans are averaged video by video too; an interval of `others` is there the mean of the frames'
    intervals, hence never too narrow. `chunk` and `trained` are in frames.
    """
    frames = next(iter(values.values())).shape[1]
    chunks = [slice(first, min(first + chunk, frames)) for first in range(0, frames, chunk)]
    spans = [*chunks, slice(0, trained), slice(trained, frames), slice(0, frames)]

    def over(part: Tensor) -> Tensor:
        return torch.stack([part[..., span].nanmean(-1) for span in spans], dim=-1)

    by_frame, averages = {}, {}
    for metric, each in values.items():
        if references and metric in references:
            real = references[metric]
            by_frame[metric] = difference_of_means(each, real, seed=seed)
            averages[metric] = difference_of_means(over(each), over(real), seed=seed)
        else:
            by_frame[metric] = mean_over_videos(each, seed=seed)
            averages[metric] = mean_over_videos(over(each), seed=seed)
    for metric, estimate in (others or {}).items():
        by_frame[metric], averages[metric] = estimate, Estimate(*map(over, estimate))
    picked = [
        {metric: estimate.at(which) for metric, estimate in averages.items()}
        for which in (slice(0, len(chunks)), -3, -2, -1)
    ]
    return Row(frames, by_frame, *picked)


def held_out_rows(config: RunConfig, data: ParquetDataset) -> tuple[int, list[dict[str, Any]]]:
    """How many of data.held_out's videos to measure, and the rows of these and of those to compare them with.

    ValueError where there are too few.
    """
    count = min(config.evaluate.videos, len(data) // 2)
    if count < 2:
        path = config.data.held_out
        raise ValueError(f"data.held_out at {path} holds {len(data)} videos; evaluation needs at least 4.")
    return count, [data.row(i) for i in range(min(len(data), count + max(count, REFERENCE_VIDEOS)))]
