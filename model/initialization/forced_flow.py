"""Autoregressive flow matching of a causal many-step model on data, under teacher or diffusion forcing."""

from functools import partial

import torch
from torch import Tensor

from model.forcing import Forcing, Module, forced, per_chunk
from model.initialization.method import Method, Setup, Share
from model.noise import SampleNoise, integer
from model.objectives.flow_matching import flow_matching_loss, timestep_weight
from model.schedule import TIMESTEPS


def forced_flow_loss(module: Module, setup: Setup, share: Share, *, forcing: Forcing) -> Tensor:
    """Flow matching with each chunk at a level of its own, and some prompts dropped for guidance."""
    assert share.clean is not None
    data, schedule, dropout = share.clean, setup.schedule, setup.settings.dropout
    drop = [integer(1000, *key) < 1000 * dropout for key in share.keys("drop")]
    dropped = torch.tensor(drop, device=setup.device)[:, None, None]
    context = torch.where(dropped, setup.negative, share.context)
    keys = share.keys(forcing)
    uniform = per_chunk(TIMESTEPS, setup.rollout, data.shape[1], keys).to(setup.device)
    timestep = schedule.warp(uniform.float())
    noise = SampleNoise(keys, setup.device).draw(data.shape, 0, 0)
    noisy = schedule.add_noise(data, noise, timestep)
    clean = data if forcing == "teacher_forcing" else None
    velocity = forced(module, setup.rollout, noisy, timestep, context, clean)
    return flow_matching_loss(velocity.float(), noise, data, timestep_weight(timestep, schedule))


METHODS = {
    "teacher_forcing": Method(
        partial(forced_flow_loss, forcing="teacher_forcing"), data="videos", many_step=True
    ),
    "diffusion_forcing": Method(
        partial(forced_flow_loss, forcing="diffusion_forcing"), data="videos", many_step=True
    ),
}
