"""Latents ⇄ frames. The embedded default rearranges pixels; a VAE implements the same interface.

Frames are [B, T, channels, height, width] in [−1, 1]; latents are [B, F, C, H, W].
"""

from typing import Protocol

import numpy as np
from einops import rearrange
from torch import Tensor

SHORT_SIDE = 256
"""Smallest height of frames that a person looks at; smaller ones are enlarged by whole pixels."""


class Codec(Protocol):
    """What pipelines need of a video codec."""

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of latents, clamped to [−1, 1]."""

    def unclamped(self, latents: Tensor) -> Tensor:
        """Frames of latents as they are, beyond [−1, 1] too."""


class SpaceToDepth:
    """Each block of `factor` × `factor` pixels becomes channels; nothing is lost and nothing is learned.

    Pixels are normalised by `mean` and `std`, as a VAE's latents are: a noise level means the same for all.
    """

    def __init__(self, factor: int = 2, mean: float = 0.0, std: float = 1.0):
        self.factor = factor
        self.mean = mean
        self.std = std

    def encode(self, frames: Tensor) -> Tensor:
        latents = rearrange(frames, "b t c (h p) (w q) -> b t (c p q) h w", p=self.factor, q=self.factor)
        return (latents - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return self.unclamped(latents).clamp(-1, 1)

    def unclamped(self, latents: Tensor) -> Tensor:
        frames = rearrange(latents, "b t (c p q) h w -> b t c (h p) (w q)", p=self.factor, q=self.factor)
        return frames * self.std + self.mean


def to_bytes(frames: Tensor) -> Tensor:
    """Frames of any shape in [−1, 1] → uint8."""
    return ((frames.clamp(-1, 1) + 1) * 127.5).round().byte()


def to_uint8(frames: Tensor) -> np.ndarray:
    """Frames [T, channels, height, width] in [−1, 1], 1 or 3 channels → uint8 [T, height, width, 3]."""
    pixels = rearrange(to_bytes(frames.float()).cpu().numpy(), "t c h w -> t h w c")
    return np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels


def enlarge(frames: np.ndarray, short_side: int = SHORT_SIDE) -> np.ndarray:
    """Whole-pixel enlargement of [T, height, width, 3] to at least `short_side`."""
    factor = -(-short_side // min(frames.shape[1:3]))
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
