"""The objectives against their formulas, and against themselves split over ranks."""

import pytest
import torch

from model.objectives.dmd import dmd_loss
from model.objectives.flow_matching import flow_matching_loss
from model.objectives.regression import regression_terms, trajectory_inputs
from model.schedule import FlowSchedule
from model.score import guide, guided_x0, predict_x0
from tests.model.reference import CONFIG, HEIGHT, WIDTH, difference, normal, prompt, tiny_model

SHAPE = (3, 4, CONFIG.in_dim, HEIGHT, WIDTH)


def test_dmd_gradient_is_the_formula() -> None:
    video, real, fake = (normal(*SHAPE, seed=seed).requires_grad_() for seed in range(3))
    loss = dmd_loss(video, real, fake)
    gradient = torch.autograd.grad(loss, (video, real, fake), allow_unused=True)
    with torch.no_grad():
        g = torch.stack([(f - r) / (v - r).abs().mean() for v, r, f in zip(video, real, fake, strict=True)])
    assert difference(gradient[0], g / g.numel()) < 1e-5
    assert loss.item() == pytest.approx(0.5 * g.square().mean().item(), rel=1e-5)
    assert gradient[1:] == (None, None)


def test_dmd_pulls_towards_the_teacher_and_away_from_the_critic() -> None:
    video = normal(*SHAPE).requires_grad_()
    real, fake = video.detach() + 1, video.detach() - 1
    (gradient,) = torch.autograd.grad(dmd_loss(video, real, fake), video)
    assert (gradient < 0).all()
    assert dmd_loss(video, real, real).item() == 0


def test_dmd_normalises_each_sample_alone() -> None:
    video, real, fake = (normal(*SHAPE, seed=seed) for seed in range(3))
    video.requires_grad_()
    (whole,) = torch.autograd.grad(dmd_loss(video, real, fake), video)
    (alone,) = torch.autograd.grad(dmd_loss(video[:1], real[:1], fake[:1]), video)
    assert difference(whole[:1], alone[:1] / len(video)) < 1e-6


def test_flow_matching_loss_is_zero_at_the_true_velocity() -> None:
    x0, noise = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert flow_matching_loss(noise - x0, noise, x0).item() == 0
    assert flow_matching_loss(noise - x0 + 0.5, noise, x0).item() == pytest.approx(0.25, rel=1e-5)


def test_regression_pools_frames_over_ranks() -> None:
    """Ranks whose samples have unequally many noisy frames: sums and counts add up, means do not."""
    x0, target = normal(*SHAPE), normal(*SHAPE, seed=1)
    timestep = torch.tensor([[0.0, 0, 0, 500], [900, 900, 500, 500], [0, 0, 900, 0]])
    total, count = regression_terms(x0, target, timestep)
    noisy = timestep != 0
    assert count.item() == noisy.sum().item() * x0[0, 0].numel()
    expected = (x0 - target)[noisy].square().mean()
    assert (total / count).item() == pytest.approx(expected.item(), rel=1e-5)
    ranks = [regression_terms(x0[rows], target[rows], timestep[rows]) for rows in ([0], [1, 2])]
    pooled = sum(total for total, _ in ranks) / sum(count for _, count in ranks)
    assert pooled.item() == pytest.approx(expected.item(), rel=1e-5)
    mean_of_means = sum((total / count).item() for total, count in ranks) / 2
    assert mean_of_means != pytest.approx(expected.item(), rel=1e-3)


def test_clean_frames_teach_nothing() -> None:
    x0 = normal(*SHAPE).requires_grad_()
    timestep = torch.tensor([[0.0, 500, 0, 500]] * 3)
    total, count = regression_terms(x0, normal(*SHAPE, seed=1), timestep)
    (gradient,) = torch.autograd.grad(total / count, x0)
    assert not gradient[:, [0, 2]].any() and gradient[:, [1, 3]].all()
    nothing, none = regression_terms(x0, x0 + 1, torch.zeros(3, 4))
    assert nothing.item() == 0 and none.item() == 0


def test_trajectories_are_read_frame_by_frame() -> None:
    trajectory = normal(2, 5, 4, CONFIG.in_dim, HEIGHT, WIDTH)
    steps = torch.tensor([1000.0, 937.5, 833.3, 625, 0])
    index = torch.tensor([[0, 4, 2, 2], [3, 1, 0, 4]])
    noisy, timestep = trajectory_inputs(trajectory, steps, index)
    for sample in range(2):
        for frame in range(4):
            where = index[sample, frame]
            assert torch.equal(noisy[sample, frame], trajectory[sample, where, frame])
            assert timestep[sample, frame] == steps[where]


def test_guidance_is_the_published_form() -> None:
    cond, uncond = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert torch.equal(guide(cond, uncond, 0.0), cond)
    assert torch.allclose(guide(cond, uncond, 3.0), 4 * cond - 3 * uncond, atol=1e-5)


@torch.no_grad()
def test_both_branches_of_guidance_in_one_batch_are_what_they_are_apart() -> None:
    model, schedule = tiny_model(), FlowSchedule(5.0)
    calls: list[int] = []
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    x_t, timestep, cond = normal(*SHAPE), torch.tensor([900.0, 500.0, 40.0]), prompt(3)
    uncond = torch.zeros(1, CONFIG.text_len, CONFIG.text_dim)

    def guided(guidance: float) -> torch.Tensor:
        return guided_x0(model, x_t, timestep, cond=cond, uncond=uncond, guidance=guidance, schedule=schedule)

    apart = [predict_x0(model, x_t, timestep, text, schedule) for text in (cond, uncond.expand(3, -1, -1))]
    calls.clear()
    assert difference(guided(3.0), guide(apart[0], apart[1], 3.0)) < 1e-5
    assert torch.equal(guided(0.0), apart[0])
    assert calls == [6, 3]
