"""Scores of a video by a bidirectional model: what teacher and critic answer.

Both see the same noisy video (the plan names the noise and the timesteps) and predict x0. The teacher is
guided, the critic is not.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from infra.settings import Invalid, positive
from model.backbone import Backbone
from model.noise import Key, SampleNoise, generator, permutation
from model.sampler import guided
from model.schedule import TIMESTEPS, FlowSchedule


@dataclass(frozen=True)
class ScoreConfig:
    """How noisy videos are when they are scored, and when the critic trains."""

    shift: float = 5.0
    """Warp of the score timesteps; the published runs use 5."""
    minimum: float = 20.0
    """Lowest score timestep, 0..1000."""
    maximum: float = 980.0
    """Highest score timestep, 0..1000."""
    timesteps: Literal["independent", "stratified"] = "independent"
    """Whether each sample draws its own, as published, or the samples of an update share them out: one in
    each of as many equal parts of the range."""

    def __post_init__(self) -> None:
        positive(self, "shift")
        if not 0 <= self.minimum < self.maximum <= 1000:
            raise Invalid(
                "minimum",
                f"{self.minimum} and maximum {self.maximum} must satisfy 0 <= minimum < maximum <= 1000.",
            )


@dataclass(frozen=True)
class ScorePlan:
    """The random part of one scoring, the same for teacher and critic."""

    noise: Key  # (run seed, update, purpose); the sample index is appended
    gradient: bool = False
    """Whether gradient will flow back through the score, so that the scorer keeps its graph."""
    like: Key | None = None
    """What names the timesteps, if not what names the noise: those of another scoring."""
    batch: int = 0
    """Samples of the whole update, over which timesteps are stratified where the config says so."""

    def draw(self, video: Tensor, samples: list[int], config: ScoreConfig) -> tuple[Tensor, Tensor]:
        """Noise like `video` [B, F, C, H, W] and timesteps [B], for the samples with these indices."""
        keys = [(*self.noise, sample) for sample in samples]
        noise = SampleNoise(keys, video.device).draw(video.shape, 0, 0)
        return noise, self.timesteps(samples, config).to(video.device)

    def timesteps(self, samples: list[int], config: ScoreConfig) -> Tensor:
        """Timesteps [B] of the samples with these indices."""
        named = self.noise if self.like is None else self.like
        uniform = torch.stack(
            [torch.randint(TIMESTEPS, (), generator=generator(*named, i, "timestep")) for i in samples]
        )
        if config.timesteps == "stratified":
            # Sample i falls into part order[i] of the range, at a place of its own within it.
            order = permutation(self.batch, *named, "timesteps")
            uniform = (torch.tensor([order[i] for i in samples]) * TIMESTEPS + uniform) // self.batch
        schedule = FlowSchedule(config.shift)
        return schedule.score_timestep(uniform, config.minimum, config.maximum)


def predict_x0(
    model: Backbone, x_t: Tensor, timestep: Tensor, context: Tensor, schedule: FlowSchedule
) -> Tensor:
    """x0 [B, F, C, H, W] in float32 from a noisy video, timesteps [B] or [B, F] and a prompt embedding."""
    return schedule.x0(model(x_t, timestep, context).velocity, x_t, timestep)


def guided_x0(
    model: Backbone,
    x_t: Tensor,
    timestep: Tensor,
    *,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
    schedule: FlowSchedule,
) -> Tensor:
    """The guided x0; both branches run as one batch. Without guidance only the conditional one runs."""
    if guidance == 0:
        return predict_x0(model, x_t, timestep, cond, schedule)
    predict = partial(predict_x0, model, schedule=schedule)
    return guided(predict, x_t, timestep, cond=cond, uncond=uncond, guidance=guidance)
