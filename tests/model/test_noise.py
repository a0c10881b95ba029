"""Draws depend on their name and on nothing else."""

import pytest
import torch

from model.noise import SampleNoise, generator, integer
from model.score import ScoreConfig, ScorePlan
from tests.model.reference import normal

SHAPE = (3, 2, 4, 4)


def key(sample: int, update: int = 5, purpose: str = "score") -> tuple[int | str, ...]:
    return (0, update, purpose, sample)


def draw(samples: list[int], chunk: int = 0, step: int = 0, **name: int | str) -> torch.Tensor:
    return SampleNoise([key(sample, **name) for sample in samples]).draw((len(samples), *SHAPE), chunk, step)


@pytest.mark.parametrize("split", [[[0, 1], [2, 3]], [[0], [1], [2], [3]], [[0, 1, 2], [3]]])
def test_ranks_draw_what_one_rank_would(split: list[list[int]]) -> None:
    assert torch.equal(torch.cat([draw(samples) for samples in split]), draw([0, 1, 2, 3]))


def test_order_of_draws_and_global_state_do_not_matter() -> None:
    first, second = draw([7]), draw([7], chunk=1)
    torch.manual_seed(123)
    torch.randn(10)
    assert torch.equal(draw([7], chunk=1), second)
    assert torch.equal(draw([7]), first)


def test_every_part_of_the_name_matters() -> None:
    draws = [
        draw([0]),
        draw([1]),
        draw([0], chunk=1),
        draw([0], step=1),
        draw([0], update=6),
        draw([0], purpose="rollout"),
    ]
    for one in range(len(draws)):
        for two in range(one):
            assert (draws[one] - draws[two]).abs().max() > 0.1


def test_seeds_are_the_same_in_every_process() -> None:
    """Python's own `hash` of a string is not, so the number is written down here."""
    assert generator(3, "student", 9).initial_seed() == 9768962823501254759


def test_draws_are_standard_normal_and_integers_uniform() -> None:
    noise = SampleNoise([key(sample) for sample in range(8)]).draw((8, 5, 4, 16, 16), 0, 0)
    assert abs(noise.mean().item()) < 0.02 and abs(noise.std().item() - 1) < 0.02
    counts = torch.bincount(torch.tensor([integer(4, "uniform", index) for index in range(800)]), minlength=4)
    assert counts.min() > 150 and len(counts) == 4


def test_noise_has_the_asked_type_and_size() -> None:
    noise = SampleNoise([key(0)], dtype=torch.bfloat16).draw((1, *SHAPE), 0, 0)
    assert torch.equal(noise, draw([0]).bfloat16())
    with pytest.raises(ValueError, match="noise for 1 samples was asked for 2"):
        SampleNoise([key(0)]).draw((2, *SHAPE), 0, 0)


def test_teacher_and_critic_see_the_same_noisy_video() -> None:
    """Whatever their batches: a score plan's draws are a sample's own."""
    plan, config, video = ScorePlan((0, 5, "score")), ScoreConfig(), normal(4, *SHAPE)
    noise, timestep = plan.draw(video, [4, 5, 6, 7], config)
    for rows in ([0, 1], [3, 2], [1]):
        samples = [4 + row for row in rows]
        part_noise, part_timestep = plan.draw(video[rows], samples, config)
        assert torch.equal(part_noise, noise[rows]) and torch.equal(part_timestep, timestep[rows])
    _, many = plan.draw(normal(200, 1, 1, 1, 1), list(range(200)), config)
    assert many.min() >= config.minimum and many.max() <= config.maximum and len(many.unique()) > 100
    later, _ = ScorePlan((0, 6, "score")).draw(video, [4, 5, 6, 7], config)
    assert (later - noise).abs().max() > 0.1


@pytest.mark.parametrize("low, high", [(-1.0, 980.0), (500.0, 500.0), (20.0, 1001.0)])
def test_impossible_score_timesteps_are_one_sentence(low: float, high: float) -> None:
    with pytest.raises(ValueError, match=r"minimum .* maximum .* 0 <= minimum < maximum <= 1000"):
        ScoreConfig(minimum=low, maximum=high)
    with pytest.raises(ValueError, match=r"shift is -1.0; it must be positive"):
        ScoreConfig(shift=-1.0)


def test_a_generator_is_fresh_each_time() -> None:
    one, two = generator("a", 1), generator("a", 1)
    torch.rand(5, generator=one)
    assert two.initial_seed() == one.initial_seed() != generator("a", 2).initial_seed()
    assert torch.equal(torch.rand(5, generator=two), torch.rand(5, generator=generator("a", 1)))
