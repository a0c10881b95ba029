"""A second, naive rollout to test the product's against, and the tiny model that both run.

It shares no code with `model/` but the module that holds the weights: rotary phases are complex numbers,
attention is a plain softmax, and the cache is a list with one entry a frame whose keys are rotated whenever
they are read.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from model import rollout as rollout_module
from model.backbone import Output
from model.noise import SampleNoise
from model.rollout import NetworkCall
from model.rollout_plan import RolloutConfig, RolloutPlan
from model.transformer import TransformerConfig, WanTransformer

# Operations this small only get slower when threads share them.
torch.set_num_threads(1)

CONFIG = TransformerConfig(
    dim=24,
    ffn_dim=32,
    num_heads=2,
    num_layers=2,
    in_dim=2,
    out_dim=2,
    text_len=3,
    text_dim=8,
    freq_dim=16,
)
HEIGHT = WIDTH = 4
GRID = CONFIG.grid(HEIGHT, WIDTH)
TOKENS = GRID[0] * GRID[1]


def tiny_model(*, activation_checkpointing: bool = False, seed: int = 0) -> WanTransformer:
    """A model whose weights are all random: a fresh one has a zero head."""
    model = WanTransformer(CONFIG, activation_checkpointing=activation_checkpointing)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
    return model


@contextmanager
def calls_recorded() -> Iterator[list[NetworkCall]]:
    """Inside the block, the network calls that rollouts ask for, in order."""
    calls: list[NetworkCall] = []
    original = rollout_module.answering

    def answering(*arguments: Any, **how: Any) -> Callable[[NetworkCall], Output]:
        answer = original(*arguments, **how)
        return lambda call: (calls.append(call), answer(call))[1]

    with mock.patch.object(rollout_module, "answering", answering):
        yield calls


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(batch: int, seed: int = 7) -> Tensor:
    return normal(batch, CONFIG.text_len, CONFIG.text_dim, seed=seed)


def difference(ours: Tensor, reference: Tensor) -> float:
    """Relative error."""
    return ((ours - reference).norm() / reference.norm()).item()


def gradient_difference(model: WanTransformer, reference: WanTransformer) -> float:
    """Relative error over all weights as one vector; every weight must have a gradient."""
    ours, theirs = (torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, reference))
    return difference(ours, theirs)


FrameCache = list[tuple[Tensor, Tensor]]
"""Unrotated keys and values of one frame, a pair a layer."""


def _rotate(x: Tensor, frames: list[int]) -> Tensor:
    """`x` [B, len(frames) · tokens, heads, d], in the order frame, row, column."""
    head_dim = x.shape[-1]
    spatial = head_dim // 6 * 2
    angles = []
    for frame in frames:
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                angles.append(
                    [
                        position / 10000 ** (channel / channels)
                        for position, channels in (
                            (frame, head_dim - 2 * spatial),
                            (row, spatial),
                            (column, spatial),
                        )
                        for channel in range(0, channels, 2)
                    ]
                )
    turn = torch.exp(1j * torch.tensor(angles, dtype=torch.double)).to(torch.complex64)
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
    return torch.view_as_real(pairs * turn[:, None]).flatten(-2)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k / q.shape[-1] ** 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)


def _norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + CONFIG.eps).sqrt()


def _heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (CONFIG.num_heads, -1))


def call(
    model: WanTransformer,
    x: Tensor,
    timestep: float,
    context: Tensor,
    *,
    positions: list[int],
    past: list[FrameCache],
    past_positions: list[int],
) -> tuple[Tensor, list[FrameCache]]:
    """Velocity of a chunk against `past` frames, and the chunk's own frames for a cache."""
    batch, frames = x.shape[:2]
    patches = x.unfold(3, 2, 2).unfold(4, 2, 2)  # [B, F, C, rows, columns, 2, 2]
    patches = patches.permute(0, 1, 3, 4, 2, 5, 6).reshape(batch, frames * TOKENS, -1)
    tokens = patches @ model.patch_embedding.weight.flatten(1).T + model.patch_embedding.bias
    angle = timestep * 10000.0 ** -(
        torch.arange(CONFIG.freq_dim // 2, dtype=torch.double) * 2 / CONFIG.freq_dim
    )
    embedded = model.time_embedding(torch.cat([angle.cos(), angle.sin()]).float())
    time = model.time_projection(embedded).unflatten(-1, (6, -1))
    context = model.text_embedding(context)
    live: list[FrameCache] = [[] for _ in range(frames)]
    for layer, block in enumerate(model.blocks):
        shift1, scale1, gate1, shift2, scale2, gate2 = block.modulation[0] + time
        self_attn, cross_attn = block.self_attn, block.cross_attn
        y = _norm(tokens) * (1 + scale1) + shift1
        q, k, v = self_attn.norm_q(self_attn.q(y)), self_attn.norm_k(self_attn.k(y)), self_attn.v(y)
        q, k, v = _heads(q), _heads(k), _heads(v)
        for frame in range(frames):
            span = slice(frame * TOKENS, (frame + 1) * TOKENS)
            live[frame].append((k[:, span], v[:, span]))
        keys = torch.cat([frame[layer][0] for frame in past] + [k], 1)
        values = torch.cat([frame[layer][1] for frame in past] + [v], 1)
        seen = _attention(_rotate(q, positions), _rotate(keys, past_positions + positions), values)
        tokens = tokens + self_attn.o(seen) * gate1
        y = block.norm3(tokens)
        q = _heads(cross_attn.norm_q(cross_attn.q(y)))
        k = _heads(cross_attn.norm_k(cross_attn.k(context)))
        tokens = tokens + cross_attn.o(_attention(q, k, _heads(cross_attn.v(context))))
        tokens = tokens + block.ffn(_norm(tokens) * (1 + scale2) + shift2) * gate2
    shift, scale = model.head.modulation[0] + embedded
    out = model.head.head(_norm(tokens) * (1 + scale) + shift)
    out = out.reshape(batch, frames, *GRID, 2, 2, CONFIG.out_dim)
    return out.permute(0, 1, 6, 2, 4, 3, 5).reshape(x.shape), live


@dataclass
class Reference:
    """A finished rollout."""

    video: Tensor
    draws: list[Tensor] = field(default_factory=list)
    """The later draws, in the order they were used."""


def rollout(
    model: WanTransformer,
    config: RolloutConfig,
    plan: RolloutPlan,
    *,
    context: Tensor,
    noise: SampleNoise,
    initial: Tensor | None = None,
) -> Reference:
    """The video of the plan's rollout, under the schedule with shift 5, and the draws it used."""
    schedule = [1 - i / 1000 for i in range(1000)]
    table = [5 * s / (1 + 4 * s) for s in schedule]
    sigmas = [5 * (step / 1000) / (1 + 4 * step / 1000) for step in config.steps]
    clean_sigma = min(table) if config.context_noise == "nearest" else 0.0
    batch = context.shape[0]
    shape = (batch, config.chunk, CONFIG.in_dim, HEIGHT, WIDTH)
    cache: list[FrameCache] = []
    result = Reference(torch.empty(0))
    chunks: list[Tensor] = []

    def run(x: Tensor, timestep: float) -> tuple[Tensor, list[FrameCache]]:
        start, count = len(cache), x.shape[1]
        seen = list(range(start))
        if config.window is not None and start + count > config.window:
            seen = seen[: config.sink] + seen[start - (config.window - config.sink - count) :]
        place = seen if config.positions == "absolute" else list(range(len(seen)))
        first = start if config.positions == "absolute" else len(seen)
        return call(
            model,
            x,
            timestep,
            context,
            positions=list(range(first, first + count)),
            past=[cache[index] for index in seen],
            past_positions=place,
        )

    if initial is not None:
        with torch.no_grad():
            _, live = run(initial, 0.0)
        cache += live
        chunks.append(initial)
    while len(cache) < plan.frames:
        start = len(cache)
        carries = start >= plan.frames - plan.grad_frames
        x = noise.draw(shape, start // config.chunk, 0)
        for step, sigma in enumerate(sigmas[: plan.exit_step + 1]):
            with torch.set_grad_enabled(carries and step == plan.exit_step):
                velocity, exit_live = run(x, 1000 * sigma)
                x0 = x - sigma * velocity
            if step < plan.exit_step:
                result.draws.append(noise.draw(shape, start // config.chunk, step + 1))
                x = (1 - sigmas[step + 1]) * x0 + sigmas[step + 1] * result.draws[-1]
        chunks.append(x0)
        result.draws.append(noise.draw(shape, start // config.chunk, plan.exit_step + 1))
        with torch.no_grad():
            _, live = run((1 - clean_sigma) * x0 + clean_sigma * result.draws[-1], 0.0)
        if carries and plan.cache_gradient == "released":
            live = [
                [
                    tuple(constant + (graph - graph.detach()) for constant, graph in zip(*pairs, strict=True))
                    for pairs in zip(frame, exit_frame, strict=True)
                ]
                for frame, exit_frame in zip(live, exit_live, strict=True)
            ]
        cache += live
    result.video = torch.cat(chunks, 1)
    return result
