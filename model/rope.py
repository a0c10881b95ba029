"""Rotary positions over (frame, row, column), as in Wan 2.1 (Su et al. 2021 in three axes).

A head of size d turns `d − 4⌊d/6⌋` channels by frame, `2⌊d/6⌋` by row and `2⌊d/6⌋` by column. Angles are computed, not read from a
table, so positions have no upper end; whether a model is any good beyond the positions it was trained on is another matter, which
is why the rollout can also number frames relative to its window.
"""

from functools import lru_cache

import torch
from torch import Tensor

THETA = 10000.0


def _frequencies(channels: int) -> Tensor:
    return THETA ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)


@lru_cache(maxsize=256)
def _phases(frames: tuple[tuple[int, ...], ...], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
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
    return torch.polar(torch.ones_like(angle), angle).to(device, torch.complex64).reshape(rows, -1, 1, head_dim // 2)


def phases(frames: list[list[int]] | list[int], height: int, width: int, head_dim: int, device: torch.device) -> Tensor:
    """Unit complex numbers [1 or B, len(frames)·height·width, 1, head_dim/2] for frame positions, per sample if nested.

    `height` and `width` count patches, not latents.
    """
    nested = frames if frames and isinstance(frames[0], list) else [frames]
    return _phases(tuple(tuple(row) for row in nested), height, width, head_dim, torch.device(device))  # type: ignore[arg-type]


def rotate(x: Tensor, phase: Tensor) -> Tensor:
    """Turn pairs of channels of `x` [B, L, heads, head_dim] by `phase` [1 or B, L, 1, head_dim/2], in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * phase).flatten(-2).to(x.dtype)
