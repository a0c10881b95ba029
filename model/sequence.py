"""Sequence parallelism: the tokens of one forward shared out over the ranks of a group.

Every rank has its own part of each frame's tokens, and for attention all tokens of its own part of the heads
(DeepSpeed-Ulysses, Jacobs et al., arXiv 2309.14509), which two all-to-all exchanges of each block bring
about. Inputs and outputs are whole on every rank, and so is an input's gradient. A weight's gradient is the
mean over the group, as it is over ranks that have samples of their own, so an engine need not know.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class SequenceGroup:
    """The ranks that share a forward; all enter it at once, with the same inputs."""

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def shared(self, x: Tensor) -> Tensor:
        """An input that all ranks have, whose gradient is the mean of theirs."""
        return _Shared.apply(x, self)


def groups_of(size: int) -> SequenceGroup | None:
    """This rank's group where every `size` ranks of all that there are share their forwards; None where none
    do. Called on all ranks at once."""
    if size == 1:
        return None
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = [dist.new_group(list(range(first, first + size))) for first in range(0, world, size)]
    return SequenceGroup(groups[rank // size])


@dataclass(frozen=True)
class Share:
    """A rank's share of the tokens of so many frames."""

    sequence: SequenceGroup
    frames: int

    def own(self, tokens: Tensor) -> Tensor:
        """This rank's part [B, F·T/ranks, D] of tokens [B, F·T, D]; ValueError where T does not divide."""
        by_frame, ranks = tokens.unflatten(1, (self.frames, -1)), self.sequence.ranks
        if by_frame.shape[2] % ranks:
            raise ValueError(f"{ranks} ranks do not divide the {by_frame.shape[2]} tokens of a frame.")
        return by_frame.chunk(ranks, dim=2)[self.sequence.rank].flatten(1, 2)

    def whole(self, tokens: Tensor) -> Tensor:
        """All tokens [B, F·T, D] of every rank's own."""
        return _Whole.apply(tokens.unflatten(1, (self.frames, -1)), self.sequence).flatten(1, 2)

    def to_heads(self, x: Tensor) -> Tensor:
        """All tokens of some heads, [B, F·T, heads/ranks, d], from one's own of all, [B, F·T/ranks, heads,
        d]."""
        parts = torch.stack(x.unflatten(1, (self.frames, -1)).chunk(self.sequence.ranks, dim=3))
        # [ranks, B, F, T/ranks, heads/ranks, d] → [B, F, ranks, T/ranks, …]
        return _Exchanged.apply(parts, self.sequence).permute(1, 2, 0, 3, 4, 5).flatten(1, 3)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The way back of what attention made, [B, F·T, heads/ranks · d], to [B, F·T/ranks, heads · d]."""
        parts = torch.stack(x.unflatten(1, (self.frames, -1)).chunk(self.sequence.ranks, dim=2))
        # [ranks, B, F, T/ranks, D/ranks] → [B, F, T/ranks, ranks, D/ranks]
        return _Exchanged.apply(parts, self.sequence).permute(1, 2, 3, 0, 4).flatten(3, 4).flatten(1, 2)


def _all_to_all(parts: Tensor, sequence: SequenceGroup) -> Tensor:
    """What each rank has for this one, [ranks, …], of what this one has for each."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=sequence.group)
    return received


class _Exchanged(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, parts: Tensor, sequence: SequenceGroup) -> Tensor:
        context.sequence = sequence
        return _all_to_all(parts, sequence)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(gradients[0], context.sequence), None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, own: Tensor, sequence: SequenceGroup) -> Tensor:
        context.sequence = sequence
        parts = [torch.empty_like(own) for _ in range(sequence.ranks)]
        dist.all_gather(parts, own.contiguous(), group=sequence.group)
        return torch.cat(parts, dim=2)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # What follows is the same on every rank, and so is its gradient, of which a rank's own tokens have
        # one part. Times their number, for their mean is taken.
        ranks = context.sequence.ranks
        return gradients[0].chunk(ranks, dim=2)[context.sequence.rank] * ranks, None


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, sequence: SequenceGroup) -> Tensor:
        context.sequence = sequence
        return x.view_as(x)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0] / context.sequence.ranks
        dist.all_reduce(total, group=context.sequence.group)
        return total, None
