"""Objectives: plain functions of videos and predictions, and the gradients that workers pass on.

A holistic loss is computed on *leaves*, tensors without a graph, where the student's video is alive. What it
sends to the video stays there; what it sends to a prediction travels back to the scorer that made it. To add
one, write a file of this package that declares it in a `LOSSES` of its own.
"""

import math
from dataclasses import dataclass, field
from importlib import import_module
from pkgutil import iter_modules

from torch import Tensor

from infra.settings import Invalid, at_least
from model.objectives.loss import Leaves, Loss


def declared() -> dict[str, Loss]:
    """The losses that the files of this package declare, by name."""
    modules = [import_module(f"{__name__}.{each.name}") for each in iter_modules(__path__)]
    return {name: loss for module in modules for name, loss in vars(module).get("LOSSES", {}).items()}


LOSSES = declared()


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss on the student's whole video."""

    weights: dict[str, float] = field(default_factory=lambda: {"dmd": 1.0})
    """Weight of each loss that takes part: `dmd` (distribution matching), `sid` (score identity), `gan`
    (adversarial) or `relativistic_gan`."""
    sid_alpha: float = 1.0
    """Weight of SiD's second term; the published runs use 1."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(LOSSES))
        if unknown:
            raise Invalid("weights", f"names {unknown[0]!r}, which is no loss; use {', '.join(LOSSES)}.")
        if not self.weights or any(not 0 < weight < math.inf for weight in self.weights.values()):
            raise Invalid("weights", "must give each loss that takes part a positive weight, and name one.")
        at_least(self, 0, "sid_alpha")

    @property
    def reads(self) -> tuple[str, ...]:
        """The predictions that the losses are computed from."""
        return tuple(dict.fromkeys(name for loss in self.weights for name in LOSSES[loss].reads))

    @property
    def flows(self) -> tuple[str, ...]:
        """The predictions through which gradient flows back to the video."""
        return tuple(dict.fromkeys(name for loss in self.weights for name in LOSSES[loss].flows))

    def __call__(self, leaves: Leaves) -> Tensor:
        """The weighted loss, a mean over the samples."""
        losses = [weight * LOSSES[name].compute(leaves, self) for name, weight in self.weights.items()]
        return sum(losses[1:], start=losses[0])

    def statistics(self, leaves: Leaves) -> dict[str, float]:
        """What the losses report of their leaves beside their value; those that share a name share it."""
        named = [each for loss in self.weights for each in LOSSES[loss].statistics.items()]
        return {name: measure(leaves).item() for name, measure in named}
