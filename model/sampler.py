"""Euler's method and classifier-free guidance: for teachers, ODE pairs, scores and many-step students."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from model.schedule import FlowSchedule, per_frame


def guide(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022) as published, `cond + guidance · (cond − uncond)`."""
    return cond + guidance * (cond - uncond)


def guided(
    predict: Callable[..., Tensor],
    x: Tensor,
    timestep: Tensor,
    *,
    cond: Tensor,
    uncond: Tensor,
    guidance: float,
    clean: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """The guided `predict(x, timestep, context, **options)`, in float32; both branches run as one batch.

    `x` is [B, F, C, H, W], `timestep` [B] or [B, F]; `predict` gives a velocity or an x0. `clean` is the past
    under teacher forcing, like `x`.
    """
    if clean is not None:
        options["clean"] = torch.cat([clean, clean])
    both = predict(
        torch.cat([x, x]),
        torch.cat([timestep, timestep]),
        torch.cat([cond, uncond.expand_as(cond)]),
        **options,
    ).float()
    cond_answer, uncond_answer = both.chunk(2)
    return guide(cond_answer, uncond_answer, guidance)


def euler_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, following: float | Tensor) -> Tensor:
    """`x` [B, F, C, H, W] moved from noise level `sigma` to `following`, numbers or [B, F] each."""
    change = following - sigma
    return x + (per_frame(change, x) if isinstance(change, Tensor) else change) * velocity


@torch.no_grad()
def integrate(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, *, shift: float, grid: Sequence[float]
) -> list[Tensor]:
    """Euler's method along `velocity(x, timestep)` from noise `x` [B, F, C, H, W]; the video at each timestep
    of `grid`, unwarped, which ends at 0."""
    schedule = FlowSchedule(shift)
    timesteps = schedule.few_steps(grid)
    # The end of the path is clean, while the table's smallest sigma is not zero.
    sigmas = [*schedule.sigma(torch.tensor(timesteps[:-1])).tolist(), 0.0]
    path = [x]
    for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
        at = torch.full((len(x),), timestep, device=x.device)
        x = euler_step(x, velocity(x, at), sigma, following)
        path.append(x)
    return path


def ode_grid(steps: Sequence[float], count: int) -> list[float]:
    """Unwarped timesteps of an ODE: `count` evenly spaced ones, each of a student's `steps`, then 0."""
    even = torch.linspace(1000, 0, count + 1).tolist()
    return sorted({*map(float, steps), *(round(step, 6) for step in even)}, reverse=True)
