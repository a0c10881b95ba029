"""The objectives against their formulas, and against themselves split over ranks."""

import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from model import objectives
from model.discriminator import BranchConfig
from model.initialization.method import Setup, Share
from model.initialization.regression import regression_loss, regression_terms, trajectory_inputs
from model.objectives.dmd import dmd_loss
from model.objectives.flow_matching import flow_matching_loss, timestep_weight
from model.objectives.gan import (
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    relativistic_discriminator_loss,
    relativistic_generator_loss,
)
from model.objectives.sid import sid_loss
from model.rollout_plan import RolloutConfig
from model.sampler import guide
from model.schedule import FlowSchedule
from model.score import guided_x0, predict_x0
from tests.model.reference import CONFIG, HEIGHT, WIDTH, difference, normal, prompt, tiny_model
from tests.model.test_discriminator import tiny_critic

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


def test_sid_is_the_formula_and_its_normaliser_a_constant() -> None:
    video, real, fake = (normal(*SHAPE, seed=seed).requires_grad_() for seed in range(3))
    loss = sid_loss(video, real, fake, 0.7)
    gradient = torch.autograd.grad(loss, (video, real, fake))
    with torch.no_grad():
        scale = torch.stack([(v - r).abs().mean() for v, r in zip(video, real, strict=True)])
        scale = scale.reshape(-1, 1, 1, 1, 1) * video.numel()
        gap = real - fake
        assert loss.item() == pytest.approx(
            (gap * ((real - video) - 0.7 * gap) / scale).sum().item(), rel=1e-5
        )
        assert difference(gradient[0], -gap / scale) < 1e-5
        assert difference(gradient[1], ((real - video) + gap - 1.4 * gap) / scale) < 1e-5
        assert difference(gradient[2], (-(real - video) + 1.4 * gap) / scale) < 1e-5


def test_sid_vanishes_where_teacher_and_critic_agree() -> None:
    video, real = normal(*SHAPE), normal(*SHAPE, seed=1)
    assert sid_loss(video, real, real, 1.0).item() == 0


Scores = Callable[[Tensor], tuple[Tensor, ...]]
Objective = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def scores() -> tuple[Scores, Scores]:
    """What a guided teacher answers (x0), and a critic of other weights with a branch (x0, logits)."""
    teacher, critic = tiny_model(seed=1), tiny_critic(BranchConfig((0, 1)))
    schedule, timestep, noise = FlowSchedule(5.0), torch.tensor([900.0, 500.0, 40.0]), normal(*SHAPE, seed=9)

    def real(video: Tensor) -> tuple[Tensor]:
        noisy = schedule.add_noise(video, noise, timestep)
        cond, uncond = prompt(3), prompt(3, seed=8)
        return (
            guided_x0(teacher, noisy, timestep, cond=cond, uncond=uncond, guidance=3.0, schedule=schedule),
        )

    def fake(video: Tensor) -> tuple[Tensor, Tensor]:
        noisy = schedule.add_noise(video, noise, timestep)
        velocity, logits = critic(noisy, timestep, prompt(3))
        return schedule.x0(velocity, noisy, timestep), logits

    return real, fake


@pytest.mark.parametrize(
    "objective",
    [
        lambda video, real, fake, logits: dmd_loss(video, real, fake),
        lambda video, real, fake, logits: sid_loss(video, real, fake, 1.0),
        lambda video, real, fake, logits: dmd_loss(video, real, fake) + 0.1 * generator_loss(logits),
        lambda video, real, fake, logits: (
            sid_loss(video, real, fake, 1.0) + relativistic_generator_loss(logits, -logits.detach())
        ),
    ],
    ids=["dmd", "sid", "dmd+gan", "sid+gan"],
)
def test_a_gradient_pulled_back_in_pieces_is_that_of_one_graph(objective: Objective) -> None:
    """Teacher and critic keep a graph each from a copy of the video; only derivatives travel between."""
    real, fake = scores()
    video = normal(*SHAPE).requires_grad_()
    (whole,) = torch.autograd.grad(objective(video, *real(video), *fake(video)), video)

    copies = [video.detach().requires_grad_() for _ in range(2)]
    kept = [score(copy) for score, copy in zip((real, fake), copies, strict=True)]
    leaves = [tensor.detach().requires_grad_() for tensor in (video, *kept[0], *kept[1])]
    direct, *cotangents = torch.autograd.grad(
        objective(*leaves), leaves, allow_unused=True, materialize_grads=True
    )
    pulled = torch.autograd.grad(kept[0], copies[0], cotangents[:1])
    pulled += torch.autograd.grad(kept[1], copies[1], cotangents[1:])
    assert difference(direct + sum(pulled), whole) < 1e-6


def test_adversarial_losses_know_who_wins() -> None:
    low, high = torch.full((3, 2), -2.0), torch.full((3, 2), 2.0)
    right, wrong = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert generator_loss(high).item() == pytest.approx(right, rel=1e-6)
    assert generator_loss(low).item() == pytest.approx(wrong, rel=1e-6)
    assert discriminator_loss(low, high).item() == pytest.approx(2 * right, rel=1e-6)
    assert discriminator_loss(high, low).item() == pytest.approx(2 * wrong, rel=1e-6)
    assert relativistic_discriminator_loss(low, high).item() == pytest.approx(
        math.log1p(math.exp(-4)), rel=1e-6
    )
    assert relativistic_generator_loss(low, high).item() == pytest.approx(math.log1p(math.exp(4)), rel=1e-6)


def test_relativistic_losses_compare_pairs_only() -> None:
    fake, real = normal(4, 2), normal(4, 2, seed=1)
    for loss in (relativistic_generator_loss, relativistic_discriminator_loss):
        assert loss(fake + 5, real + 5).item() == pytest.approx(loss(fake, real).item(), rel=1e-5)
        assert loss(real, real).item() == pytest.approx(math.log(2), rel=1e-6)
    swapped = relativistic_discriminator_loss(real, fake)
    assert relativistic_generator_loss(fake, real).item() == pytest.approx(swapped.item(), rel=1e-6)


def test_gradient_penalty_is_the_slope_along_the_noise() -> None:
    """For a linear classifier it is the same for every sigma: `mean((w · noise)²)`."""
    weight, video, noise = normal(10, 2), normal(4, 10, seed=1), normal(4, 10, seed=2)
    for sigma in (0.01, 0.5):
        penalty = gradient_penalty((video + sigma * noise) @ weight, video @ weight, sigma)
        assert penalty.item() == pytest.approx((noise @ weight).square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_timestep_weight_is_a_bell_of_mean_one(shift: float) -> None:
    schedule = FlowSchedule(shift)
    weight = timestep_weight(schedule.timesteps, schedule)
    assert weight.mean().item() == pytest.approx(1, rel=1e-5)
    bell = [math.exp(-2 * (t / 1000 - 0.5) ** 2) for t in schedule.timesteps.tolist()]
    total = sum(value - min(bell) for value in bell)
    some = torch.tensor([[500.0, 20.0], [962.4, 1000.0]])
    expected = [bell[(schedule.timesteps - t).abs().argmin()] - min(bell) for t in some.flatten()]
    assert (
        difference(timestep_weight(some, schedule), 1000 * torch.tensor(expected).reshape(2, 2) / total)
        < 1e-4
    )
    assert abs(schedule.timesteps[weight.argmax()].item() - 500) < 2 * shift
    assert weight.min().item() == 0


def test_a_weight_counts_a_frame_for_as_much() -> None:
    velocity, noise, x0 = (normal(*SHAPE, seed=seed) for seed in range(3))
    weight = torch.rand(SHAPE[:2], generator=torch.Generator().manual_seed(0))
    expected = sum(
        weight[b, f] * flow_matching_loss(velocity[b, f], noise[b, f], x0[b, f])
        for b in range(SHAPE[0])
        for f in range(SHAPE[1])
    )
    loss = flow_matching_loss(velocity, noise, x0, weight)
    assert loss.item() == pytest.approx(expected.item() / weight.numel(), rel=1e-5)
    ones = flow_matching_loss(velocity, noise, x0, torch.ones(SHAPE[:2]))
    assert ones.item() == pytest.approx(flow_matching_loss(velocity, noise, x0).item(), rel=1e-6)


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


def test_a_share_without_a_noisy_frame_adds_nothing_to_a_batch() -> None:
    """Timestep 0 is one of the levels drawn, and a micro-batch may draw no other."""
    rollout = RolloutConfig(steps=(1000, 500), chunk=2)
    context, settings = torch.zeros(4, 1, 1), None
    setup = Setup(settings, rollout, torch.zeros(1, 1), None, torch.device("cpu"))
    trajectory = normal(4, 3, 2, *SHAPE[2:])
    weight = torch.ones((), requires_grad=True)

    def module(noisy: Tensor, *_: object, **__: object) -> SimpleNamespace:
        return SimpleNamespace(velocity=noisy * weight)

    def loss(update: int, samples: range) -> Tensor:
        rows = slice(samples.start, samples.stop)
        share = Share(context[rows], None, trajectory[rows], 0, update, samples, 4)
        return regression_loss(module, setup, share)

    empty = 0
    for update in range(20):
        whole = loss(update, range(4))
        parts = [loss(update, range(i, i + 1)) for i in range(4)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole)
        (gradient,) = torch.autograd.grad(torch.stack(parts).sum(), weight)
        assert gradient.isfinite()
        empty += sum(part.item() == 0 for part in parts)
    assert empty


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


def test_the_documented_objective_works_as_it_stands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its one file in the package is all that it takes."""
    page = (Path(__file__).parents[2] / "docs" / "adding-an-objective.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "score_distance.py").write_text(block)
    monkeypatch.setattr(objectives, "__path__", [*objectives.__path__, str(tmp_path)])
    monkeypatch.setattr(objectives, "LOSSES", objectives.declared())
    monkeypatch.delitem(sys.modules, "model.objectives.score_distance")
    config = objectives.ObjectiveConfig({"score_distance": 1.0, "dmd": 0.5})
    assert config.reads == config.flows == ("real", "fake")
    video, real, fake = (normal(*SHAPE, seed=seed).requires_grad_() for seed in range(3))
    loss = config({"video": video, "real": real, "fake": fake})
    gradient = torch.autograd.grad(loss, (video, real, fake))
    assert difference(gradient[1], (real - fake) / video.numel()) < 1e-5
    assert difference(gradient[2], (fake - real) / video.numel()) < 1e-5
    alone = torch.autograd.grad(dmd_loss(video, real, fake), video)[0]
    assert difference(gradient[0], 0.5 * alone) < 1e-5


def test_losses_declare_their_own_statistics() -> None:
    leaves = {name: normal(*SHAPE, seed=seed) for seed, name in enumerate(("video", "real", "fake"))}
    gap = (leaves["fake"] - leaves["real"]).abs().mean().item()
    for weights in ({"dmd": 1.0}, {"sid": 1.0}, {"dmd": 1.0, "sid": 0.5, "gan": 1.0}):
        assert objectives.ObjectiveConfig(weights).statistics(leaves) == {"score_gap": gap}
    assert objectives.ObjectiveConfig({"relativistic_gan": 1.0}).statistics({}) == {}
