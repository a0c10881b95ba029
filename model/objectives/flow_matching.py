"""Flow matching (Lipman et al. 2022): pretraining, the critic on the student's videos, and autoregressive
training under teacher forcing or diffusion forcing."""

import torch
from torch import Tensor

from model.schedule import TIMESTEPS, FlowSchedule


def flow_matching_loss(velocity: Tensor, noise: Tensor, x0: Tensor, weight: Tensor | None = None) -> Tensor:
    """`mean((velocity − (noise − x0))²)` over everything; with `weight` [B, F] the mean over samples and
    frames of `weight` times a frame's own mean."""
    square = (velocity - (noise - x0)).square()
    return square.mean() if weight is None else (weight * square.mean(dim=(2, 3, 4))).mean()


def timestep_weight(timestep: Tensor, schedule: FlowSchedule) -> Tensor:
    """A weight of the shape of `timestep`: a bell around timestep 500, 0 at its lowest, 1 on average.

    `1000 z / Σ z` at the nearest entry, with `z = y − min y` and `y = exp(−2 ((timestep − 500) / 1000)²)`
    over the table.
    """
    y = torch.exp(-2 * ((schedule.timesteps - TIMESTEPS / 2) / TIMESTEPS).square())
    z = y - y.min()
    return schedule.nearest(TIMESTEPS * z / z.sum(), timestep)
