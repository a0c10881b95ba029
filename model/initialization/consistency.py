"""Consistency distillation of a causal teacher, no trajectories stored (Song et al., arXiv 2303.01469)."""

import torch
from torch import Tensor

from model.forcing import Module, forced, per_chunk
from model.initialization.method import Method, Setup, Share
from model.noise import SampleNoise
from model.sampler import euler_step, guided, ode_grid
from model.schedule import per_frame


def consistency_target(x0: Tensor, followed: Tensor, following: Tensor) -> Tensor:
    """What the student should say one step earlier: its own x0 at `followed`, or that video itself where it
    is clean (`following` 0)."""
    return torch.where(per_frame(following == 0, followed), followed, x0).detach()


def consistency_loss(module: Module, setup: Setup, share: Share) -> Tensor:
    """Mean square between the student's x0 at two neighbouring points of the teacher's ODE, given a clean
    past."""
    assert share.clean is not None and setup.teacher is not None
    data, context, rollout, schedule = share.clean, share.context, setup.rollout, setup.schedule
    grid = schedule.few_steps(ode_grid(rollout.every_step, setup.settings.ode_steps))
    timesteps = torch.tensor(grid, device=setup.device)
    sigmas = torch.cat([schedule.sigma(torch.tensor(grid[:-1])), torch.zeros(1)]).to(setup.device)
    keys = share.keys("consistency")
    index = per_chunk(len(grid) - 1, rollout, data.shape[1], keys).to(setup.device)
    timestep, there, following = timesteps[index], timesteps[index + 1], sigmas[index + 1]
    noise = SampleNoise(keys, setup.device).draw(data.shape, 0, 0)
    noisy = schedule.add_noise(data, noise, timestep)
    with torch.no_grad():
        velocity = guided(
            setup.teacher,
            noisy,
            timestep,
            cond=context,
            uncond=setup.negative,
            guidance=setup.settings.guidance,
            clean=data,
            chunk=rollout.chunk,
            window=rollout.context_window(),
        )
        followed = euler_step(noisy, velocity, sigmas[index], following)
        predicted = schedule.x0(forced(module, rollout, followed, there, context, data), followed, there)
    x0 = schedule.x0(forced(module, rollout, noisy, timestep, context, data), noisy, timestep)
    return (x0 - consistency_target(predicted, followed, following)).square().mean()


METHODS = {"causal_consistency": Method(consistency_loss, data="videos", teacher="causal", asks_teacher=True)}
