"""Statistics of generated videos, frame index by frame index, and how sure they are.

Pure functions of tensors; `F` counts frames, so that drift shows. Every result is an `Estimate` with a
bootstrap interval over the N videos (Efron, 1979): videos are independent, the frames of one are not.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A statistic and its 95 % interval; three tensors of one shape, `[F]` if it is by frame."""

    value: Tensor
    low: Tensor
    high: Tensor

    def at(self, part: Any) -> "Estimate":
        """Those frames, chunks or spans of it that indexing by `part` gives."""
        return Estimate(*(each[part] for each in self))

    @staticmethod
    def undefined(*shape: int) -> "Estimate":
        return Estimate(*[torch.full(shape, torch.nan)] * 3)


def mean_over_videos(values: Tensor, *, seed: int) -> Estimate:
    """The mean of per-video `values` `[N, …]`, over the videos."""
    flat = values.flatten(1).to("cpu", torch.double)
    return _bootstrap(
        lambda weights: ((weights @ flat) / weights.sum(1, keepdim=True)).unflatten(1, values.shape[1:]),
        seed,
        len(values),
    )


def difference_of_means(values: Tensor, real_values: Tensor, *, seed: int) -> Estimate:
    """The mean of `values` `[N, …]` minus that of `real_values` `[M, …]`, both over videos."""
    flat, real = (each.flatten(1).to("cpu", torch.double) for each in (values, real_values))

    def difference(weights: Tensor, real_weights: Tensor) -> Tensor:
        return (_shares(weights) @ flat - _shares(real_weights) @ real).unflatten(1, values.shape[1:])

    return _bootstrap(difference, seed, len(values), len(real_values))


def diversity_ratio(
    features: Tensor,
    prompts: Tensor,
    correct: Tensor,
    *,
    real_features: Tensor,
    real_prompts: Tensor,
    seed: int,
) -> Estimate:
    """How much samples of one prompt differ, as a share of how much real videos of one prompt do; `[F]`.

    1 is as varied as the real videos, 0 a single video for each prompt. `features` `[N, F, D]` and
    `real_features` `[M, F, D]` are a reader's, and should say what is shown and not where; both sets have
    their prompts as integers (`[N]`, `[M]`), which should occur in equal shares. Two frames are as far apart
    as their features scaled to unit length: pixel distances, aligned or not, call noise diverse and blur
    uniform, as real videos showed that were spoiled on purpose.

    Only frames that `correct` `[N, F]` calls right are compared, since one wrong content among equal ones
    would pass for variety; a frame index with no two right ones of a prompt has no diversity: NaN.
    """
    for name, numbers in (("generated", prompts), ("real", real_prompts)):
        if len(numbers) == len(numbers.unique()):
            raise ValueError(f"no two {name} videos share a prompt; diversity needs at least two of one")
    distances, real_distances = _feature_distances(features), _feature_distances(real_features)
    shown = correct.to("cpu", torch.double).T
    comparable = _same(prompts) * shown[:, :, None] * shown[:, None, :]
    real_comparable = _same(real_prompts).expand_as(real_distances)

    def ratio(weights: Tensor, real_weights: Tensor) -> Tensor:
        real = _pair_mean(real_distances, real_weights, real_comparable)
        return _pair_mean(distances, weights, comparable) / real

    return _bootstrap(ratio, seed, len(features), len(real_features))


def kernel_distance(features: Tensor, real_features: Tensor, *, seed: int) -> Estimate:
    """Unbiased squared maximum mean discrepancy to real frames of an index; `[F]`, 0 for equal distributions.

    `features` `[N, F, D]` and `real_features` `[M, F, D]` are a reader's; the kernel is `(x·y / D + 1)³`
    (Bińkowski et al., Demystifying MMD GANs, 2018). Being unbiased it compares fairly between numbers of
    videos, and may come out slightly negative.
    """
    generated, real = (x.to("cpu", torch.double).transpose(0, 1) for x in (features, real_features))
    within, within_real, across = (
        (first @ second.transpose(1, 2) / first.shape[-1] + 1) ** 3
        for first, second in ((generated, generated), (real, real), (generated, real))
    )

    def discrepancy(weights: Tensor, real_weights: Tensor) -> Tensor:
        return (
            _pair_mean(within, weights, torch.ones_like(within))
            + _pair_mean(within_real, real_weights, torch.ones_like(within_real))
            - 2 * torch.einsum("rn,fnm,rm->rf", _shares(weights), across, _shares(real_weights))
        )

    return _bootstrap(discrepancy, seed, len(features), len(real_features))


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)


def _feature_distances(features: Tensor) -> Tensor:
    """Distances `[F, N, N]` between the unit-length features of every two videos at each frame index."""
    units = F.normalize(features.to("cpu", torch.double), dim=-1).transpose(0, 1)
    return (2 - 2 * units @ units.transpose(1, 2)).clamp(min=0).sqrt()


def _same(prompts: Tensor) -> Tensor:
    return (prompts[:, None] == prompts).to("cpu", torch.double)


def _pair_mean(values: Tensor, weights: Tensor, allowed: Tensor) -> Tensor:
    """The mean of `values` `[F, N, N]` over the `allowed` pairs, by weighting `[R, N]` and frame; `[R, F]`.

    A video that a resample drew twice is never paired with its own copy: that pair would be a zero that no
    two real videos show, and would pull every resample down.
    """
    pairs = allowed * (1 - torch.eye(allowed.shape[-1], dtype=allowed.dtype))
    total, number = (
        torch.einsum("rn,fnm,rm->rf", weights, each, weights) for each in (values * pairs, pairs)
    )
    return total / number


def _bootstrap(statistic: Callable[..., Tensor], seed: int, *videos: int) -> Estimate:
    """`statistic` of all videos, with its 2.5 and 97.5 % quantiles over resamples drawn with replacement.

    `statistic` takes, for each set of videos, how often each video counts (`[R, N]`), and gives `[R, …]`.
    Resamples for which it is undefined (no pair left) are passed over. A percentile interval can miss a value
    at its own edge; the value is always inside the one returned.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(count, (_RESAMPLES, count), generator=generator) for count in videos]
    counts = [
        torch.zeros(each.shape, dtype=torch.double).scatter_add_(1, each, torch.ones_like(each).double())
        for each in drawn
    ]
    value = statistic(*(torch.ones(1, count, dtype=torch.double) for count in videos))[0]
    low, high = torch.nanquantile(statistic(*counts), torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    return Estimate(value.float(), torch.minimum(low, value).float(), torch.maximum(high, value).float())
