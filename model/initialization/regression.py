"""Regression on ODE pairs, for the initial student (CausVid, section 4.2; Self Forcing, appendix A)."""

import torch
from torch import Tensor

from model.forcing import Module, forced, per_chunk
from model.initialization.method import Method, Setup, Share
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


def regression_loss(module: Module, setup: Setup, share: Share) -> Tensor:
    """The student's x0 at a step drawn chunk by chunk against the end of the trajectory."""
    assert share.trajectory is not None
    trajectory, schedule, rollout = share.trajectory, setup.schedule, setup.rollout
    # A causal teacher's student has a clean past; another meets it where the past is drawn at timestep 0.
    last = [0.0] if share.clean is None else []
    steps = torch.tensor([*schedule.few_steps(rollout.every_step), *last], device=setup.device)

    def index(*, whole: bool = False) -> Tensor:
        keys = share.keys("index", whole=whole)
        return per_chunk(len(steps), rollout, trajectory.shape[2], keys).to(setup.device)

    noisy, timestep = trajectory_inputs(trajectory, steps, index())
    velocity = forced(module, rollout, noisy, timestep, share.context, share.clean)
    total, _ = regression_terms(schedule.x0(velocity, noisy, timestep), trajectory[:, -1], timestep)
    # Noisy values of the whole batch, which every rank can count: so means of means are the pooled mean. A
    # share without a noisy frame adds nothing to it, and a batch without one has nothing to learn from.
    noisy_frames = (steps[index(whole=True)] != 0).sum()
    values = trajectory[0, 0, 0].numel() * noisy_frames.clamp(min=1)
    return total / values * (share.batch / len(share.samples))


METHODS = {
    "ode": Method(regression_loss, data="pairs", teacher="bidirectional"),
    "causal_ode": Method(regression_loss, data="pairs", teacher="causal"),
}
