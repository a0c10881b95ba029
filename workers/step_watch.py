"""What an optimizer step did, in a few scalars, over all ranks of a sharded model."""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from model.watch import cosine
from workers.engine import TrainEngine


class StepWatch:
    """How far weights are from their average, and how one update lies to the one before."""

    def __init__(self, engine: TrainEngine, *, directions: bool):
        """`directions` keeps two fp32 copies of this rank's trained slices, the weights before and the last
        update: at 14B over 64 ranks 1.75 GB a rank, in the memory that the optimizer's state is in."""
        self.engine, self.directions = engine, directions
        self._before: list[Tensor] = []
        self._update: list[Tensor] = []

    def before(self) -> None:
        """To be called right before a step."""
        if self.directions:
            self._before = [value.clone() for value, _ in self.engine.trained_values()]

    def after(self) -> dict[str, float]:
        """`average_distance`, |average − weights| / |weights| where there is an average, and `update_cosine`
        from the second update of a process on; on all ranks at once."""
        found, pairs = {}, self.engine.trained_values()
        if self.engine.config.ema_decay is not None:
            apart = self._summed(
                (average - value).square().sum() for value, average in pairs if average is not None
            )
            whole = self._summed(value.square().sum() for value, _ in pairs)
            found["average_distance"] = (apart / max(whole, 1e-30)) ** 0.5
        if self.directions:
            # In the memory of the weights before, so that there are two copies and never three.
            pieces = zip(pairs, self._before, strict=True)
            update = [before.neg_().add_(value) for (value, _), before in pieces]
            if self._update:
                dot, norm, other = (
                    self._summed((a * b).sum() for a, b in zip(first, second, strict=True))
                    for first, second in ((update, self._update), (update, update), (self._update,) * 2)
                )
                found["update_cosine"] = cosine(dot, norm, other)
            self._update, self._before = update, []
        return found

    def _summed(self, parts: Iterable[Tensor]) -> float:
        """A sum over this rank's parts and all ranks. What every rank holds alike counts once for each, which
        no quotient of two such sums shows."""
        total = torch.stack([part.double() for part in parts]).sum().to(self.engine.device)
        dist.all_reduce(total)
        return total.item()
