"""The Wan 2.1 diffusion transformer, in the three ways Self Forcing uses it.

Bidirectional (teacher, critic), block-causal over a whole sequence (ODE regression, diffusion forcing;
teacher forcing with a clean stream beside the noisy one), and cached, one chunk against a constant history
(rollout). Parameter names are those of the Wan 2.1 release; every size comes from `TransformerConfig`.
Source: Wan 2.1 (arXiv 2503.20314) for the architecture, CausVid (arXiv 2412.07772) for per-frame timesteps
under a block-causal mask.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infra.settings import Invalid, at_least, positive
from model import rope
from model.attention import attend
from model.backbone import EVERYTHING, Backbone, Output, Past
from model.chunk_view import ChunkView, chunk_views, replay_views, uniform
from model.kv_cache import BlockCache, History, KeyValue, PromptSlots, SlotCache, Window
from model.sequence import Share


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of one transformer, named as in the Wan 2.1 release."""

    dim: int = 96
    """Width of the hidden states."""
    ffn_dim: int = 384
    """Width of the feed-forward layers."""
    num_heads: int = 4
    """Attention heads; must divide `dim`."""
    num_layers: int = 4
    """Transformer blocks."""
    in_dim: int = 4
    """Latent channels in."""
    out_dim: int = 4
    """Latent channels out."""
    text_len: int = 32
    """Text tokens, padded; they are not masked."""
    text_dim: int = 64
    """Width of the text embedding."""
    freq_dim: int = 64
    """Width of the sinusoidal timestep embedding."""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """Frames, rows and columns of latents that make one token."""
    cross_attn_norm: bool = True
    """Whether the norm before the cross-attention has weights."""
    qk_norm: bool = True
    """Whether queries and keys are RMS-normed."""
    eps: float = 1e-6
    """Epsilon of every norm."""

    def __post_init__(self) -> None:
        at_least(
            self, 1, "dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "out_dim", "text_len", "text_dim"
        )
        positive(self, "freq_dim", "eps")
        if min(self.patch_size) < 1:
            raise Invalid("patch_size", f"is {self.patch_size}; each entry must be at least 1.")
        if self.dim % self.num_heads or (self.dim // self.num_heads) % 2:
            raise Invalid(
                "dim",
                f"{self.dim} does not give {self.num_heads} heads of an even size; choose num_heads so that "
                "it does.",
            )
        if self.freq_dim % 2:
            raise Invalid("freq_dim", f"{self.freq_dim} must be even: half are cosines, half are sines.")
        if self.patch_size[0] != 1:
            raise Invalid(
                "patch_size", f"{self.patch_size} must not span frames: its first entry has to be 1."
            )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches in a latent frame; raises where the patch does not divide it."""
        rows, columns = self.patch_size[1:]
        if height % rows or width % columns:
            raise Invalid(
                "patch_size", f"{self.patch_size} does not divide latent frames of {height}x{width}."
            )
        return height // rows, width // columns

    def parameters(self) -> int:
        """The number of weights."""
        with torch.device("meta"):
            return sum(p.numel() for p in WanTransformer(self).parameters())


def sinusoidal(timestep: Tensor, dim: int) -> Tensor:
    """Sinusoidal embedding [..., dim] of timesteps, cosines first, computed in float64."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angle = timestep.double()[..., None] * 10000.0**-exponent
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class Attention(nn.Module):
    """Projections shared by self- and cross-attention."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        dim, self.heads = config.dim, config.num_heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.o = nn.Linear(dim, dim)
        self.norm_q = nn.RMSNorm(dim, eps=config.eps) if config.qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim, eps=config.eps) if config.qk_norm else nn.Identity()

    def query(self, x: Tensor) -> Tensor:
        """[B, L, D] → [B, L, heads, head_dim]."""
        return self.norm_q(self.q(x)).unflatten(2, (self.heads, -1))

    def key_value(self, x: Tensor) -> KeyValue:
        k, v = (y.unflatten(2, (self.heads, -1)) for y in (self.norm_k(self.k(x)), self.v(x)))
        return k, v


class SelfAttention(Attention):
    """Self-attention over all tokens, over chunks causally, or over a history and the live chunk."""

    def forward(
        self,
        x: Tensor,
        phase: Tensor,
        chunks: list[ChunkView] | None,
        history: History | None,
        layer: int,
        past: KeyValue | None,
        share: Share | None,
    ) -> tuple[Tensor, KeyValue]:
        q, (k, v) = self.query(x), self.key_value(x)
        if share is not None:
            q, k, v = share.to_heads(q), share.to_heads(k), share.to_heads(v)
        if chunks is None:
            q, rotated = rope.rotate(q, phase), rope.rotate(k, phase)
            if history is None:
                out, live = attend(q, rotated, v), (rotated, v)
            else:
                out = attend(q, *history.joined(layer, rotated, v), history.mask)
                live = (rotated if history.absolute else k, v)
        else:
            if chunks[0].phases is None:
                q, k = rope.rotate(q, phase), rope.rotate(k, phase)
            keys, values = live = k, v
            if past is not None:
                keys, values = torch.cat([past[0], k], dim=1), torch.cat([past[1], v], dim=1)
            # Every chunk sees itself and what the window holds of the past: slices of the keys, so no mask is
            # ever materialised.
            out = torch.cat([_over_chunk(q, keys, values, chunk) for chunk in chunks], dim=1)
        return self.o(out if share is None else share.to_tokens(out)), live


def _over_chunk(q: Tensor, k: Tensor, v: Tensor, chunk: ChunkView) -> Tensor:
    queries = q[:, chunk.queries]
    keys, values = (torch.cat([x[:, span] for span in chunk.keys], dim=1) for x in (k, v))
    if chunk.phases is not None:
        queries, keys = (
            rope.rotate(x, phase) for x, phase in zip((queries, keys), chunk.phases, strict=True)
        )
    return attend(queries, keys, values)


class CrossAttention(Attention):
    """Attention from video tokens to text tokens."""

    def forward(self, x: Tensor, context: Tensor | KeyValue) -> Tensor:
        q = self.query(x)
        k, v = self.key_value(context) if isinstance(context, Tensor) else context
        return self.o(attend(q, k, v))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Tokens `x` [B, L, D], scaled by 1 + `scale` and shifted per frame, by [1 or B, 1 or F, D] in fp32."""
    frames = x.unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], frames, 1 + scale[:, :, None]).flatten(1, 2).to(x.dtype)


def add_gated(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Tokens `x` plus `y`, [B, L, D] each, the latter scaled per frame by [1 or B, 1 or F, D] in fp32."""
    frames, added = (tokens.unflatten(1, (scale.shape[1], -1)) for tokens in (x, y))
    return torch.addcmul(frames, added, scale[:, :, None]).flatten(1, 2).to(x.dtype)


class FloatLinear(nn.Linear):
    """A layer that computes in fp32 whatever its weights are in, as Wan does on the way from the timestep."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class Block(nn.Module):
    """One transformer block with adaptive norms."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.self_attn = SelfAttention(config)
        self.norm3 = (
            nn.LayerNorm(config.dim, config.eps, elementwise_affine=True)
            if config.cross_attn_norm
            else nn.Identity()
        )
        self.cross_attn = CrossAttention(config)
        self.norm2 = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.ffn = nn.Sequential(
            nn.Linear(config.dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, config.dim)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, config.dim) / config.dim**0.5)

    def forward(
        self,
        x: Tensor,
        time: Tensor,
        context: Tensor | KeyValue,
        phase: Tensor,
        chunks: list[ChunkView] | None,
        history: History | None,
        layer: int,
        past: KeyValue | None = None,
        share: Share | None = None,
    ) -> tuple[Tensor, KeyValue]:
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation + time).unbind(2)
        normed = modulate(self.norm1(x), shift1, scale1)
        y, live = self.self_attn(normed, phase, chunks, history, layer, past, share)
        x = add_gated(x, y, gate1)
        x = x + self.cross_attn(self.norm3(x), context)
        x = add_gated(x, self.ffn(modulate(self.norm2(x), shift2, scale2)), gate2)
        return x, live


class PatchEmbedding(nn.Module):
    """The release's Conv3d over patches, computed as one matrix product; its weight has a Conv3d's shape."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.patch_size = config.patch_size
        self.weight = nn.Parameter(torch.empty(config.dim, config.in_dim, *config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.dim))

    def forward(self, x: Tensor) -> Tensor:
        _, p, q = self.patch_size
        patches = rearrange(x, "b f c (h p) (w q) -> b (f h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.weight.flatten(1), self.bias)


class Head(nn.Module):
    """The last, modulated projection from tokens to patches of velocity."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.norm = nn.LayerNorm(config.dim, config.eps, elementwise_affine=False)
        _, p, q = config.patch_size
        self.head = nn.Linear(config.dim, p * q * config.out_dim)
        self.modulation = nn.Parameter(torch.randn(1, 2, config.dim) / config.dim**0.5)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, :, None]).unbind(2)
        return self.head(modulate(self.norm(x), shift, scale))


class WanTransformer(Backbone):
    """The Wan 2.1 diffusion transformer."""

    def __init__(self, config: TransformerConfig, *, activation_checkpointing: bool = False):
        """`activation_checkpointing` recomputes blocks in the backward pass, keeping no activations."""
        super().__init__()
        self.config = config
        self.activation_checkpointing = activation_checkpointing
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(
            FloatLinear(config.freq_dim, dim), nn.SiLU(), FloatLinear(dim, dim)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), FloatLinear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)
        self.initialize_weights()

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Xavier for projections, small normals for embeddings, and a zero head, as in the release."""
        embeddings = {*self.text_embedding, *self.time_embedding}

        def initialize(module: nn.Module) -> None:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
                if module is self.head.head:
                    nn.init.zeros_(module.weight)
                elif module in embeddings:
                    nn.init.normal_(module.weight, std=0.02)
                else:
                    nn.init.xavier_uniform_(module.weight)
            elif isinstance(module, PatchEmbedding):
                nn.init.xavier_uniform_(module.weight.flatten(1))

        # Not a loop over modules: ZeRO-3 shards weights as they are made, and gathers them for `apply` only.
        self.apply(initialize)

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.head.head.bias.dtype

    def embed_time(self, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding [1 or B, 1 or F, dim] of timesteps [1], [B] or [B, F], and what it modulates every
        block by, [1 or B, 1 or F, 6, dim]; both in fp32."""
        embedded = self.time_embedding(sinusoidal(timestep, self.config.freq_dim))
        if embedded.ndim == 2:
            embedded = embedded[:, None]
        return embedded, self.time_projection(embedded).unflatten(2, (6, -1))

    def encode_context(self, context: Tensor) -> list[KeyValue]:
        embedded = self.text_embedding(context.to(self.dtype))
        return [block.cross_attn.key_value(embedded) for block in self.blocks]  # type: ignore[operator, union-attr]

    def new_cache(self, window: Window, height: int, width: int, device: torch.device | str) -> BlockCache:
        return BlockCache(window, self.config.grid(height, width), self.config.head_dim, device)

    def new_slots(
        self,
        window: Window,
        height: int,
        width: int,
        *,
        rows: int,
        chunk: int,
        capacity: int | None = None,
        device: torch.device | str = "cpu",
    ) -> SlotCache:
        return SlotCache(
            window,
            self.config.grid(height, width),
            layers=self.config.num_layers,
            heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            rows=rows,
            chunk=chunk,
            capacity=capacity,
            device=device,
            dtype=self.dtype,
        )

    def new_prompts(self, rows: int, device: torch.device | str) -> PromptSlots:
        return PromptSlots(
            layers=self.config.num_layers,
            heads=self.config.num_heads,
            head_dim=self.config.head_dim,
            rows=rows,
            text_len=self.config.text_len,
            device=device,
            dtype=self.dtype,
        )

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        context: Tensor | Sequence[KeyValue],
        *,
        chunk: int | None = None,
        window: Window = EVERYTHING,
        clean: Tensor | None = None,
        past: Past | None = None,
        history: History | None = None,
        return_live: bool = False,
        taps: Sequence[int] = (),
    ) -> Output:
        frames, height, width = x.shape[1], x.shape[3], x.shape[4]
        rows, columns = self.config.grid(height, width)
        dtype = self.dtype
        if clean is not None:
            if chunk is None or clean.shape != x.shape:
                raise ValueError(
                    f"clean frames need a chunk, not {chunk}, and the noisy frames' shape {tuple(x.shape)}, "
                    f"not {tuple(clean.shape)}."
                )
            timestep = timestep[:, None].expand(-1, frames) if timestep.ndim == 1 else timestep
            x, timestep = torch.cat([clean, x], 1), torch.cat([torch.zeros_like(timestep), timestep], 1)
        share = None
        if self.sequence is not None and history is None:
            share, x = Share(self.sequence, x.shape[1]), self.sequence.shared(x)
        tokens = self.patch_embedding(x.to(dtype))
        if share is not None:
            tokens = share.own(tokens)
        embedded, time = self.embed_time(timestep)
        prompts: Sequence[Tensor | KeyValue]
        if isinstance(context, Tensor):
            prompts = [self.text_embedding(context.to(dtype))] * len(self.blocks)
        else:
            prompts = context
        chunks, before = None, None
        if history is not None:
            phase = history.phase
        elif past is not None:
            before = _Before(self, past, window, prompts, height, width)
            phase, chunks = before.phase, before.chunks
        else:
            phase = rope.phases([range(frames)], rows, columns, self.config.head_dim, x.device)
        if chunk is not None:
            streams = 1 if clean is None else 2
            chunks = chunk_views(uniform(frames, chunk), window, phase, streams=streams)
            phase = torch.cat([phase] * streams, dim=1)
        live, states = [], {}
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        for layer, block in enumerate(self.blocks):
            seen = None if before is None else before(layer, block)
            arguments = (tokens, time, prompts[layer], phase, chunks, history, layer, seen, share)
            if recompute:
                tokens, pair = checkpoint(block, *arguments, use_reentrant=False)
            else:
                tokens, pair = block(*arguments)
            if return_live:
                live.append(pair)
            if layer in taps:
                states[layer] = tokens if share is None else share.whole(tokens)
        if clean is not None:
            tokens, embedded = tokens[:, tokens.shape[1] // 2 :], embedded[:, frames:]
        patches = self.head(tokens, embedded)
        velocity = rearrange(
            patches if share is None else Share(share.sequence, frames).whole(patches),
            "b (f h w) (p q c) -> b f c (h p) (w q)",
            f=frames,
            h=rows,
            w=columns,
            p=self.config.patch_size[1],
            q=self.config.patch_size[2],
        )
        return Output(velocity, live, [states[layer] for layer in taps], embedded.to(dtype) if taps else None)


class _Before:
    """The clean frames that chunks see, block by block beside them and without a gradient."""

    def __init__(
        self,
        network: WanTransformer,
        past: Past,
        window: Window,
        prompts: Sequence[Tensor | KeyValue],
        height: int,
        width: int,
    ):
        frames, device = past.frames.shape[1], past.frames.device
        starts = list(accumulate([0, *past.sizes]))
        if frames not in starts:
            raise ValueError(f"{frames} clean frames are no whole chunks of {past.sizes} frames.")
        rows, columns = network.config.grid(height, width)
        whole = rope.phases([range(starts[-1])], rows, columns, network.config.head_dim, device)
        tokens = whole.shape[1] // starts[-1]
        self.chunks = replay_views(past.sizes, past.chosen, window, whole, frames)
        self.phase = torch.cat(
            [whole[:, starts[chunk] * tokens : starts[chunk + 1] * tokens] for chunk in past.chosen], dim=1
        )
        self._phase = whole[:, : frames * tokens]
        self._prompts = prompts
        with torch.no_grad():
            self._tokens = network.patch_embedding(past.frames.to(network.dtype))
            self._share = None
            if network.sequence is not None and frames:
                self._share = Share(network.sequence, frames)
                self._tokens = self._share.own(self._tokens)
            _, self._time = network.embed_time(torch.zeros(1, device=device))
        self._chunks = chunk_views(past.sizes[: starts.index(frames)], window, self._phase) if frames else []

    @torch.no_grad()
    def __call__(self, layer: int, block: nn.Module) -> KeyValue | None:
        """Their keys and values in the next block."""
        if not self._chunks:
            return None
        arguments = (self._phase, self._chunks, None, layer, None, self._share)
        self._tokens, pair = block(self._tokens, self._time, self._prompts[layer], *arguments)
        return pair
