"""What a way to an initial student declares, and what its loss is given."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from model.forcing import Module
from model.noise import Key
from model.rollout_plan import RolloutConfig
from model.schedule import FlowSchedule


@dataclass(frozen=True)
class Setup:
    """What stays the same from one update to the next."""

    settings: Any  # the run's `MethodConfig`
    rollout: RolloutConfig  # how the student generates once it is distilled; its schedule is the only one
    negative: Tensor  # embedding [text_len, text_dim] of the negative prompt
    teacher: Callable[..., Tensor] | None  # the frozen teacher's velocity, where the method asks it
    device: torch.device

    @property
    def schedule(self) -> FlowSchedule:
        return FlowSchedule(self.rollout.shift)


@dataclass(frozen=True)
class Share:
    """The part of one update's batch that a rank learns from at once: B of `batch` samples."""

    context: Tensor  # embeddings [B, text_len, text_dim] of the prompts
    clean: Tensor | None  # real videos [B, F, C, H, W]; none where ODE pairs start from noise alone
    trajectory: Tensor | None
    """The teacher's way from noise to video [B, S, F, C, H, W] at the student's S − 1 steps and its end,
    noisiest first."""
    seed: int
    update: int
    samples: range
    batch: int

    def keys(self, purpose: str, *, whole: bool = False) -> list[Key]:
        """What names the random numbers of each sample, or of each of the `whole` batch."""
        samples = range(self.batch) if whole else self.samples
        return [(self.seed, self.update, purpose, sample) for sample in samples]


@dataclass(frozen=True)
class Method:
    """One way to an initial student, and what it asks for."""

    loss: Callable[[Module, Setup, Share], Tensor]
    """The loss of a share, whose mean over shares of equal size is the loss of the batch."""
    data: Literal["pairs", "videos"]
    """Stored ODE pairs of the teacher, or real videos; pairs of a causal teacher come with the real videos
    before them."""
    teacher: Literal["bidirectional", "causal"] | None = None
    """What the model that the student starts from must be; either, if None."""
    asks_teacher: bool = False  # whether the loss asks that model, frozen, beside the student
    many_step: bool = False
    """Whether the finished model follows an ODE in many guided steps, rather than the student's few."""

    @property
    def real_videos(self) -> bool:
        """Whether there is nothing to learn from without real videos."""
        return self.data == "videos" or self.teacher == "causal"
