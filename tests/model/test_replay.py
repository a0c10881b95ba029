"""The replayed gradient against the sequential one."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.replay import Tape, replay
from model.rollout import Rollout, generate
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.transformer import WanTransformer
from tests.model.reference import (
    CONFIG,
    HEIGHT,
    WIDTH,
    difference,
    gradient_difference,
    normal,
    prompt,
    tiny_model,
)
from tests.model.test_rollout import BATCH, SHAPES, backward, block_cache, frames_of, keys, name, run


def recorded(
    model: WanTransformer, config: RolloutConfig, plan: RolloutPlan, initial: Tensor | None = None
) -> tuple[Tensor, Tape]:
    """A rollout without a graph, and what it leaves."""
    rollout = Rollout(
        config,
        replace(plan, replayed=True),
        noise=keys(BATCH),
        cache=block_cache(config),
        shape=(BATCH, CONFIG.in_dim, HEIGHT, WIDTH),
        initial=initial,
    )
    chunks = list(generate(model, rollout, prompt(BATCH)))
    video = torch.cat(chunks if initial is None else [initial, *chunks], dim=1)
    assert not video.requires_grad
    return video, rollout.tape


@pytest.mark.parametrize("config", [*SHAPES, replace(SHAPES[1], first_steps=(1000, 900, 700))], ids=name)
@pytest.mark.parametrize("grad_frames", [12, 7])
@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replay_has_the_gradient_of_the_rollout(
    config: RolloutConfig, grad_frames: int, given: int, checkpointing: bool
) -> None:
    frames = frames_of(config) + given
    first = None if config.first_steps is None else 2
    plan = RolloutPlan(frames, len(config.steps) - 1, grad_frames=grad_frames, first_exit_step=first)
    initial = normal(BATCH, given, CONFIG.in_dim, HEIGHT, WIDTH, seed=11) if given else None
    sequential, model = tiny_model(), tiny_model(activation_checkpointing=checkpointing)
    expected = run(sequential, config, plan, initial=initial)
    video, tape = recorded(model, config, plan, initial)
    assert torch.equal(video, expected), "the rollout is the same, with a graph or without"
    again = replay(model, tape, prompt(BATCH), config.context_window())
    assert difference(again, video[:, -tape.frames :]) < 1e-5
    cotangent = normal(*video.shape, seed=3)
    (again * cotangent[:, -tape.frames :]).sum().backward()
    backward(sequential, expected)
    assert gradient_difference(model, sequential) < 2e-5


def test_chunks_of_one_replay_add_up_wherever_they_are_made() -> None:
    config, plan = SHAPES[1], RolloutPlan(12, 1, grad_frames=12)
    whole, parts = tiny_model(), tiny_model()
    _, tape = recorded(whole, config, plan)
    cotangent = normal(BATCH, 12, CONFIG.in_dim, HEIGHT, WIDTH, seed=3).split(3, dim=1)
    (replay(whole, tape, prompt(BATCH), config.context_window()) * torch.cat(cotangent, 1)).sum().backward()
    for chosen in ([0, 2], [3], [1]):
        own = replay(parts, tape, prompt(BATCH), config.context_window(), chosen=chosen)
        (own * torch.cat([cotangent[chunk] for chunk in chosen], dim=1)).sum().backward()
    assert gradient_difference(parts, whole) < 2e-5


def test_a_tape_holds_latents_and_an_endless_stream_leaves_none() -> None:
    config = SHAPES[1]
    video, tape = recorded(tiny_model(), config, RolloutPlan(12, 1, grad_frames=12))
    # The input of each exit, and all that was committed, which is all but the last chunk.
    assert tape.nbytes == video.nbytes + video[:, :9].nbytes
    rollout = Rollout(
        config,
        RolloutPlan.full(config, 12),
        noise=keys(BATCH),
        cache=block_cache(config),
        shape=(BATCH, CONFIG.in_dim, HEIGHT, WIDTH),
    )
    list(generate(tiny_model(), rollout, prompt(BATCH)))
    assert rollout.tape.nbytes == 0
