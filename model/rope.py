"""Rotary positions over (frame, row, column), as in Wan 2.1 (Su et al. 2021 in three axes).

A head of size d turns `d − 4⌊d/6⌋` channels by frame, `2⌊d/6⌋` by row and `2⌊d/6⌋` by column. Angles are
computed, not read from a table, so positions have no upper end; whether a model is any good beyond the
positions it was trained on is another matter, so the rollout can also number frames relative to its window.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def _frequencies(channels: int) -> Tensor:
    return THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


# Enough for the chunks of one training rollout; a stream at absolute positions never asks twice.
@lru_cache(maxsize=32)
# A tensor made in inference mode could not be saved for a later backward pass.
@torch.inference_mode(False)
def _phases(
    frames: tuple[tuple[int, ...], ...], height: int, width: int, head_dim: int, device: torch.device
) -> Tensor:
    spatial = 2 * (head_dim // 6)
    position = torch.tensor(frames, dtype=torch.float64)
    by_frame = position[..., None] * _frequencies(head_dim - 2 * spatial)
    by_row = torch.arange(height, dtype=torch.float64)[:, None] * _frequencies(spatial)
    by_column = torch.arange(width, dtype=torch.float64)[:, None] * _frequencies(spatial)
    rows, count = position.shape
    angle = torch.cat(
        [
            by_frame[:, :, None, None].expand(rows, count, height, width, -1),
            by_row[None, None, :, None].expand(rows, count, height, width, -1),
            by_column[None, None, None, :].expand(rows, count, height, width, -1),
        ],
        dim=-1,
    )
    turn = torch.stack([angle.cos(), angle.sin()], dim=-1).float().to(device)
    return turn.reshape(rows, -1, 1, head_dim // 2, 2)


def phases(
    frames: Sequence[Sequence[int]], height: int, width: int, head_dim: int, device: torch.device
) -> Tensor:
    """Cosines and sines [1 or B, f·height·width, 1, head_dim/2, 2] for f frame positions, of all samples or
    each.

    `height` and `width` count patches, not latents.
    """
    return _phases(tuple(tuple(row) for row in frames), height, width, head_dim, torch.device(device))


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turn pairs of channels of `x` [B, L, heads, head_dim] by `phase`, in float32."""
    if torch.compiler.is_compiling():  # which fuses what follows, and knows no complex numbers
        (one, two), (cosine, sine) = x.float().unflatten(-1, (-1, 2)).unbind(-1), phase.unbind(-1)
        turned = torch.stack([one * cosine - two * sine, one * sine + two * cosine], dim=-1)
        return turned.flatten(-2).to(x.dtype)
    # Pairs are complex numbers: one product, where real arithmetic would take six passes over memory.
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * torch.view_as_complex(phase)).flatten(-2).to(x.dtype)
