"""Metrics of any video, on videos whose answer is known."""

import math

import pytest
import torch

from model import video_metrics
from model.metrics import difference_of_means


def still(value: float, channels: int = 3, frames: int = 4) -> torch.Tensor:
    return torch.full((2, frames, channels, 8, 8), value)


def test_levels_of_plain_and_of_split_frames() -> None:
    white = still(1.0)
    assert video_metrics.brightness(white).allclose(torch.ones(2, 4))
    for level in (video_metrics.contrast, video_metrics.saturation, video_metrics.sharpness):
        assert level(white).abs().max() < 1e-6
    red = still(-1.0)
    red[:, :, 0] = 1.0
    assert video_metrics.brightness(red).allclose(torch.full((2, 4), 0.2126))
    assert video_metrics.saturation(red).allclose(torch.ones(2, 4))
    split = still(-1.0, channels=1)
    split[..., :4] = 1.0
    assert video_metrics.contrast(split).allclose(torch.full((2, 4), 0.5))
    assert video_metrics.saturation(split).isnan().all()
    blurred = torch.nn.functional.avg_pool2d(split.flatten(0, 1), 3, 1, 1, count_include_pad=False).unflatten(
        0, (2, 4)
    )
    assert (video_metrics.sharpness(blurred) < video_metrics.sharpness(split) / 2).all()


def test_flicker_is_what_alternates_and_not_what_fades_evenly() -> None:
    alternating = still(-1.0, frames=6)
    alternating[:, ::2] = 1.0
    flicker = video_metrics.flicker(alternating)
    assert flicker[:, [0, -1]].isnan().all() and flicker[:, 1:-1].allclose(torch.full((2, 4), 0.5**2))
    assert video_metrics.motion(alternating)[:, 1:].allclose(torch.ones(2, 5))
    fading = torch.linspace(-1, 1, 6)[None, :, None, None, None].expand(2, 6, 3, 8, 8)
    assert video_metrics.flicker(fading)[:, 1:-1].abs().max() < 1e-10
    assert video_metrics.motion(fading)[:, 1:].allclose(torch.full((2, 5), 0.2))
    assert video_metrics.flicker(still(0.0, frames=2)).isnan().all()


def test_drift_is_from_each_videos_own_first_chunk() -> None:
    values = torch.tensor([[0.2, 0.4, 0.3, 0.8], [0.6, 0.6, 0.6, 0.1]])
    assert video_metrics.drift(values, 2).allclose(
        torch.tensor([[0.1, 0.1, 0.0, 0.5], [0.0, 0.0, 0.0, 0.5]]), atol=1e-6
    )


def test_latents_outside_their_channels_range_are_counted() -> None:
    latents = torch.zeros(1, 2, 2, 2, 2)
    latents[0, 1, 0, 0, 0] = 3.0
    latents[0, 1, 1, 0, 0] = 3.0
    low, high = torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 4.0])
    assert video_metrics.share_outside(latents, low, high).tolist() == [[0, 1 / 8]]


def test_the_interval_of_a_difference_holds_it_and_narrows_with_the_videos() -> None:
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(400, 3, generator=generator) + 1, torch.randn(300, 3, generator=generator)
    wide, narrow = (
        difference_of_means(first[:25], second[:25], seed=0),
        difference_of_means(first, second, seed=0),
    )
    assert narrow.value.tolist() == pytest.approx((first.mean(0) - second.mean(0)).tolist(), abs=1e-5)
    assert ((narrow.low < 1) & (narrow.high > 1)).all()
    assert ((narrow.high - narrow.low) < (wide.high - wide.low) / 2).all()
    undefined = torch.full((25, 3), math.nan)
    assert difference_of_means(undefined, second, seed=0).value.isnan().all()
