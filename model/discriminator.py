"""A critic that also tells generated videos from real ones (Self Forcing, GAN objective).

A classification branch reads the hidden states of chosen blocks, so one forward answers both the velocity and
the logits. Source of the design: Lin et al., arXiv 2501.08316 (register tokens that read a diffusion
transformer by cross-attention).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from infra.settings import at_least
from model.backbone import Backbone
from model.transformer import CrossAttention, TransformerConfig

TIME_SCALE = 10.0
"""What the time embedding is multiplied by before it joins the features, as published."""


@dataclass(frozen=True)
class BranchConfig:
    """The classification branch of a critic."""

    taps: tuple[int, ...] = ()
    """Blocks, counted from 0, whose hidden states the branch reads."""
    num_class: int = 1
    """Logits a video is given."""
    concat_time: bool = False
    """Whether the branch is told the timestep."""

    def __post_init__(self) -> None:
        at_least(self, 1, "num_class")


class RegisterTokens(nn.Module):
    """One learned, RMS-normed query for each tapped block."""

    def __init__(self, count: int, config: TransformerConfig):
        super().__init__()
        self.register_tokens = nn.Parameter(0.02 * torch.randn(count, config.dim))
        self.rms_norm = nn.RMSNorm(config.dim, eps=config.eps)

    def forward(self) -> Tensor:
        return self.rms_norm(self.register_tokens)


class RegisterBlock(nn.Module):
    """A Wan block without self-attention and modulation, in which a register token reads hidden states."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
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

    def forward(self, register: Tensor, hidden: Tensor) -> Tensor:
        """Feature [B, D] of hidden states [B, L, D], asked by a register token [D]."""
        query = register.expand(len(hidden), 1, -1)
        x = query + self.cross_attn(query, self.norm3(hidden))
        return (x + self.ffn(self.norm2(x)))[:, 0]


class ClassificationBranch(nn.Module):
    """Logits [B, num_class] from hidden states, [B, L, D] for each tap, and a time embedding [B, D]."""

    def __init__(self, config: TransformerConfig, branch: BranchConfig):
        super().__init__()
        if not branch.taps:
            raise ValueError("taps is empty: name at least one block that the classification branch reads.")
        beyond = [tap for tap in branch.taps if not 0 <= tap < config.num_layers]
        if beyond:
            raise ValueError(
                f"taps {branch.taps} name blocks {beyond} that the critic does not have; choose from 0 to "
                f"{config.num_layers - 1}."
            )
        self.concat_time = branch.concat_time
        self.register_tokens = RegisterTokens(len(branch.taps), config)
        self.gan_ca_blocks = nn.ModuleList(RegisterBlock(config) for _ in branch.taps)
        width = config.dim * (len(branch.taps) + branch.concat_time)
        self.cls_pred_branch = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, config.dim),
            nn.SiLU(),
            nn.Linear(config.dim, branch.num_class),
        )

    @classmethod
    def drawn(cls, config: TransformerConfig, branch: BranchConfig) -> "ClassificationBranch":
        """A branch that has not learned yet, the same on every rank."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return cls(config, branch)

    def forward(self, hidden: list[Tensor], time: Tensor, *, recompute: bool = False) -> Tensor:
        """With `recompute`, what a block makes of a video's hidden states is not kept for the backward pass,
        but made again."""
        features = [
            checkpoint(block, register, states, use_reentrant=False) if recompute else block(register, states)
            for block, register, states in zip(
                self.gan_ca_blocks, self.register_tokens(), hidden, strict=True
            )
        ]
        if self.concat_time:
            features.append(TIME_SCALE * time)
        return self.cls_pred_branch(torch.cat(features, dim=1))


class Judged(NamedTuple):
    """What a discriminator answers (a tuple, because ZeRO-3 hooks look into those)."""

    velocity: Tensor  # [B, F, C, H, W]
    logits: Tensor  # [B, num_class], in float32


class Discriminator(nn.Module):
    """A bidirectional network and its classification branch, as one module that an engine can own."""

    def __init__(self, network: Backbone, branch: BranchConfig, *, activation_checkpointing: bool = False):
        """`activation_checkpointing` is that of the branch; `network` has its own."""
        super().__init__()
        self.taps = branch.taps
        self.activation_checkpointing = activation_checkpointing
        self.transformer = network
        self.branch = ClassificationBranch(network.config, branch)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Judged:
        """Velocity and logits of noisy latents [B, F, C, H, W] at timesteps [B]."""
        output = self.transformer(x, timestep, context, taps=self.taps)
        recompute = self.activation_checkpointing and torch.is_grad_enabled()
        logits = self.branch(output.hidden, output.time[:, 0], recompute=recompute)
        return Judged(output.velocity, logits.float())
