"""The rollout against a naive one, its gradient, and what every user of it relies on."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from model import rope
from model.kv_cache import BlockCache, SlotCache
from model.noise import SampleNoise
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.transformer import WanTransformer
from tests.model import reference
from tests.model.reference import CONFIG, GRID, HEIGHT, TOKENS, WIDTH, normal, prompt, tiny_model

BATCH = 2
TWO_STEPS = (1000.0, 500.0)
# All frames; rolling windows, with a sink or not, of whole chunks or not; a chunk that sees only itself.
SHAPES = [
    RolloutConfig(steps=TWO_STEPS, chunk=3),
    RolloutConfig(steps=TWO_STEPS, chunk=3, window=7, sink=2),
    RolloutConfig(steps=TWO_STEPS, chunk=3, window=6, positions="relative"),
    RolloutConfig(steps=TWO_STEPS, chunk=2, window=7, sink=1, positions="relative"),
    RolloutConfig(steps=TWO_STEPS, chunk=1, window=4, sink=1, positions="relative"),
    RolloutConfig(steps=(1000, 750, 500), chunk=1, window=5, context_noise="none"),
    RolloutConfig(steps=TWO_STEPS, chunk=3, window=3),
]


def name(config: RolloutConfig) -> str:
    return f"chunk{config.chunk}-window{config.window}-sink{config.sink}-{config.positions}"


def frames_of(config: RolloutConfig) -> int:
    return 12 if config.chunk > 1 else 7


def block_cache(config: RolloutConfig) -> BlockCache:
    return BlockCache(config.context_window(), GRID, CONFIG.head_dim)


def slot_cache(config: RolloutConfig, *, rows: int = BATCH, frames: int = 12) -> SlotCache:
    return SlotCache(
        config.context_window(),
        GRID,
        layers=CONFIG.num_layers,
        heads=CONFIG.num_heads,
        head_dim=CONFIG.head_dim,
        rows=rows,
        chunk=config.chunk,
        capacity=frames,
    )


def keys(batch: int) -> SampleNoise:
    return SampleNoise([(1, 2, "test", sample) for sample in range(batch)])


def run(
    model: WanTransformer,
    config: RolloutConfig,
    plan: RolloutPlan,
    cache: BlockCache | SlotCache | None = None,
    *,
    context: Tensor | None = None,
    noise: SampleNoise | None = None,
    initial: Tensor | None = None,
    **how: Any,
) -> Tensor:
    context = prompt(BATCH) if context is None else context
    rollout = Rollout(
        config,
        plan,
        noise=noise or keys(len(context)),
        cache=cache or block_cache(config),
        shape=(len(context), CONFIG.in_dim, HEIGHT, WIDTH),
        initial=initial,
    )
    chunks = list(generate(model, rollout, context, **how))
    return torch.cat(chunks if initial is None else [initial, *chunks], dim=1)


def backward(model: WanTransformer, video: Tensor) -> None:
    (video * normal(*video.shape, seed=3)).sum().backward()


def trained(config: RolloutConfig, *, checkpointing: bool = False, **changes: Any) -> WanTransformer:
    """A model with the gradient of a rollout over the whole video."""
    model = tiny_model(activation_checkpointing=checkpointing)
    plan = RolloutPlan(frames_of(config), len(config.steps) - 1, grad_frames=frames_of(config))
    backward(model, run(model, config, replace(plan, **changes)))
    return model


@pytest.mark.parametrize("config", SHAPES, ids=name)
@pytest.mark.parametrize("cache_gradient", ["constant", "released"])
def test_video_and_gradient_equal_the_naive_rollout(config: RolloutConfig, cache_gradient: str) -> None:
    frames = frames_of(config)
    plan = RolloutPlan(frames, len(config.steps) - 1, grad_frames=frames, cache_gradient=cache_gradient)
    naive, context = tiny_model(), prompt(BATCH)
    expected = reference.rollout(naive, config, plan, context=context, noise=keys(BATCH)).video
    backward(naive, expected)
    for checkpointing in (False, True):
        model = tiny_model(activation_checkpointing=checkpointing)
        video = run(model, config, plan)
        assert reference.difference(video, expected) < 1e-5
        backward(model, video)
        assert reference.gradient_difference(model, naive) < 2e-5


@pytest.mark.parametrize("config", SHAPES, ids=name)
def test_released_gradient_differs_from_the_constant_one_where_there_is_history(
    config: RolloutConfig,
) -> None:
    apart = reference.gradient_difference(trained(config, cache_gradient="released"), trained(config))
    if config.window == config.chunk:
        assert apart == 0
    else:
        assert apart > 1e-3


@pytest.mark.parametrize("cache_gradient", ["constant", "released"])
@pytest.mark.parametrize("grad_frames", [7, 6])
def test_gradient_window_leaves_out_chunks_that_start_before_it(
    cache_gradient: str, grad_frames: int
) -> None:
    config = SHAPES[1]
    plan = RolloutPlan(12, 1, grad_frames=grad_frames, cache_gradient=cache_gradient)
    model, naive = tiny_model(), tiny_model()
    video = run(model, config, plan)
    expected = reference.rollout(naive, config, plan, context=prompt(BATCH), noise=keys(BATCH)).video
    backward(model, video)
    backward(naive, expected)
    assert reference.gradient_difference(model, naive) < 2e-5
    # A window of 7 frames starts within the second chunk, so both windows hold the last two chunks.
    last_six = tiny_model()
    backward(last_six, run(last_six, config, replace(plan, grad_frames=6)))
    assert reference.gradient_difference(model, last_six) == 0


@pytest.mark.parametrize("config", [SHAPES[0], SHAPES[1], SHAPES[2], SHAPES[5]], ids=name)
def test_initial_latent_starts_the_video(config: RolloutConfig) -> None:
    initial = normal(BATCH, 1, CONFIG.in_dim, HEIGHT, WIDTH, seed=11)
    plan = RolloutPlan(13, 1, grad_frames=13)
    model, naive = tiny_model(), tiny_model()
    video = run(model, config, plan, initial=initial)
    expected = reference.rollout(
        naive, config, plan, context=prompt(BATCH), noise=keys(BATCH), initial=initial
    ).video
    assert torch.equal(video[:, :1], initial)
    assert reference.difference(video, expected) < 1e-5
    backward(model, video)
    backward(naive, expected)
    assert reference.gradient_difference(model, naive) < 2e-5
    served = run(model, config, replace(plan, grad_frames=0), slot_cache(config, frames=13), initial=initial)
    assert torch.equal(served, video)


@pytest.mark.parametrize("config", SHAPES, ids=name)
def test_trained_and_served_rollouts_are_equal_to_the_bit(config: RolloutConfig) -> None:
    model, frames = tiny_model(), frames_of(config)
    plan = RolloutPlan(frames, len(config.steps) - 1, grad_frames=frames)
    video = run(model, config, plan)
    assert video.requires_grad
    served = replace(plan, grad_frames=0)
    for cache in (slot_cache(config), block_cache(config)):
        assert torch.equal(run(model, config, served, cache), video)
    with torch.inference_mode():
        assert torch.equal(run(model, config, served, slot_cache(config)), video)
    assert torch.equal(run(tiny_model(activation_checkpointing=True), config, plan), video)


def test_inference_mode_leaves_training_possible() -> None:
    """Phases are kept from call to call: one first asked for in inference mode must serve a graph later."""
    with torch.inference_mode():
        phase = rope.phases([[123_456]], *GRID, CONFIG.head_dim, torch.device("cpu"))
    x = normal(1, TOKENS, CONFIG.num_heads, CONFIG.head_dim).requires_grad_()
    rope.rotate(x, phase).sum().backward()
    # A rotation keeps lengths, so pulling a vector of ones back turns it and changes no norm.
    assert x.grad.norm().item() == pytest.approx(x.numel() ** 0.5, rel=1e-5)


def saved_bytes(work: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that the graph of `work` keeps for its backward pass."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = work()
    assert result.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize("cache_gradient", ["constant", "released"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_saved_bytes_do_not_grow_with_the_denoising_steps(cache_gradient: str, checkpointing: bool) -> None:
    def measure(steps: int) -> int:
        config = replace(SHAPES[1], steps=tuple(1000 - 1000 * step / steps for step in range(steps)))
        plan = RolloutPlan(12, steps - 1, grad_frames=12, cache_gradient=cache_gradient)
        model = tiny_model(activation_checkpointing=checkpointing)
        return saved_bytes(lambda: run(model, config, plan))

    few = measure(2)
    assert few == measure(8)
    half = saved_bytes(
        lambda: run(
            tiny_model(activation_checkpointing=checkpointing), SHAPES[1], RolloutPlan(12, 1, grad_frames=6)
        )
    )
    assert half < few, "the measure itself must notice a smaller graph"


def test_one_draw_decides_what_a_sample_is() -> None:
    """A sample is the same in any batch, so it does not matter how samples are split over ranks."""
    model, config = tiny_model(), SHAPES[1]
    plan, context = RolloutPlan(12, 1), prompt(4)
    samples = [(1, 2, "test", sample) for sample in range(4)]

    def part(rows: list[int]) -> Tensor:
        noise = SampleNoise([samples[row] for row in rows])
        return run(model, config, plan, context=context[rows], noise=noise)

    whole = part([0, 1, 2, 3])
    for rows in ([0, 1], [2, 3], [3, 1, 0], [2]):
        assert reference.difference(part(rows), whole[rows]) < 1e-5
    assert reference.difference(whole[[0]], whole[[1]]) > 0.1


def test_steps_after_the_exit_do_not_matter_and_steps_before_it_do() -> None:
    model, plan = tiny_model(), RolloutPlan(6, 1)
    video = run(model, RolloutConfig(steps=(1000, 750, 500, 250)), plan)
    assert torch.equal(run(model, RolloutConfig(steps=(1000, 750)), plan), video)
    assert not torch.equal(run(model, RolloutConfig(steps=(900, 750)), plan), video)


def test_later_chunks_do_not_change_earlier_ones() -> None:
    """A short rollout is the beginning of a long one."""
    model, config = tiny_model(), SHAPES[1]
    long = run(model, config, RolloutPlan(12, 1))
    assert torch.equal(run(model, config, RolloutPlan(6, 1)), long[:, :6])


def test_calls_are_the_published_ones() -> None:
    """Denoise, exit with a gradient, commit without; the last chunk needs no commit, no input has a graph."""
    with reference.calls_recorded() as calls:
        video = run(tiny_model(), SHAPES[0], RolloutPlan(6, 1, grad_frames=6))
    assert video.shape == (BATCH, 6, CONFIG.in_dim, HEIGHT, WIDTH)
    warped = 5000 / 6  # 500 at shift 5
    assert [call.timestep for call in calls] == pytest.approx([1000, warped, 0, 1000, warped])
    assert [call.gradient for call in calls] == [False, True, False, False, True]
    assert not any(call.x.requires_grad for call in calls)


def test_plans_are_drawn_from_their_key_and_cover_every_exit() -> None:
    config = RolloutConfig()

    def draw(update: int, purpose: str = "student", seed: int = 3) -> RolloutPlan:
        return RolloutPlan.draw(config, 21, seed=seed, update=update, purpose=purpose, grad_frames=21)

    plans = [draw(update) for update in range(40)]
    assert plans == [draw(update) for update in range(40)]
    assert {plan.exit_step for plan in plans} == set(range(len(config.steps)))
    assert plans[0].noise == (3, 0, "student") and plans[0].grad_frames == 21
    for other in ([draw(u, "critic") for u in range(40)], [draw(u, seed=4) for u in range(40)]):
        assert [plan.exit_step for plan in other] != [plan.exit_step for plan in plans]
    assert RolloutPlan.full(config, 21, seed=3).exit_step == len(config.steps) - 1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"chunk": 0}, ["chunk ", "at least 1"]),
        ({"shift": 0.0}, ["shift ", "positive"]),
        ({"steps": ()}, ["steps ", "[1000, 750, 500, 250]"]),
        ({"steps": (250, 500)}, ["steps ", "fall"]),
        ({"steps": (1000, 1000)}, ["steps ", "fall"]),
        ({"steps": (1000, 0)}, ["steps ", "(0, 1000]"]),
        ({"steps": (1001,)}, ["steps ", "(0, 1000]"]),
        ({"sink": -1}, ["sink ", "at least 0"]),
        ({"window": 5, "chunk": 3, "sink": 3}, ["window ", "at least 6"]),
    ],
)
def test_a_bad_setting_is_one_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as problem:
        RolloutConfig(**settings)
    message = str(problem.value)
    assert all(word in message for word in words)
    assert "\n" not in message and message.endswith(".")


def test_a_bad_plan_is_one_sentence() -> None:
    model, config = tiny_model(), RolloutConfig(steps=TWO_STEPS, chunk=3, window=3)
    with pytest.raises(ValueError, match=r"rollout.chunk of 3 does not divide 8 frames; use 6 frames"):
        run(model, config, RolloutPlan(8, 1))
    with pytest.raises(ValueError, match=r"exit_step 2 is beyond the 2 rollout.steps"):
        run(model, config, RolloutPlan(9, 2))
    with pytest.raises(ValueError, match=r"4 frames does not fit rollout.window of 3"):
        run(model, config, RolloutPlan(7, 1), initial=normal(BATCH, 4, CONFIG.in_dim, HEIGHT, WIDTH))


def test_released_gradients_cannot_be_kept_in_slots() -> None:
    config = SHAPES[0]
    plan = RolloutPlan(6, 1, grad_frames=6, cache_gradient="released")
    with pytest.raises(RuntimeError, match="BlockCache"):
        run(tiny_model(), config, plan, slot_cache(config))
