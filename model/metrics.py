"""What evaluation measures on generated videos, frame index by frame index, and how sure it is.

Pure functions of tensors. Videos are `[N, F, C, H, W]` in [-1, 1] on a canvas that wraps around its edges; `F` counts
frames, so that drift shows. Every result is an `Estimate` with a bootstrap interval over the N videos (Efron, 1979):
videos are independent, the frames of one are not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_RESAMPLES = 1000
_LARGEST_SHIFT = 2


@dataclass(frozen=True)
class Estimate:
    """A statistic and its 95 % interval; three tensors of one shape, `[F]` wherever the statistic is by frame."""

    value: Tensor
    low: Tensor
    high: Tensor


def correct_digits(logits: Tensor, digits: Tensor) -> Tensor:
    """1 where the reader's strongest logit `[N, F, 10]` is the video's digit `[N]`, else 0; float `[N, F]`."""
    return (logits.argmax(-1) == digits[:, None]).float()


def followed_motion(videos: Tensor, shifts: Tensor) -> Tensor:
    """1 where the content moved as asked from a frame to the next, else 0; float `[N, F − 1]`.

    `shifts` `[N, 2]` are the expected `(dy, dx)` in pixels a frame. The observed shift is the one among {−2 … 2}² with the
    largest circular cross-correlation of the two frames; a video that is a still, or blank, has none that counts unless
    no motion is asked for.
    """
    reach = range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1)
    # Zero comes first: where all correlations are equal, as between blank frames, nothing moved.
    candidates = sorted(((dy, dx) for dy in reach for dx in reach), key=lambda shift: shift != (0, 0))
    before, after = videos[:, :-1], videos[:, 1:]
    correlations = [(before.roll(shift, dims=(-2, -1)) * after).sum((-3, -2, -1)) for shift in candidates]
    observed = torch.tensor(candidates)[torch.stack(correlations).argmax(0)]
    return (observed == shifts[:, None]).all(-1).float()


def mean_over_videos(values: Tensor, *, seed: int) -> Estimate:
    """The mean of per-video `values` `[N, …]`, such as those of `correct_digits`, over the videos."""
    flat = values.flatten(1).double()
    return _bootstrap(
        lambda weights: ((weights @ flat) / weights.sum(1, keepdim=True)).unflatten(1, values.shape[1:]),
        videos=(len(values),),
        seed=seed,
    )


def diversity_ratio(
    videos: Tensor, prompts: Tensor, *, real_videos: Tensor, real_prompts: Tensor, seed: int
) -> Estimate:
    """How much samples of one prompt differ, as a share of how much real videos of one prompt do; `[F]`.

    1 is as varied as the real videos, 0 a single video for each prompt. Both sets have their prompts `[N]` as integers
    and should have them in equal shares. The distance between two frames is their root mean square difference at the
    alignment where it is smallest, so a video that merely starts elsewhere adds nothing.
    """
    distances, same = _aligned_distances(videos, prompts)
    real_distances, real_same = _aligned_distances(real_videos, real_prompts)
    return _bootstrap(
        lambda weights, real_weights: (
            _pair_mean(distances, weights, same) / _pair_mean(real_distances, real_weights, real_same)
        ),
        videos=(len(videos), len(real_videos)),
        seed=seed,
    )


def kernel_distance(features: Tensor, real_features: Tensor, *, seed: int) -> Estimate:
    """Unbiased squared maximum mean discrepancy to real frames of the same index; `[F]`, 0 for equal distributions.

    `features` `[N, F, D]` and `real_features` `[M, F, D]` are a reader's; the kernel is `(x·y / D + 1)³` (Bińkowski et
    al., Demystifying MMD GANs, 2018). Being unbiased it compares fairly between numbers of videos, and may come out
    slightly negative.
    """
    generated, real = features.double().transpose(0, 1), real_features.double().transpose(0, 1)
    within, within_real, across = _kernel(generated, generated), _kernel(real, real), _kernel(generated, real)
    return _bootstrap(
        lambda weights, real_weights: (
            _pair_mean(within, weights)
            + _pair_mean(within_real, real_weights)
            - 2 * torch.einsum("rn,fnm,rm->rf", _shares(weights), across, _shares(real_weights))
        ),
        videos=(len(features), len(real_features)),
        seed=seed,
    )


def _kernel(first: Tensor, second: Tensor) -> Tensor:
    return (first @ second.transpose(1, 2) / first.shape[-1] + 1) ** 3


def _shares(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True)


def _aligned_distances(videos: Tensor, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """Distances `[F, N, N]` between frames at their best alignment, and `[N, N]`: which pairs share a prompt.

    Only the pairs that share a prompt are filled in. `|x − shift(y)|² = |x|² + |y|² − 2 corr(x, y)(shift)`, and the Fourier
    transform gives the correlation at every shift at once.
    """
    videos = videos.double().transpose(0, 1)
    distances = videos.new_zeros(*videos.shape[:2], videos.shape[1])
    energy = videos.square().sum((-3, -2, -1))
    spectra = torch.fft.rfft2(videos)
    for prompt in prompts.unique():
        members = (prompts == prompt).nonzero().squeeze(1)
        spectrum = spectra[:, members]
        cross = torch.einsum("fnchw,fmchw->fnmhw", spectrum, spectrum.conj())
        overlap = torch.fft.irfft2(cross, s=videos.shape[-2:]).amax((-2, -1))
        squares = energy[:, members, None] + energy[:, None, members] - 2 * overlap
        distances[:, members[:, None], members] = (squares.clamp(min=0) / videos[0, 0].numel()).sqrt()
    return distances, prompts[:, None] == prompts


def _pair_mean(values: Tensor, weights: Tensor, allowed: Tensor | None = None) -> Tensor:
    """The mean of `values` `[F, N, N]` over pairs of two different videos, for every weighting `[R, N]`; `[R, F]`.

    A video that a resample drew twice is never paired with its own copy: that pair would be a zero that no two real
    videos show, and would pull every resample down.
    """
    pairs = torch.ones_like(values[0]) if allowed is None else allowed.to(values.dtype)
    pairs = pairs - torch.diag(pairs.diagonal())
    total = torch.einsum("rn,nm,rm->r", weights, pairs, weights)
    return torch.einsum("rn,fnm,rm->rf", weights, values * pairs, weights) / total[:, None]


def _bootstrap(statistic: Callable[..., Tensor], *, videos: tuple[int, ...], seed: int) -> Estimate:
    """`statistic` of all videos, with the 2.5 and 97.5 % quantiles of it over resamples drawn with replacement.

    `statistic` takes, for each set of videos, how often each video counts (`[R, N]`), and gives `[R, …]`. A percentile interval
    can miss a value at its own edge; the value is always inside the one returned.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randint(count, (_RESAMPLES, count), generator=generator) for count in videos]
    counts = [
        torch.zeros(indices.shape, dtype=torch.double).scatter_add_(1, indices, torch.ones_like(indices).double())
        for indices in drawn
    ]
    value = statistic(*(torch.ones(1, count, dtype=torch.double) for count in videos))[0]
    low, high = torch.quantile(statistic(*counts), torch.tensor([0.025, 0.975], dtype=torch.double), dim=0)
    return Estimate(value=value.float(), low=torch.minimum(low, value).float(), high=torch.maximum(high, value).float())
