"""Settings of `TrainEngine`; light, so that a configuration is checked without importing torch."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EngineConfig:
    """How one model is trained: ZeRO, precision, AdamW (Loshchilov and Hutter 2019), accumulation, EMA."""

    learning_rate: float
    """AdamW step size, constant."""
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
            raise ValueError(f"zero_stage is {self.zero_stage}: use 0, 1, 2 or 3")
        if self.offload and self.zero_stage == 0:
            raise ValueError(
                "offload needs a sharded optimizer: set zero_stage to 1, 2 or 3, or offload to false"
            )
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype is {self.dtype!r}: use fp32 or bf16")
        if not 0 <= self.learning_rate < math.inf:
            raise ValueError(f"learning_rate is {self.learning_rate}: use a number of at least 0")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas is {self.betas}: use two numbers of at least 0 and below 1")
        if not self.eps > 0:
            raise ValueError(f"eps is {self.eps}: use a number above 0")
        if not self.weight_decay >= 0:
            raise ValueError(f"weight_decay is {self.weight_decay}: use a number of at least 0")
        if not self.clip >= 0:
            raise ValueError(f"clip is {self.clip}: use a norm above 0, or 0 to clip nothing")
        if self.accumulation < 1:
            raise ValueError(f"accumulation is {self.accumulation}: use a whole number of at least 1")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay is {self.ema_decay}: use at least 0 and below 1, or leave it out")
        if self.ema_start < 0:
            raise ValueError(f"ema_start is {self.ema_start}: use a whole number of at least 0")
