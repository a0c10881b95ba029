"""The arithmetic of memory, against tensors that are counted."""

import re
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from model.families import new_backbone
from model.kv_cache import BlockCache, Window
from model.transformer import TransformerConfig
from orchestrator.planner import GIB, alternatives, keys_and_values, learned, plan, saved_for_backward
from pipelines import cli
from pipelines.recipe import RECIPES
from tests.fixtures import TINY_RECIPE, random_weights

PAGE = Path(__file__).parents[2] / "docs" / "wan.md"


def sizes_of(dim: int, ffn: int, heads: int, layers: int) -> TransformerConfig:
    return TransformerConfig(
        dim=dim, ffn_dim=ffn, num_heads=heads, num_layers=layers, text_len=6, text_dim=16
    )


def bytes_saved(sizes: TransformerConfig, frames: int, *, checkpointing: bool) -> tuple[int, int]:
    """Bytes of all storages that a forward keeps for its backward pass, weights apart; and its tokens."""
    network = new_backbone(sizes, activation_checkpointing=checkpointing)
    network.load_state_dict(random_weights(sizes, 1))
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # alive, so that no other storage takes its place
        return tensor

    x, context = torch.randn(1, frames, 4, 16, 16), torch.randn(1, sizes.text_len, sizes.text_dim)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        network(x, torch.full((1, frames), 500.0), context)
    return sum(each.untyped_storage().nbytes() for each in kept.values()), frames * 64


@pytest.mark.parametrize("sizes", [(96, 384, 4, 3), (96, 560, 4, 6), (192, 768, 2, 4)], ids=str)
@pytest.mark.parametrize("frames", [3, 9])
def test_what_a_forward_keeps_is_what_is_counted(sizes: tuple[int, int, int, int], frames: int) -> None:
    config = sizes_of(*sizes)
    found, tokens = bytes_saved(config, frames, checkpointing=False)
    assert saved_for_backward(config, tokens, 4, checkpointing=False) == pytest.approx(found, rel=0.1)
    inputs, _ = bytes_saved(config, frames, checkpointing=True)
    (one, _), (two, _) = (
        bytes_saved(sizes_of(*sizes[:3], layers), frames, checkpointing=False) for layers in (1, 2)
    )
    at_most = saved_for_backward(config, tokens, 4, checkpointing=True)
    assert at_most == pytest.approx(inputs + two - one, rel=0.1)


def test_the_cache_is_as_large_as_it_is_said_to_be() -> None:
    sizes = sizes_of(48, 96, 4, 3)
    cache = BlockCache(Window(None, 0, "absolute"), sizes.grid(8, 8), sizes.head_dim, "cpu")
    network = new_backbone(sizes)
    for _ in range(3):
        _, live, *_ = network(
            torch.randn(2, 2, 4, 8, 8), torch.zeros(2, 2), torch.randn(2, 6, 16),
            history=cache.history(2), return_live=True,
        )  # fmt: skip
        cache.commit([(key.detach(), value.detach()) for key, value in live], 2)
    held = sum(tensor.nbytes for block in cache._blocks for pair in block.layers for tensor in pair)
    assert held == keys_and_values(sizes, 2 * 6 * 16, 4)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("wan-*.yaml")))
def test_every_recipe_fits_its_gpus(recipe: str) -> None:
    config = cli.parse("distill", [recipe])[0]
    ranks = plan(config)
    assert {rank.role for rank in ranks} >= {"student", "critic"}
    if recipe == "wan-1.3b-lora":  # all on one
        assert learned(config.student, config.distill.roles.student.adapters) == 87_490_560
        assert sum(rank.total for rank in ranks) / GIB < 60
    assert all(rank.total / GIB < 72 for rank in ranks), [(r.role, r.total / GIB, r.parts) for r in ranks]


def test_the_table_of_the_page_is_what_the_command_says(capsys: pytest.CaptureFixture[str]) -> None:
    page = PAGE.read_text()
    for recipe in ("wan-1.3b-dmd-14b", "wan-1.3b-lora"):
        for rank in plan(cli.parse("distill", [recipe])[0]):
            row = re.search(rf"^\| `{recipe}` \| {rank.role} \|.*\| ([\d.]+) \|$", page, re.M)
            assert row and float(row[1]) == pytest.approx(rank.total / GIB, abs=0.051), (recipe, rank)
    assert cli.main(["plan", str(TINY_RECIPE)]) == 0
    said = capsys.readouterr().out
    assert all(role in said for role in ("student", "teacher", "critic")) and "in all" in said


def test_replicas_hold_weights_and_caches_and_the_student_a_replay() -> None:
    more = ["--distill.replay=true", "--distill.roles.rollout.ranks=8", "--distill.roles.rollout.dtype=bf16"]
    plain, replayed = (
        {rank.role: rank for rank in plan(cli.parse("distill", ["wan-1.3b-dmd-14b", *words])[0])}
        for words in ([], more)
    )
    assert set(replayed) == {*plain, "rollout"}
    assert replayed["rollout"].parts["weights"] == 2 * 1_418_996_800
    assert replayed["student"].parts["cache"] == 0 < plain["student"].parts["cache"]
    # One forward over all chunks keeps what the calls of each did, and the keys and values of clean frames.
    ratio = replayed["student"].parts["activations"] / plain["student"].parts["activations"]
    assert 1 < ratio < 2.2


def test_what_a_recipe_leaves_out_is_said_with_what_it_would_take() -> None:
    def said(*words: str) -> list[str]:
        given = [f"--distill.{word}" for word in words]
        return alternatives(cli.parse("distill", ["wan-1.3b-dmd-14b", *given])[0])

    recomputed, plain = said(), said("roles.student.activation_checkpointing=false")
    assert len(recomputed) == len(plain) == 1
    # By counting: (2 + 3) of (4 + 1 + 3) forwards where they are recomputed, else (2 + 2) of (4 + 1 + 2).
    assert "takes 0.62 of the forwards at the last exit step and 0.77 at the mean one" in recomputed[0]
    assert "takes 0.57 of the forwards at the last exit step and 0.73 at the mean one" in plain[0]
    assert "a replica in bf16 2.6 GiB of weights" in plain[0]
    gather, _ = said("roles.student.engine.zero_stage=3", "roles.student.ranks=8")
    # Seven chunks of four steps and a commit, and seven eighths of 1.42 billion numbers of two bytes.
    assert (
        "holds 2.6 GiB more while it rolls out, and receives 2.5 GB of weights a rollout in place of 87"
        in (gather)
    )
    assert said("replay=true") == []
    assert said("cache_gradient=released") == []
