"""Consistency distillation of a causal teacher (Song et al., arXiv 2303.01469), without stored trajectories."""

import torch
from torch import Tensor

from model.schedule import per_frame


def consistency_target(x0: Tensor, followed: Tensor, following: Tensor) -> Tensor:
    """What the student should say one step earlier: its own x0 at `followed`, or that video itself where it is clean (`following` 0)."""
    return torch.where(per_frame(following == 0, followed), followed, x0).detach()
