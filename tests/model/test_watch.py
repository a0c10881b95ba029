"""Numbers that are watched: by hand, and whatever the micro-batches."""

from statistics import fmean

import pytest
import torch

from model import watch
from model.schedule import FlowSchedule


def test_latents_are_compared_with_their_reference() -> None:
    reference = watch.Reference.of(torch.tensor([[0.0, 2.0], [-1.0, 4.0]]), "four values")
    assert (reference.low, reference.high) == pytest.approx((-1.5, 4.5))
    values = torch.tensor([[0.0, 2.0, -1.0, 4.0], [2.0, 4.0, 8.0, -2.0]])
    found = watch.of_latents(values, reference)
    assert found == pytest.approx({"latent_mean": 17 / 8, "latent_energy": 109 / 8, "latent_outside": 0.25})
    assert "latent_outside" not in watch.of_latents(values, None)
    # However the batch is spread out, its deviation is one.
    parts = [watch.of_latents(part, reference) for part in values.split(1)]
    means = {f"student/{name}": fmean(part[name] for part in parts) for name in found}
    assert watch.pooled(means)["student/latent_std"] == pytest.approx(values.std(correction=0).item())


def test_a_band_is_the_mean_of_its_samples_however_they_are_spread_out() -> None:
    timestep = torch.tensor([10.0, 340, 20, 990, 350, 30, 1000, 0])
    values = torch.arange(8.0)
    whole = watch.by_band(timestep, gap=values)
    parts = [watch.by_band(timestep[i : i + 2], gap=values[i : i + 2]) for i in range(0, 8, 2)]
    expected = {
        "student/gap_low": 14 / 4,
        "student/gap_middle": 2.5,
        "student/gap_high": 4.5,
        "student/loss": 1,
    }
    for found in (whole, {name: fmean(part[name] for part in parts) for name in whole}):
        named = {f"student/{name}": value for name, value in found.items()}
        means = watch.pooled({**named, "student/loss": 1})
        assert means == pytest.approx(expected)
    empty = watch.by_band(timestep[:1], gap=values[:1])
    assert watch.pooled({f"critic/{name}": value for name, value in empty.items()}) == {"critic/gap_low": 0}


def test_the_flow_loss_of_an_x0_is_that_of_its_velocity() -> None:
    generator = torch.Generator().manual_seed(0)
    video, noise, guess = (torch.randn(3, 2, 1, 4, 4, generator=generator) for _ in range(3))
    schedule, timestep = FlowSchedule(3.0), torch.tensor([100.0, 500, 900])
    noisy = schedule.add_noise(video, noise, timestep)
    x0 = schedule.x0(guess, noisy, timestep)
    expected = (guess - (noise - video)).square().mean(dim=(1, 2, 3, 4))
    torch.testing.assert_close(
        watch.flow_loss(x0, video, schedule.sigma(timestep)), expected, rtol=1e-3, atol=1e-4
    )


def test_what_decoding_clamps_is_counted() -> None:
    frames = torch.zeros(1, 2, 1, 2, 2)
    frames[0, 1, 0] = torch.tensor([[1.0, 1.2], [-1.5, 1.001]])
    assert watch.clamped_share(frames).tolist() == [[0, 0.5]]
