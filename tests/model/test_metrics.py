"""Metrics on videos whose answer is known: real digits, and real digits spoiled in one known way."""

import itertools

import numpy as np
import pytest
import torch

from model.metrics import (
    Estimate,
    diversity_ratio,
    kernel_distance,
    mean_over_videos,
)
from pipelines.digits.metrics import correct_digits, followed_motion
from pipelines.digits.moving_digits import DIRECTIONS, expected_shift, render, sample_videos


def real_videos(count: int, seed: int, frames: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Videos `[N, F, 1, 16, 16]`, prompt numbers `[N]` and expected shifts `[N, 2]`."""
    pixels, digits, directions = zip(
        *sample_videos(videos=count, frames=frames, seed=seed, split="train"), strict=True
    )
    turns = [DIRECTIONS.index(direction) for block in directions for direction in block]
    shifts = torch.tensor([expected_shift(DIRECTIONS[turn]) for turn in turns])
    prompts = torch.from_numpy(np.concatenate(digits)) * 4 + torch.tensor(turns)
    return torch.from_numpy(np.concatenate(pixels)).float() / 127.5 - 1, prompts, shifts


def test_accuracy_is_counted_by_video_and_frame() -> None:
    logits = torch.full((2, 3, 10), -1.0)
    logits[0, :, 7] = 1.0
    logits[1, 0, 2] = logits[1, 1, 3] = logits[1, 2, 2] = 1.0
    assert correct_digits(logits, torch.tensor([7, 2])).tolist() == [[1, 1, 1], [1, 0, 1]]
    assert mean_over_videos(correct_digits(logits, torch.tensor([7, 2])), seed=0).value.tolist() == [
        1,
        0.5,
        1,
    ]


def test_motion_is_followed_only_where_the_content_moves_as_asked() -> None:
    videos, _, shifts = real_videos(80, seed=0, frames=6)
    noisy = videos + 0.3 * torch.randn(videos.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(followed_motion(videos, shifts), torch.ones(80, 5))
    assert followed_motion(noisy, shifts).mean() > 0.97
    for wrong in (-shifts, shifts.flip(1), 2 * shifts, 0 * shifts):
        assert followed_motion(videos, wrong).sum() == 0
    assert followed_motion(videos[:, :1].expand(-1, 6, -1, -1, -1), shifts).sum() == 0
    assert followed_motion(torch.full_like(videos, -1.0), shifts).sum() == 0

    jumped = torch.cat([videos[:, :3], videos[:, 3:].roll((2, 1), dims=(-2, -1))], dim=1)
    assert followed_motion(jumped, shifts).mean(0).tolist() == [1, 1, 0, 1, 1]


def test_the_interval_of_a_mean_covers_the_truth_nineteen_times_in_twenty() -> None:
    generator = torch.Generator().manual_seed(0)
    values = (torch.rand(100, 300, generator=generator) < 0.7).float()
    estimate = mean_over_videos(values, seed=1)
    covered = ((estimate.low <= 0.7) & (estimate.high >= 0.7)).float().mean()
    assert 0.9 <= covered <= 0.99
    torch.testing.assert_close(estimate.value, values.mean(0))
    again = mean_over_videos(values, seed=1)
    assert torch.equal(estimate.low, again.low) and not torch.equal(
        estimate.low, mean_over_videos(values, seed=2).low
    )


def where_free(videos: torch.Tensor) -> torch.Tensor:
    """Features `[N, F, D]` that no circular shift changes: the magnitudes of the Fourier transform."""
    return torch.fft.rfft2(videos + 1).abs().flatten(2)


def test_diversity_is_one_for_real_videos_and_falls_as_modes_collapse() -> None:
    real, real_prompts, _ = real_videos(400, seed=0)
    other, prompts, _ = real_videos(400, seed=1)

    def ratio(videos: torch.Tensor) -> Estimate:
        return diversity_ratio(
            where_free(videos),
            prompts,
            torch.ones(400, 4),
            real_features=where_free(real),
            real_prompts=real_prompts,
            seed=0,
        )

    estimate = ratio(other)
    assert torch.all((estimate.low < 1) & (estimate.high > 1) & (estimate.high - estimate.low < 0.15))

    representative = torch.stack([(prompts == prompt).nonzero()[0, 0] for prompt in prompts])
    single = other[representative]
    starts = torch.randint(16, (400,), generator=torch.Generator().manual_seed(0))
    moved = torch.stack(
        [video.roll(int(start), dims=-1) for video, start in zip(single, starts, strict=True)]
    )
    assert ratio(moved).high.max() < 1e-2  # one scan a prompt, however often it starts elsewhere
    half = torch.where((torch.arange(400) % 2 == 0)[:, None, None, None, None], single, other)
    assert torch.all((ratio(half).low > 0.5) & (ratio(half).high < 0.95))
    late = torch.cat([other[:, :2], single[:, 2:]], dim=1)
    assert ratio(late).value[:2].min() > 0.9 and ratio(late).value[2:].max() < 1e-2


def test_diversity_is_the_mean_over_pairs_of_right_videos_of_one_prompt() -> None:
    generator = torch.Generator().manual_seed(0)
    features, prompts = torch.randn(7, 3, 5, generator=generator), torch.tensor([0, 1, 0, 1, 1, 0, 0])
    real, real_prompts = torch.randn(4, 3, 5, generator=generator), torch.zeros(4, dtype=torch.long)
    correct = torch.ones(7, 3)
    correct[6, 1] = correct[0, 1] = 0  # index 1 compares fewer videos
    correct[1:, 2] = 0  # index 2 has no pair left

    def by_hand(features: torch.Tensor, prompts: torch.Tensor, correct: torch.Tensor) -> float:
        units = features / features.norm(dim=-1, keepdim=True)
        pairs = itertools.permutations(correct.nonzero().flatten().tolist(), 2)
        return np.mean([(units[i] - units[j]).norm() for i, j in pairs if prompts[i] == prompts[j]])

    arguments = dict(real_features=real, real_prompts=real_prompts, seed=0)
    estimate = diversity_ratio(features, prompts, correct, **arguments)
    for frame in range(2):
        expected = by_hand(features[:, frame], prompts, correct[:, frame])
        expected /= by_hand(real[:, frame], real_prompts, torch.ones(4))
        assert estimate.value[frame].item() == pytest.approx(expected, rel=1e-5)
        assert estimate.low[frame] < expected < estimate.high[frame]
    assert estimate.value[2].isnan() and estimate.low[2].isnan()
    with pytest.raises(ValueError, match="no two generated videos share a prompt"):
        diversity_ratio(features, torch.arange(7), correct, **arguments)


def test_kernel_distance_is_the_published_formula_and_zero_in_the_mean_for_one_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 1, 3, generator=generator), torch.randn(7, 1, 3, generator=generator) + 0.5

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a[0] @ b[0] / 3 + 1) ** 3)

    expected = (
        np.mean([kernel(a, b) for a, b in itertools.permutations(x, 2)])
        + np.mean([kernel(a, b) for a, b in itertools.permutations(y, 2)])
        - 2 * np.mean([kernel(a, b) for a in x for b in y])
    )
    assert kernel_distance(x, y, seed=0).value.item() == pytest.approx(expected, rel=1e-5)

    same = kernel_distance(*torch.randn(2, 40, 200, 8, generator=generator), seed=0).value
    standard_error = same.std() / len(same) ** 0.5
    assert abs(same.mean()) < 4 * standard_error and same.min() < 0  # a biased estimate is never below zero
    shifted = torch.randn(2, 100, 3, 8, generator=generator)
    shifted[0] += torch.tensor([0.0, 0.4, 0.8])[:, None]
    apart = kernel_distance(shifted[0], shifted[1], seed=0)
    assert apart.value[0] < apart.low[1] and apart.high[1] < apart.low[2]


def test_resampling_does_not_pull_a_pairwise_statistic_down() -> None:
    videos, prompts, _ = real_videos(80, seed=3, frames=1)  # two videos a prompt: self-pairs would halve it
    real, real_prompts, _ = real_videos(400, seed=4, frames=1)
    estimate = diversity_ratio(
        where_free(videos),
        prompts,
        torch.ones(80, 1),
        real_features=where_free(real),
        real_prompts=real_prompts,
        seed=0,
    )
    assert estimate.low < estimate.value - 0.01 and estimate.high > estimate.value + 0.01


def test_render_directions_match_the_measured_shift() -> None:
    image = np.zeros((1, 8, 8), dtype=np.uint8)
    image[0, 2, 3] = 255
    for direction in DIRECTIONS:
        video = torch.from_numpy(render(image, [direction], np.array([[15, 15]]), 20)).float()
        assert followed_motion(video, torch.tensor([expected_shift(direction)])).all()
