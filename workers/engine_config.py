"""Settings of `TrainEngine`; light, so that a configuration is checked without importing torch."""

import math
from dataclasses import dataclass
from typing import Literal

from infra.settings import Invalid, at_least, positive, share


@dataclass(frozen=True)
class ScheduleConfig:
    """How a learning rate changes.

    It is a function of the optimizer steps made and of nothing else, so a resumed run goes on with the same
    rates, and one that goes on past the end of the schedule with the last.
    """

    kind: Literal["constant", "linear", "cosine"] = "constant"
    """Whether the rate stays, or falls from `learning_rate` along a line or half a cosine."""
    warmup: int = 0
    """First steps, over which the rate also rises linearly."""
    updates: int | None = None
    """Optimizer steps after which a falling rate has reached `final` and stays there. Null is as many as
    pretraining or initialisation makes; distillation, whose `iterations` may grow, asks for a number."""
    final: float = 0.0
    """Share of `learning_rate` that a falling rate ends at, 0..1."""

    def __post_init__(self) -> None:
        if self.kind not in ("constant", "linear", "cosine"):
            raise Invalid("kind", f"is {self.kind!r}: use constant, linear or cosine.")
        at_least(self, 0, "warmup")
        at_least(self, 1, "updates")
        share(self, "final")
        if self.kind == "constant" and (self.updates is not None or self.final):
            raise Invalid(
                "updates" if self.updates is not None else "final",
                "is of a rate that falls: set kind to linear or cosine, or leave it out.",
            )

    def rate(self, peak: float, step: int) -> float:
        """The learning rate of optimizer step `step` (from 0), for a `learning_rate` of `peak`."""
        rise = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        if self.kind == "constant":
            return peak * rise
        assert self.updates is not None, "whoever makes an engine says how long its schedule is"
        left = max(0.0, 1 - step / self.updates)
        if self.kind == "cosine":
            left = (1 - math.cos(math.pi * left)) / 2
        return peak * rise * (self.final + (1 - self.final) * left)


@dataclass(frozen=True)
class EngineConfig:
    """How one model is trained: ZeRO, precision, AdamW (Loshchilov and Hutter 2019), accumulation, EMA."""

    learning_rate: float
    """AdamW step size; the largest one where it follows a schedule."""
    schedule: ScheduleConfig = ScheduleConfig()
    """How the step size changes."""
    zero_stage: int = 2
    """What the ranks share: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights."""
    offload: bool = False
    """Keep the optimizer state, and at stage 3 the weights, in host memory (stages 1 to 3)."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Type the model computes in; master weights, moments and EMA are fp32 in either case."""
    betas: tuple[float, float] = (0.0, 0.999)
    """Decay of AdamW's first and second moment, each in [0, 1)."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.01
    """Decoupled weight decay."""
    clip: float = 10.0
    """Largest global gradient norm; 0 does not clip."""
    accumulation: int = 1
    """Micro-batches (backward calls) per optimizer step; their mean is taken."""
    ema_decay: float | None = None
    """Decay per optimizer step of the averaged weights, in [0, 1); none keeps no average."""
    ema_start: int = 0
    """Optimizer steps before averaging starts; until then the average is a copy of the weights."""

    def __post_init__(self) -> None:
        if self.zero_stage not in (0, 1, 2, 3):
            raise Invalid("zero_stage", f"is {self.zero_stage}: use 0, 1, 2 or 3")
        if self.offload and self.zero_stage == 0:
            raise Invalid(
                "offload", "needs a sharded optimizer: set zero_stage to 1, 2 or 3, or offload to false"
            )
        if self.dtype not in ("fp32", "bf16"):
            raise Invalid("dtype", f"is {self.dtype!r}: use fp32 or bf16")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise Invalid("betas", f"is {self.betas}: use two numbers of at least 0 and below 1")
        at_least(self, 0, "learning_rate", "weight_decay", "clip", "ema_start")
        at_least(self, 1, "accumulation")
        positive(self, "eps")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise Invalid("ema_decay", f"is {self.ema_decay}: use at least 0 and below 1, or leave it out")
