"""The three ways of one transformer against each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from model.kv_cache import BlockCache, Window
from model.transformer import EVERYTHING, TransformerConfig, WanTransformer
from tests.model import reference
from tests.model.reference import CONFIG, GRID, HEIGHT, WIDTH, difference, normal, prompt, tiny_model

FRAMES, CHUNK = 6, 2


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A noisy video, a timestep for each of its chunks, and a prompt."""
    x = normal(batch, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH, seed=1)
    timestep = torch.tensor([900.0, 500.0, 30.0]).repeat_interleave(CHUNK).expand(batch, -1)
    return x, timestep, prompt(batch)


def test_a_single_chunk_sees_every_frame() -> None:
    model, (x, timestep, context) = tiny_model(), inputs()
    assert torch.equal(
        model(x, timestep, context, chunk=FRAMES).velocity, model(x, timestep, context).velocity
    )
    assert (
        difference(model(x, timestep, context, chunk=CHUNK).velocity, model(x, timestep, context).velocity)
        > 1e-3
    )


def test_one_timestep_a_sample_is_that_timestep_in_every_frame() -> None:
    model, (x, _, context) = tiny_model(), inputs()
    timestep = torch.tensor([900.0, 30.0])
    by_frame = model(x, timestep[:, None].expand(-1, FRAMES), context).velocity
    assert difference(model(x, timestep, context).velocity, by_frame) < 1e-5


@torch.no_grad()
def test_a_prompt_encoded_once_is_the_prompt() -> None:
    model, (x, timestep, context) = tiny_model(), inputs()
    encoded = model.encode_context(context)
    assert torch.equal(model(x, timestep, encoded).velocity, model(x, timestep, context).velocity)


@pytest.mark.parametrize(
    "window",
    [
        EVERYTHING,
        Window(None, 0, "relative"),
        Window(4, 0, "absolute"),
        Window(5, 1, "absolute"),
        Window(4, 1, "relative"),
        Window(2, 0, "relative"),
    ],
    ids=lambda window: f"{window.frames}-{window.sink}-{window.positions}",
)
@torch.no_grad()
def test_cached_chunks_repeat_the_block_causal_pass(window: Window) -> None:
    """Chunk by chunk, committed as noisy as they are, is the whole sequence at once, window and all."""
    model, (x, timestep, context) = tiny_model(), inputs()
    cache = BlockCache(window, GRID, CONFIG.head_dim)
    chunks = []
    for x_chunk, t_chunk in zip(x.split(CHUNK, 1), timestep.split(CHUNK, 1), strict=True):
        velocity, live, *_ = model(x_chunk, t_chunk, context, history=cache.history(CHUNK), return_live=True)
        cache.commit(live, CHUNK)
        chunks.append(velocity)
    whole = model(x, timestep, context, chunk=CHUNK, window=window).velocity
    assert difference(torch.cat(chunks, 1), whole) < 1e-5
    # With absolute or relative positions alike, only a window that drops frames changes anything.
    changes = window.frames is not None and window.frames < FRAMES
    assert (difference(whole, model(x, timestep, context, chunk=CHUNK).velocity) > 1e-3) == changes


@torch.no_grad()
def test_a_chunk_is_what_a_naive_transformer_computes() -> None:
    model, (x, _, context) = tiny_model(), inputs()
    expected, _ = reference.call(
        model, x, 640.0, context, positions=list(range(FRAMES)), past=[], past_positions=[]
    )
    assert difference(model(x, torch.full((2,), 640.0), context).velocity, expected) < 1e-5


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_later_chunks_cannot_be_seen(chunk: int) -> None:
    model, (x, timestep, context) = tiny_model(), inputs()
    changed = x.clone()
    changed[:, 3:] += 1
    before = 3 // chunk * chunk
    one, two = (model(video, timestep, context, chunk=chunk).velocity for video in (x, changed))
    assert torch.equal(one[:, :before], two[:, :before])
    # Every frame from the changed chunk on looks at it.
    assert ((one - two).abs().amax((0, 2, 3, 4))[before:] > 1e-4).all()


@pytest.mark.parametrize("clean", [False, True])
def test_checkpointing_changes_no_number(clean: bool) -> None:
    outputs = []
    for checkpointing in (False, True):
        model, (x, timestep, context) = tiny_model(activation_checkpointing=checkpointing), inputs()
        velocity, _, (hidden,), _ = model(
            x, timestep, context, chunk=CHUNK, clean=normal(*x.shape) if clean else None, taps=(0,)
        )
        (velocity.square().sum() + hidden.square().sum()).backward()
        outputs.append((velocity, hidden, [parameter.grad for parameter in model.parameters()]))
    (velocity, hidden, gradients), (again, hidden_again, gradients_again) = outputs
    assert torch.equal(velocity, again) and torch.equal(hidden, hidden_again)
    assert all(torch.equal(one, two) for one, two in zip(gradients, gradients_again, strict=True))


@torch.no_grad()
def test_tapped_blocks_show_their_hidden_states_in_the_same_forward() -> None:
    model, (x, _, context) = tiny_model(), inputs()
    timestep, seen, embedded = torch.tensor([900.0, 30.0]), [], []
    for block in model.blocks:
        block.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    model.time_embedding.register_forward_hook(lambda module, args, out: embedded.append(out))
    velocity, _, hidden, time = model(x, timestep, context, taps=(1, 0))
    assert len(seen) == CONFIG.num_layers
    assert torch.equal(hidden[0], seen[1]) and torch.equal(hidden[1], seen[0])
    assert torch.equal(time[:, 0], embedded[0])
    assert torch.equal(velocity, model(x, timestep, context).velocity)


def test_bfloat16_runs_and_is_close() -> None:
    model, (x, timestep, context) = tiny_model(), inputs()
    exact = model(x, timestep, context, chunk=CHUNK).velocity
    half = tiny_model().bfloat16()
    velocity = half(x, timestep, context, chunk=CHUNK).velocity
    assert velocity.dtype == torch.bfloat16
    assert difference(velocity.float(), exact) < 0.03
    velocity.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in half.parameters())


def test_names_and_sizes_are_those_of_the_release() -> None:
    """Wan 2.1 T2V 1.3B: the published number of weights, under the published names."""
    config = TransformerConfig(
        dim=1536,
        ffn_dim=8960,
        num_heads=12,
        num_layers=30,
        in_dim=16,
        out_dim=16,
        text_len=512,
        text_dim=4096,
        freq_dim=256,
    )
    assert config.parameters() == 1_418_996_800
    names = {name.replace("blocks.1.", "blocks.0.") for name, _ in tiny_model().named_parameters()}
    attention = [f"{kind}.{part}" for kind in ("q", "k", "v", "o") for part in ("weight", "bias")]
    attention += ["norm_q.weight", "norm_k.weight"]
    linear = [f"{position}.{part}" for position in (0, 2) for part in ("weight", "bias")]
    assert names == {
        "patch_embedding.weight",
        "patch_embedding.bias",
        "time_projection.1.weight",
        "time_projection.1.bias",
        "head.head.weight",
        "head.head.bias",
        "head.modulation",
        "blocks.0.modulation",
        "blocks.0.norm3.weight",
        "blocks.0.norm3.bias",
        *(f"{embedding}.{part}" for embedding in ("text_embedding", "time_embedding") for part in linear),
        *(f"blocks.0.ffn.{part}" for part in linear),
        *(f"blocks.0.{kind}.{part}" for kind in ("self_attn", "cross_attn") for part in attention),
    }


def test_a_fresh_model_predicts_nothing_yet() -> None:
    velocity = WanTransformer(CONFIG)(*inputs()).velocity
    assert velocity.shape == (2, FRAMES, CONFIG.out_dim, HEIGHT, WIDTH)
    assert not velocity.any()


def test_norms_can_be_left_out() -> None:
    model = WanTransformer(replace(CONFIG, qk_norm=False, cross_attn_norm=False))
    assert not any("norm" in name for name, _ in model.named_parameters())
    model(*inputs()).velocity.sum().backward()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"dim": 24, "num_heads": 5}, ["dim 24", "num_heads"]),
        ({"dim": 12, "num_heads": 4}, ["dim 12", "num_heads"]),
        ({"num_heads": 0}, ["num_heads"]),
        ({"freq_dim": 63}, ["freq_dim 63", "even"]),
        ({"patch_size": (2, 2, 2)}, ["patch_size", "(2, 2, 2)"]),
    ],
)
def test_a_bad_setting_is_one_sentence(settings: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as problem:
        TransformerConfig(**settings)
    assert all(word in str(problem.value) for word in words)
    assert "\n" not in str(problem.value)


def test_sizes_that_do_not_divide_are_refused() -> None:
    model, (x, timestep, context) = tiny_model(), inputs()
    with pytest.raises(ValueError, match="chunk of 4 frames does not divide 6 frames"):
        model(x, timestep, context, chunk=4)
    with pytest.raises(ValueError, match=r"patch_size \(1, 2, 2\) does not divide latent frames of 5x4"):
        CONFIG.grid(5, 4)
