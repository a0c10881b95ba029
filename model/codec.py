"""Latents ⇄ frames. The embedded default rearranges pixels; a VAE implements the same interface.

Frames are [B, T, channels, height, width] in [−1, 1]; latents are [B, F, C, H, W].
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

SHORT_SIDE = 256
"""Smallest height of frames that a person looks at; smaller ones are enlarged by whole pixels."""


class StreamDecoder(Protocol):
    """Decodes one video chunk by chunk. What it remembers of the chunks before is a part of the stream: it
    can be pickled and moved to another device, and is that of nobody else."""

    def decode(self, latents: Tensor) -> Tensor:
        """Frames [T, channels, height, width] of the next latents [F, C, H, W], clamped to [−1, 1]."""

    def to(self, device: torch.device | str) -> None:
        """Move what is remembered."""


class Codec(Protocol):
    """What pipelines need of a video codec."""

    def encode(self, frames: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of latents, clamped to [−1, 1]."""

    def unclamped(self, latents: Tensor) -> Tensor:
        """Frames of latents as they are, beyond [−1, 1] too."""

    def frames(self, latents: int) -> int:
        """Frames of pixels that the first `latents` frames of a latent video become."""

    def latents(self, frames: int) -> int:
        """Frames of latents that a video of at least `frames` frames of pixels needs."""

    def shape(self, latents: Sequence[int]) -> tuple[int, int, int, int]:
        """(T, channels, height, width) of the frames of latents (F, C, H, W)."""

    def stream(self) -> StreamDecoder:
        """A decoder of a new video."""


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

    def frames(self, latents: int) -> int:
        return latents

    def latents(self, frames: int) -> int:
        return frames

    def shape(self, latents: Sequence[int]) -> tuple[int, int, int, int]:
        frames, channels, height, width = latents
        return frames, channels // self.factor**2, height * self.factor, width * self.factor

    def stream(self) -> StreamDecoder:
        return _Frames(self)


class _Frames:
    """Frames that depend on no others: nothing is remembered."""

    def __init__(self, codec: SpaceToDepth):
        self.codec = codec

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents[None])[0]

    def to(self, device: torch.device | str) -> None:
        pass


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
