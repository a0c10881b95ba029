"""What any video can be measured by, frame by frame: appearance, change over time, range of latents.

Pure functions. Videos are `[N, F, channels, H, W]` in [−1, 1], of 1 or 3 channels; every result is `[N, F]`,
in units of brightness, where black is 0 and white is 1, and NaN where a frame lacks neighbours.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LUMA = (0.2126, 0.7152, 0.0722)
"""Weights of red, green and blue (ITU-R BT.709)."""


def luma(frames: Tensor) -> Tensor:
    """Brightness of each pixel, `[N, F, H, W]` in [0, 1]."""
    weights = torch.tensor(_LUMA if frames.shape[2] == 3 else (1.0,), dtype=frames.dtype)
    return torch.einsum("nfchw,c->nfhw", (frames + 1) / 2, weights)


def brightness(frames: Tensor) -> Tensor:
    """Mean luma."""
    return luma(frames).mean((-2, -1))


def contrast(frames: Tensor) -> Tensor:
    """Standard deviation of luma over a frame's pixels."""
    return luma(frames).std((-2, -1), correction=0)


def saturation(frames: Tensor) -> Tensor:
    """Mean distance between a pixel's strongest and weakest colour; NaN where there is no colour."""
    if frames.shape[2] == 1:
        return torch.full(frames.shape[:2], math.nan)
    return ((frames.amax(2) - frames.amin(2)) / 2).mean((-2, -1))


def sharpness(frames: Tensor) -> Tensor:
    """Standard deviation of the Laplacian of luma (Pech-Pacheco et al., 2000), inside a frame."""
    kernel = torch.tensor([[0.0, 1.0, 0.0], [1.0, -4.0, 1.0], [0.0, 1.0, 0.0]])
    grey = luma(frames)
    if min(grey.shape[-2:]) < 3:
        return torch.full(frames.shape[:2], math.nan)
    edges = F.conv2d(grey.flatten(0, 1)[:, None], kernel[None, None])
    return edges.std((1, 2, 3), correction=0).unflatten(0, frames.shape[:2])


def flicker(frames: Tensor) -> Tensor:
    """Energy of high temporal frequency: mean square of luma under the filter (−1, 2, −1) / 4 over time.

    The filter passes what alternates from frame to frame whole and stops what stands still or changes evenly.
    NaN for the first and the last frame.
    """
    grey = luma(frames)
    edge = torch.full((len(frames), 1), math.nan)
    if frames.shape[1] < 3:
        return edge.expand(-1, frames.shape[1]).clone()
    passed = (2 * grey[:, 1:-1] - grey[:, :-2] - grey[:, 2:]) / 4
    return torch.cat([edge, passed.square().mean((-2, -1)), edge], dim=1)


def motion(frames: Tensor) -> Tensor:
    """Mean absolute change of luma from the frame before; NaN for the first."""
    grey = luma(frames)
    edge = torch.full((len(frames), 1), math.nan)
    return torch.cat([edge, grey.diff(dim=1).abs().mean((-2, -1))], dim=1)


def drift(values: Tensor, chunk: int) -> Tensor:
    """How far each video's values `[N, F]` are from their own mean over the first `chunk` frames."""
    return (values - values[:, :chunk].nanmean(1, keepdim=True)).abs()


def share_outside(latents: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """The share of latents `[N, F, C, H, W]` outside [`low`, `high`], each `[C]`."""
    low, high = (bound[:, None, None] for bound in (low, high))
    return ((latents < low) | (latents > high)).float().mean((2, 3, 4))
