"""The flow-matching schedule: a straight path from clean video to noise, warped towards the noisy end.

`x_t = (1 − sigma) x0 + sigma noise`; the network predicts `velocity = noise − x0`. Timesteps run from 0
(clean) to 1000 (noise). Source: Lipman et al. 2022 (flow matching); the timestep shift is that of Esser et
al. 2024, section 5.3.2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

TIMESTEPS = 1000


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor | float) -> Tensor:
    """`x_t` on the straight path: `(1 − sigma) x0 + sigma noise`."""
    return (1 - sigma) * x0 + sigma * noise


def clean(x_t: Tensor, velocity: Tensor, sigma: Tensor | float) -> Tensor:
    """The clean video that a predicted velocity implies: `x0 = x_t − sigma · velocity`."""
    return x_t - sigma * velocity


def per_frame(value: Tensor, like: Tensor) -> Tensor:
    """Broadcast `value` of shape [B] or [B, F] over a video `like` of shape [B, F, C, H, W]."""
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


class FlowSchedule:
    """The table `sigma_i = shift s_i / (1 + (shift − 1) s_i)` with `s = linspace(1, 0, 1001)[:-1]`.

    Its timesteps are `1000 sigma_i`. A timestep's sigma is that of the nearest entry, so timestep 0 has the
    smallest sigma of the table, not zero.
    """

    def __init__(self, shift: float = 5.0):
        if shift <= 0:
            raise ValueError(f"shift must be positive, not {shift}; Wan uses 5, no warp is 1.")
        self.shift = shift
        s = torch.linspace(1, 0, TIMESTEPS + 1)[:-1]
        self.sigmas = shift * s / (1 + (shift - 1) * s)
        self.timesteps = self.sigmas * TIMESTEPS

    def warp(self, timestep: Tensor) -> Tensor:
        """An unwarped timestep 0..1000 to its warped value, elementwise."""
        s = timestep / TIMESTEPS
        return TIMESTEPS * self.shift * s / (1 + (self.shift - 1) * s)

    def few_steps(self, steps: Sequence[float]) -> list[float]:
        """The warped few-step list, e.g. [1000, 750, 500, 250] → [1000, 937.5, 833.3, 625] at shift 5."""
        return self.warp(torch.tensor(steps, dtype=torch.float32)).tolist()

    def nearest(self, table: Tensor, timestep: Tensor) -> Tensor:
        """The values of `table` [1000] whose timesteps are nearest to `timestep`; of its shape and device."""
        flat = timestep.detach().float().reshape(-1, 1).cpu()
        index = (self.timesteps - flat).abs().argmin(dim=1)
        return table[index].reshape(timestep.shape).to(timestep.device)

    def sigma(self, timestep: Tensor) -> Tensor:
        """The sigma of the table entry nearest to each timestep, in float32; any shape, on its device."""
        return self.nearest(self.sigmas, timestep)

    def score_timestep(self, uniform: Tensor, low: float, high: float) -> Tensor:
        """Timesteps for teacher and critic: uniform integers 0..999 warped, then clamped to [low, high]."""
        return self.warp(uniform.float()).clamp(low, high)

    def add_noise(self, x0: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
        """`x_t` for videos [B, F, C, H, W] and timesteps [B] or [B, F]."""
        return interpolate(x0, noise, per_frame(self.sigma(timestep), x0))

    def x0(self, velocity: Tensor, x_t: Tensor, timestep: Tensor) -> Tensor:
        """`x0` for videos [B, F, C, H, W] and timesteps [B] or [B, F], in float32."""
        return clean(x_t.float(), velocity.float(), per_frame(self.sigma(timestep), x_t))
