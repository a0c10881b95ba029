"""Numbers that tell early that training goes wrong: pure functions of a student's videos and their scores.

What is averaged over the samples of a noise band travels as a sum and a count, for a micro-batch of one rank
may have none in a band; `pooled` makes the means once all are added up.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

BANDS = {"low": (0.0, 333.0), "middle": (333.0, 667.0), "high": (667.0, 1001.0)}
"""Noise bands, as timesteps from (included) and to."""
_AT, _COUNT = "@", "count"


@dataclass(frozen=True)
class Reference:
    """What latents of good videos are like."""

    source: str
    """Which they are, for a person to read."""
    std: float
    energy: float  # mean square
    low: float  # least and largest value,
    high: float  # widened by a tenth of their distance

    @classmethod
    def of(cls, latents: Tensor, source: str) -> "Reference":
        """Of latents of any shape."""
        latents = latents.float()
        low, high = latents.min().item(), latents.max().item()
        spare = 0.1 * (high - low)
        energy = latents.square().mean().item()
        return cls(source, latents.std(correction=0).item(), energy, low - spare, high + spare)


def of_latents(video: Tensor, reference: Reference | None) -> dict[str, float]:
    """Mean and energy (mean square) of latents [B, F, C, H, W], whose means over micro-batches are the whole
    batch's, and the share of values outside the reference's range, where there is one."""
    video = video.detach().float()
    found = {"latent_mean": video.mean().item(), "latent_energy": video.square().mean().item()}
    if reference is not None:
        outside = (video < reference.low) | (video > reference.high)
        found["latent_outside"] = outside.float().mean().item()
    return found


def by_band(timestep: Tensor, **values: Tensor) -> dict[str, float]:
    """Values [B] of samples at timesteps [B], summed within each noise band, and how many those are."""
    found = {}
    for band, (low, high) in BANDS.items():
        chosen = (timestep >= low) & (timestep < high)
        found[f"{_COUNT}{_AT}{band}"] = float(chosen.sum())
        for name, each in values.items():
            # Not a product with the mask: what is not finite in another band stays there.
            found[f"{name}{_AT}{band}"] = each[chosen].double().sum().item()
    return found


def pooled(means: Mapping[str, float]) -> dict[str, float]:
    """The same numbers, those of a band (`ROLE/NAME@BAND`) divided by its samples and named `ROLE/NAME_BAND`;
    and the standard deviation of the student's latents.

    A band without samples is left out. Sums and counts may have been averaged over ranks and micro-batches.
    """
    found = {}
    if "student/latent_energy" in means:
        variance = means["student/latent_energy"] - means["student/latent_mean"] ** 2
        found["student/latent_std"] = 0.0 if variance < 0 else math.sqrt(variance)
    for name, value in means.items():
        before, at, band = name.rpartition(_AT)
        if not at:
            found[name] = value
            continue
        role, _, short = before.rpartition("/")
        count = means[f"{role}/{_COUNT}{_AT}{band}"]
        if short != _COUNT and count:
            found[f"{role}/{short}_{band}"] = value / count
    return found


def for_a_band(name: str) -> bool:
    """Whether a number is one of `by_band`, which means nothing before it is pooled."""
    return _AT in name


def flow_loss(prediction: Tensor, video: Tensor, sigma: Tensor) -> Tensor:
    """The flow matching loss [B] of predictions of x0 [B, F, C, H, W] on `video` at noise levels [B].

    With `x_t = (1 − σ) x0 + σ noise` a prediction `x̂0` is a velocity `(x_t − x̂0) / σ`, whose error is
    `(x0 − x̂0) / σ`; where there is no noise it counts as that of σ = 10⁻⁴.
    """
    error = (prediction.detach().float() - video.detach().float()).square().mean(dim=(1, 2, 3, 4))
    return error / sigma.float().to(error.device).clamp(min=1e-4).square()


def score_gap(real: Tensor, fake: Tensor) -> Tensor:
    """`mean|fake − real|` [B] of predictions [B, F, C, H, W]."""
    return (fake - real).detach().float().abs().mean(dim=(1, 2, 3, 4))


def cosine(dot: float, norm: float, other: float) -> float:
    """Of two vectors with these inner product and squared norms; 0 where one is zero."""
    product = (norm * other) ** 0.5
    return dot / product if product else 0.0


def clamped_share(frames: Tensor) -> Tensor:
    """The share of pixels of frames [B, T, channels, H, W] that lie more than one of 255 steps outside
    [−1, 1], [B, T]."""
    return ((frames.abs() - 1) > 2 / 255).float().mean(dim=(2, 3, 4))
