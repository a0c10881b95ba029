"""A transformer made ready for the many calls without gradient of a rollout.

What only the weights, the prompt or the timestep say is computed once: the three projections of
self-attention are one product, and the modulation of every block is looked up by timestep. A call is then a
straight line of tensor operations. Its numbers are those of the network itself, to the bit where a matrix
product does not depend on how many columns are computed at once.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from model import rope
from model.adapters import AdaptedLinear
from model.attention import attend
from model.backbone import Output
from model.kv_cache import History, KeyValue
from model.transformer import Block, TransformerConfig, WanTransformer

TABLES_AT_MOST = 256
"""Combinations of timesteps whose modulation is kept; one rollout has few, a batch of streams more."""


class Linear(NamedTuple):
    """Weight [out, in] and bias [out]."""

    weight: Tensor
    bias: Tensor


class Layer(NamedTuple):
    """The weights of one block."""

    qkv: Linear
    qk_norm: Tensor | None  # [2, dim], of queries and of keys
    o: Linear
    norm3: Linear | None
    cross_q: Linear
    cross_q_norm: Tensor | None
    cross_o: Linear
    up: Linear
    down: Linear


class Modulation(NamedTuple):
    """Of one block at the timesteps of a call, [1 or B, 1, 1, dim] each in fp32, one added to scales."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor


class Table(NamedTuple):
    """All that timesteps say."""

    blocks: list[Modulation]
    head: tuple[Tensor, Tensor]  # shift, and scale with one added


class PreparedTransformer:
    """A network's weights as its calls want them. They are those of now: a step of training needs another."""

    def __init__(self, network: WanTransformer, *, compiled: bool = False, shared: bool = False):
        """With `shared` the weights of the network, which is never trained, become views of what is made
        here, so that they are there once.

        With `compiled` what surrounds self-attention goes through TorchInductor, once for all blocks of all
        networks of a size: the history, which grows, is in neither part.
        """
        self.network, self.config = network, network.config
        self._before: Callable[..., Any] = _compiled(before) if compiled else before
        self._after: Callable[..., Any] = _compiled(after) if compiled else after
        patches = network.patch_embedding
        self.patches = Linear(patches.weight.detach().flatten(1), patches.bias.detach())
        blocks = [block for block in network.blocks if isinstance(block, Block)]
        self.layers = [_layer(block, shared) for block in blocks]
        self.modulation = torch.stack([block.modulation.detach()[0] for block in blocks])
        self.head, self.head_modulation = _linear(network.head.head), network.head.modulation.detach()
        self._tables: dict[tuple[float, ...], Table] = {}

    @torch.no_grad()
    def __call__(
        self,
        x: Tensor,
        timesteps: Sequence[float],
        prompts: Sequence[KeyValue],
        *,
        history: History,
        return_live: bool = False,
    ) -> Output:
        """See `model.backbone.Prepared`."""
        rows, columns = self.config.grid(*x.shape[3:])
        table = self._table(timesteps, x.device)
        _, p, q = self.config.patch_size
        cut = rearrange(x.to(self.head.bias.dtype), "b f c (h p) (w q) -> b f (h w) (c p q)", p=p, q=q)
        tokens = F.linear(cut, *self.patches)
        phase, live = history.phase[:, :, None], []
        for index, (layer, modulation) in enumerate(zip(self.layers, table.blocks, strict=True)):
            query, k, v, unturned = self._before(tokens, layer, modulation, phase, self.config)
            if return_live:
                live.append((k if history.absolute else unturned, v))
            attended = attend(query, *history.joined(index, k, v), history.mask)
            tokens = self._after(tokens, attended, layer, modulation, prompts[index], self.config)
        shift, scale = table.head
        out = F.linear(_modulated(tokens, shift, scale, self.config.eps), *self.head)
        velocity = rearrange(out, "b f (h w) (p q c) -> b f c (h p) (w q)", h=rows, w=columns, p=p, q=q)
        return Output(velocity, live, [], None)

    def _table(self, timesteps: Sequence[float], device: torch.device) -> Table:
        """For all rows at once where they are at one timestep, else row by row."""
        key = (*timesteps,) if len(set(timesteps)) > 1 else (timesteps[0],)
        if key not in self._tables:
            if len(self._tables) >= TABLES_AT_MOST:
                self._tables.clear()
            # One at a time, as the network is asked for them: more rows at once may round otherwise.
            each = [self.network.embed_time(torch.full((1,), step, device=device)) for step in key]
            embedded, time = (torch.cat(rows).squeeze(1) for rows in zip(*each, strict=True))
            self._tables[key] = self._made(embedded, time)
        return self._tables[key]

    def _made(self, embedded: Tensor, time: Tensor) -> Table:
        """From a time embedding [rows, dim] and its projection [rows, 6, dim]."""
        blocks = self.modulation[:, None] + time
        blocks[:, :, (1, 4)] += 1
        shift, scale = (self.head_modulation + embedded[:, None]).unbind(1)
        return Table(
            [Modulation(*block[:, :, None, None].unbind(1)) for block in blocks],
            (shift[:, None, None], 1 + scale[:, None, None]),
        )


def before(
    tokens: Tensor, layer: Layer, modulation: Modulation, phase: Tensor, config: TransformerConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What self-attention takes of tokens [B, F, T, dim]: queries, keys and values [B, F·T, heads, head_dim],
    and the keys without their rotation by `phase`."""
    normed = _modulated(tokens, modulation.shift1, modulation.scale1, config.eps)
    qkv = F.linear(normed, *layer.qkv).view(len(tokens), -1, 3, config.dim)
    qk = _rms(qkv[:, :, :2], layer.qk_norm, config.eps).unflatten(3, (config.num_heads, -1))
    q, k = rope.rotate(qk, phase).unbind(2)
    return q, k, qkv[:, :, 2].unflatten(2, (config.num_heads, -1)), qk[:, :, 1]


def after(
    tokens: Tensor,
    attended: Tensor,
    layer: Layer,
    modulation: Modulation,
    prompt: KeyValue,
    config: TransformerConfig,
) -> Tensor:
    """Tokens [B, F, T, dim] behind a block, from those before it and what its self-attention gave, [B, F·T,
    dim]."""
    tokens = torch.addcmul(tokens, F.linear(attended, *layer.o).view_as(tokens), modulation.gate1).to(
        tokens.dtype
    )
    normed = tokens if layer.norm3 is None else F.layer_norm(tokens, (config.dim,), *layer.norm3, config.eps)
    q = _rms(F.linear(normed, *layer.cross_q), layer.cross_q_norm, config.eps)
    q = q.view(len(tokens), -1, config.num_heads, config.head_dim)
    tokens = tokens + F.linear(attend(q, *prompt), *layer.cross_o).view_as(tokens)
    normed = _modulated(tokens, modulation.shift2, modulation.scale2, config.eps)
    fed = F.linear(F.gelu(F.linear(normed, *layer.up), approximate="tanh"), *layer.down)
    return torch.addcmul(tokens, fed, modulation.gate2).to(tokens.dtype)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def _modulated(tokens: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    normed = F.layer_norm(tokens, tokens.shape[-1:], eps=eps)
    return torch.addcmul(shift, normed, scale).to(tokens.dtype)


def _rms(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm, rounded once, as `nn.RMSNorm` does."""
    if weight is None:
        return x
    return (F.rms_norm(x.float(), x.shape[-1:], eps=eps) * weight.float()).to(x.dtype)


def _linear(layer: nn.Module) -> Linear:
    """A layer's weights, with its adapter's product added."""
    assert isinstance(layer, nn.Linear)
    weight = layer.whole_weight() if isinstance(layer, AdaptedLinear) else layer.weight.detach()
    return Linear(weight, layer.bias.detach())


def _one(layers: Sequence[nn.Module], shared: bool) -> Linear:
    """Layers of the same input as one, of which theirs become views where they are `shared`."""
    weights, biases = zip(*map(_linear, layers), strict=True)
    whole = Linear(torch.cat(weights), torch.cat(biases))
    if shared:
        for layer, weight, bias in zip(layers, *(each.chunk(len(layers)) for each in whole), strict=True):
            layer.weight.data, layer.bias.data = weight, bias
    return whole


def _norms(*norms: nn.Module) -> Tensor | None:
    weights = [norm.weight.detach() for norm in norms if isinstance(norm, nn.RMSNorm)]
    return torch.stack(weights) if weights else None


def _layer(block: Block, shared: bool) -> Layer:
    own, cross = block.self_attn, block.cross_attn
    up, _, down = block.ffn
    norm3 = block.norm3
    return Layer(
        qkv=_one([own.q, own.k, own.v], shared),
        qk_norm=_norms(own.norm_q, own.norm_k),
        o=_linear(own.o),
        norm3=Linear(norm3.weight.detach(), norm3.bias.detach()) if isinstance(norm3, nn.LayerNorm) else None,
        cross_q=_linear(cross.q),
        cross_q_norm=_norms(cross.norm_q),
        cross_o=_linear(cross.o),
        up=_linear(up),
        down=_linear(down),
    )
