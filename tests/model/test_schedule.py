"""The schedule's tables against its formula, worked out by hand."""

import pytest
import torch

from model.schedule import TIMESTEPS, FlowSchedule, clean, interpolate
from tests.model.reference import difference, normal


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
def test_table_is_the_warped_line(shift: float) -> None:
    schedule = FlowSchedule(shift)
    assert len(schedule.sigmas) == TIMESTEPS == 1000
    for index in (0, 1, 250, 500, 999):
        s = 1 - index / 1000
        sigma = shift * s / (1 + (shift - 1) * s)
        assert schedule.sigmas[index].item() == pytest.approx(sigma, rel=1e-4)
        assert schedule.timesteps[index].item() == pytest.approx(1000 * sigma, rel=1e-4)
        assert schedule.sigma(torch.tensor(1000 * sigma)).item() == pytest.approx(sigma, rel=1e-4)


def test_published_steps() -> None:
    assert FlowSchedule(5.0).few_steps([1000, 750, 500, 250]) == pytest.approx([1000, 937.5, 833.3333, 625])
    assert FlowSchedule(1.0).few_steps([1000, 750, 500, 250]) == pytest.approx([1000, 750, 500, 250])


def test_sigma_is_that_of_the_nearest_entry() -> None:
    schedule = FlowSchedule(5.0)
    smallest = 5 * 0.001 / (1 + 4 * 0.001)
    assert schedule.sigma(torch.tensor(0.0)).item() == pytest.approx(smallest, rel=1e-4)
    assert smallest == pytest.approx(0.00498, abs=1e-5)
    timestep = torch.tensor([[0.0, 4.0, 9.0], [640.0, 999.9, 1000.0]])
    sigma = schedule.sigma(timestep)
    assert sigma.shape == timestep.shape
    distance = (schedule.timesteps - timestep[..., None]).abs()
    assert torch.equal((1000 * sigma - timestep).abs(), distance.amin(-1))


def test_score_timesteps_are_warped_and_clamped() -> None:
    schedule = FlowSchedule(5.0)
    timestep = schedule.score_timestep(torch.arange(TIMESTEPS), 20, 980)
    assert timestep.min() == 20 and timestep.max() == 980
    assert timestep[500].item() == pytest.approx(833.3333, rel=1e-5)
    assert (timestep.diff() >= 0).all()


@pytest.mark.parametrize("by_frame", [False, True])
def test_noising_can_be_undone_from_the_velocity(by_frame: bool) -> None:
    schedule = FlowSchedule(5.0)
    x0, noise = normal(2, 3, 1, 4, 4), normal(2, 3, 1, 4, 4, seed=1)
    timestep = (
        torch.tensor([[900.0, 500.0, 20.0], [100.0, 0.0, 999.0]]) if by_frame else torch.tensor([900.0, 50.0])
    )
    noisy = schedule.add_noise(x0, noise, timestep)
    sigma = schedule.sigma(timestep)
    sigma_of_last = sigma[1, 2] if by_frame else sigma[1]
    assert torch.allclose(noisy[1, 2], (1 - sigma_of_last) * x0[1, 2] + sigma_of_last * noise[1, 2])
    assert difference(schedule.x0(noise - x0, noisy, timestep), x0) < 1e-5
    halved = schedule.x0((noise - x0).bfloat16(), noisy.bfloat16(), timestep)
    assert halved.dtype == torch.float32 and difference(halved, x0) < 0.02


def test_path_ends_at_noise_and_at_the_video() -> None:
    x0, noise = normal(3), normal(3, seed=1)
    assert torch.equal(interpolate(x0, noise, 1.0), noise)
    assert torch.equal(interpolate(x0, noise, 0.0), x0)
    assert torch.allclose(clean(noise, noise - x0, 1.0), x0)


def test_a_shift_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="shift must be positive, not 0; Wan uses 5"):
        FlowSchedule(0)
