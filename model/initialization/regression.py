"""Regression on ODE pairs, for the initial student (CausVid, section 4.2; Self Forcing, appendix A)."""

import torch
from torch import Tensor

from model.schedule import per_frame


def regression_terms(x0: Tensor, target: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares of `x0 − target` over the noisy frames (`timestep ≠ 0`), and how many values that sums.

    Videos are [B, F, C, H, W], `timestep` is [B, F]. The loss is the ratio of the two, each first added up
    over all ranks and micro-batches: a mean of means would weigh frames unequally.
    """
    noisy = per_frame(timestep != 0, x0)
    return ((x0 - target).square() * noisy).sum(), noisy.expand_as(x0).sum()


def trajectory_inputs(trajectory: Tensor, steps: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The noisy video and its timesteps [B, F].

    `trajectory` is [B, S, F, C, H, W], noisiest first, `steps` [S] its timesteps, `index` [B, F] into both.
    """
    gather = index[:, None, :, None, None, None].expand(-1, 1, -1, *trajectory.shape[3:])
    return torch.gather(trajectory, 1, gather)[:, 0], steps[index]
