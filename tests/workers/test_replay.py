"""A replay shared out over ranks, chunk by chunk, against the golden gradients."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from model.replay import replay
from model.rollout import generate
from tests import golden
from tests.workers.ranks import call

pytestmark = pytest.mark.slow
DATA = Path(__file__).parents[1] / "golden_data"


def worst_error(rank: int, ranks: int, path: str) -> float:
    """Of any weight's gradient, after each rank has replayed its share of the chunks."""
    tensors, meta = golden.read(Path(path))
    model, config, rollout = golden.rollout_of(tensors, meta, "replayed")
    list(generate(model, rollout, tensors["context"]))
    tape = rollout.tape
    parts = tensors["cotangent"][:, -tape.frames :].split(config.chunk, dim=1)
    chosen = range(rank, len(tape.exits), ranks)
    own = replay(model, tape, tensors["context"], config.context_window(), chosen=chosen)
    (own * torch.cat([parts[index] for index in chosen], dim=1)).sum().backward()
    errors = []
    expected = golden.select(tensors, "grad_detached.")
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        dist.all_reduce(gradient)
        errors.append(golden.error(gradient, expected.pop(name)))
    assert not expected
    return max(errors)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", ["rollout_chunk", "rollout_image", "rollout_long"])
def test_ranks_that_share_the_chunks_have_the_golden_gradient(
    ranks: dict[int, list], size: int, name: str
) -> None:
    found = call(ranks[size], worst_error, str(DATA / f"{name}.safetensors"))
    assert len(found) == size and max(found) < 1e-4
