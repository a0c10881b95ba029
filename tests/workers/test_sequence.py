"""A forward that two ranks share, against that of one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from model.backbone import Past
from model.kv_cache import Window
from model.sequence import SequenceGroup
from tests.model.reference import CONFIG, HEIGHT, WIDTH, difference, normal, prompt, tiny_model
from tests.workers.ranks import call

pytestmark = pytest.mark.slow
BATCH, FRAMES, CHUNK = 2, 6, 2
ROLLING = Window(4, 1, "relative")


def latents(frames: int, seed: int) -> Tensor:
    return normal(BATCH, frames, CONFIG.in_dim, HEIGHT, WIDTH, seed=seed)


def ways() -> dict[str, dict[str, Any]]:
    """What a teacher, a critic with a branch, a causal student under teacher forcing and a replay ask for."""
    return {
        "bidirectional": {},
        "tapped": {"taps": (0, 1)},
        "causal": {"chunk": CHUNK},
        "rolling": {"chunk": CHUNK, "window": ROLLING},
        "teacher forced": {"chunk": CHUNK, "clean": latents(FRAMES, 5)},
        "replayed": {"past": Past(latents(7, 6), (1, 2, 2, 2, 2), (2, 3, 4))},
        "replayed, rolling": {"past": Past(latents(7, 6), (1, 2, 2, 2, 2), (2, 3, 4)), "window": ROLLING},
    }


def answered(how: dict[str, Any], *, checkpointing: bool, sequence: SequenceGroup | None) -> list[Tensor]:
    """Velocity and tapped states, and gradients of the video and of every weight."""
    torch.set_num_threads(1)
    model = tiny_model(activation_checkpointing=checkpointing)
    model.sequence = sequence
    x = latents(FRAMES, 1).requires_grad_()
    timestep = torch.tensor([900.0, 500.0, 30.0]).repeat_interleave(CHUNK).expand(BATCH, -1)
    output = model(x, timestep, prompt(BATCH), **how)
    values = [output.velocity, *output.hidden]
    sum((value * normal(*value.shape, seed=9)).sum() for value in values).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if sequence is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
            gradient /= sequence.ranks
    return [each.detach() for each in (*values, x.grad, *gradients)]


def worst(rank: int, ranks: int, name: str, checkpointing: bool) -> float:
    how, sequence = ways()[name], SequenceGroup(dist.group.WORLD)
    assert (sequence.rank, sequence.ranks) == (rank, ranks)
    found = answered(how, checkpointing=checkpointing, sequence=sequence)
    expected = answered(how, checkpointing=checkpointing, sequence=None)
    return max(difference(one, two) for one, two in zip(found, expected, strict=True))


def refused(rank: int, ranks: int) -> str:
    model = tiny_model()
    model.sequence = SequenceGroup(dist.group.WORLD)
    try:
        model(latents(FRAMES, 1)[..., :2, :2], torch.zeros(1), prompt(BATCH))
    except ValueError as error:
        return str(error)
    return ""


def test_two_ranks_share_every_kind_of_forward_and_its_gradient(ranks: dict[int, list]) -> None:
    for name in ways():
        for checkpointing in (False, True):
            assert max(call(ranks[2], worst, name, checkpointing)) < 1e-5, name
    assert call(ranks[2], refused) == ["2 ranks do not divide the 1 tokens of a frame."] * 2
