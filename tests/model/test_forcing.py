"""Students on data instead of their rollout, many-step and uneven samplers, guidance, and consistency
distillation."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.forcing import ForcedPlan, per_chunk
from model.initialization.consistency import consistency_target
from model.kv_cache import BlockCache, SlotCache
from model.noise import SampleNoise
from model.rollout import NetworkCall, Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.sampler import euler_step, guide
from model.schedule import FlowSchedule
from tests.model.reference import (
    CONFIG,
    HEIGHT,
    WIDTH,
    calls_recorded,
    difference,
    normal,
    prompt,
    tiny_model,
)
from tests.model.test_rollout import block_cache, keys, run, slot_cache

FRAMES = 6
CONFIGS = RolloutConfig(steps=(1000, 500), chunk=2, window=4, positions="relative")
DATA = (2, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH)


def test_levels_are_drawn_chunk_by_chunk_from_each_samples_name() -> None:
    drawn = per_chunk(4, CONFIGS, 60, [(0, sample) for sample in range(3)])
    assert drawn.shape == (3, 60) and set(drawn.unique().tolist()) == {0, 1, 2, 3}
    assert torch.equal(drawn[:, ::2], drawn[:, 1::2])
    assert torch.equal(per_chunk(4, CONFIGS, 60, [(0, 2), (0, 0)]), drawn[[2, 0]])
    with pytest.raises(ValueError, match=r"rollout.chunk of 2 does not divide 5 frames"):
        per_chunk(4, CONFIGS, 5, [(0,)])


@pytest.mark.parametrize("forcing", ["teacher_forcing", "diffusion_forcing"])
def test_a_prediction_on_data_is_what_the_rollouts_own_call_gives(forcing: str) -> None:
    """The first chunk of both has no past, so it is a rollout's call at the same level; later ones tell the
    two apart."""
    model, data, context = tiny_model(), normal(*DATA, seed=4), prompt(2)
    plan = ForcedPlan(forcing, (0,), gradient=True)  # type: ignore[arg-type]
    x0 = plan.predict(model, CONFIGS, data, context, [0, 1])
    assert x0.shape == data.shape and x0.requires_grad
    assert not replace(plan, gradient=False).predict(model, CONFIGS, data, context, [0, 1]).requires_grad

    schedule, sources = FlowSchedule(CONFIGS.shift), [(0, 0), (0, 1)]
    levels = [*schedule.few_steps(CONFIGS.steps), *([0.0] if forcing == "diffusion_forcing" else [])]
    timestep = torch.tensor(levels)[per_chunk(len(levels), CONFIGS, FRAMES, sources)]
    noisy = schedule.add_noise(data, SampleNoise(sources).draw(data.shape, 0, 0), timestep)
    history = block_cache(CONFIGS).history(2)
    with torch.no_grad():
        first = model(noisy[:, :2], timestep[:, :2], context, history=history).velocity
    assert difference(x0[:, :2], schedule.x0(first, noisy[:, :2], timestep[:, :2])) < 1e-5

    # Whether another past changes the second chunk: under teacher forcing the data's, under diffusion forcing
    # the noisy one's.
    other = data.clone()
    other[:, :2] += 1
    moved = plan.predict(model, CONFIGS, other, context, [0, 1])[:, 2:4]
    assert difference(moved, x0[:, 2:4]) > 1e-3


def test_the_first_chunk_may_have_steps_of_its_own() -> None:
    config = replace(CONFIGS, steps=(1000,), first_steps=(1000, 750, 500))
    assert config.every_step == (1000, 750, 500)
    plan = RolloutPlan.full(config, FRAMES)
    assert (plan.exit_step, plan.first_exit_step) == (0, 2)
    model = tiny_model()
    with calls_recorded() as calls:
        video = run(model, config, plan)
    warped = FlowSchedule(config.shift).few_steps
    assert [call.timestep for call in calls] == pytest.approx([*warped((1000, 750, 500)), 0, 1000, 0, 1000])
    # Its frames are those of a rollout with these steps throughout.
    same = run(model, replace(CONFIGS, steps=(1000, 750, 500)), RolloutPlan(2, 2))
    assert torch.equal(video[:, :2], same)
    drawn = [
        RolloutPlan.draw(config, FRAMES, seed=0, update=update, purpose="student", grad_frames=FRAMES)
        for update in range(40)
    ]
    assert {(plan.exit_step, plan.first_exit_step) for plan in drawn} == {(0, 0), (0, 1), (0, 2)}
    with pytest.raises(ValueError, match=r"first_exit_step None does not go with rollout.first_steps"):
        run(model, config, RolloutPlan(FRAMES, 0))
    # A given first frame is a past, so what follows it is no first chunk.
    initial = normal(2, 2, CONFIG.in_dim, HEIGHT, WIDTH)
    with calls_recorded() as calls:
        run(model, config, RolloutPlan.full(config, 4), initial=initial)
    assert [call.timestep for call in calls] == pytest.approx([0, 1000])


def test_the_ode_sampler_follows_the_velocity() -> None:
    config = replace(CONFIGS, steps=(1000, 750, 500, 250), sampler="ode")
    model, context = tiny_model(), prompt(2)
    video = run(model, config, RolloutPlan.full(config, 2))
    schedule = FlowSchedule(config.shift)
    timesteps = schedule.few_steps(config.steps)
    sigmas = [*schedule.sigma(torch.tensor(timesteps)).tolist(), 0.0]
    x, history = keys(2).draw((2, 2, *DATA[2:]), 0, 0), block_cache(config).history(2)
    with torch.no_grad():
        for timestep, sigma, following in zip(timesteps, sigmas, sigmas[1:], strict=False):
            velocity = model(x, torch.full((2, 2), timestep), context, history=history).velocity
            x = x + (following - sigma) * velocity
    assert difference(video, x) < 1e-5


@torch.no_grad()
def test_guidance_moves_every_step_away_from_the_unconditional_twin() -> None:
    config, model = replace(CONFIGS, sampler="ode"), tiny_model()
    cond, uncond = prompt(2), prompt(2, seed=9)

    def guided(guidance: float, context: Tensor) -> Tensor:
        rows = len(context)
        noise = SampleNoise([(1, 2, "test", sample) for sample in range(2)] * (rows // 2))
        rollout = Rollout(
            config,
            RolloutPlan.full(config, 4),
            noise=noise,
            cache=block_cache(config),
            shape=(rows, *DATA[2:]),
        )
        return torch.cat(list(generate(model, rollout, context, guidance=guidance)), dim=1)

    both = torch.cat([cond, uncond])
    video = guided(1.5, both)
    assert torch.equal(video[:2], video[2:])
    # One step of one chunk by hand.
    single = replace(config, steps=(1000,))
    noise = keys(2).draw((2, 2, *DATA[2:]), 0, 0)
    history = block_cache(config).history(2)
    t = torch.full((2, 2), 1000.0)
    velocity = guide(*(model(noise, t, each, history=history).velocity for each in (cond, uncond)), 1.5)
    rollout = Rollout(
        single,
        RolloutPlan.full(single, 2),
        noise=SampleNoise([(1, 2, "test", sample) for sample in (0, 1, 0, 1)]),
        cache=block_cache(single),
        shape=(4, *DATA[2:]),
    )
    (chunk,) = generate(model, rollout, both, guidance=1.5)
    assert difference(chunk[:2], noise - velocity) < 1e-5
    assert difference(video[:2], guided(0.0, cond)) > 1e-2


def test_a_consistency_step_follows_the_teacher_and_ends_clean() -> None:
    """On a straight path with the right velocity every step lands on the path, and the last one on the
    data."""
    data, noise = normal(*DATA, seed=1), normal(*DATA, seed=2)
    sigma, following = torch.full((2, FRAMES), 0.75), torch.full((2, FRAMES), 0.5)
    following[:, 4:] = 0
    noisy = 0.25 * data + 0.75 * noise
    followed = euler_step(noisy, noise - data, sigma, following)
    assert torch.allclose(followed[:, :4], (0.5 * data + 0.5 * noise)[:, :4], atol=1e-6)
    assert torch.allclose(followed[:, 4:], data[:, 4:], atol=1e-6)
    guess = torch.zeros_like(data).requires_grad_()
    target = consistency_target(guess, followed, following)
    assert not target.requires_grad and target[:, :4].abs().max() == 0
    assert torch.equal(target[:, 4:], followed[:, 4:])


@pytest.mark.parametrize(
    "config", [CONFIGS, replace(CONFIGS, window=5, sink=1), replace(CONFIGS, positions="absolute")]
)
@torch.no_grad()
def test_writing_the_cache_anew_means_the_same_in_both_backings(config: RolloutConfig) -> None:
    def run_with(cache: BlockCache | SlotCache, *, again: bool) -> Tensor:
        model, context = tiny_model(), prompt(2)
        rollout = Rollout(
            config, RolloutPlan.full(config, 10), noise=keys(2), cache=cache, shape=(2, *DATA[2:])
        )
        chunks = []
        while (pending := rollout.pending) is not None:
            if isinstance(pending, NetworkCall):
                x, history = pending.x, pending.history
                timestep = torch.full(x.shape[:2], pending.timestep)
                velocity, live, *_ = model(x, timestep, context, history=history, return_live=True)
                rollout.send((velocity, live if pending.keeps_live else []))
            elif isinstance(pending, Tensor):
                chunks.append(pending)
                rollout.send()
            elif again and len(chunks) == 4:
                again, context = False, prompt(2, seed=9)
                rollout.reencode()
            else:
                rollout.send()
        return torch.cat(chunks, dim=1)

    plain, blocks = run_with(block_cache(config), again=False), run_with(block_cache(config), again=True)
    assert torch.equal(plain[:, :8], blocks[:, :8]) and difference(blocks[:, 8:], plain[:, 8:]) > 1e-3
    assert difference(run_with(slot_cache(config), again=True), blocks) < 1e-5
