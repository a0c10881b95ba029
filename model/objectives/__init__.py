"""Objectives: plain functions of videos and predictions, and the gradients that workers pass on.

A holistic loss is computed on *leaves*, tensors without a graph, where the student's video is alive. What it
sends to the video stays there; what it sends to a prediction travels back to the scorer that made it. To add
one, write a function of `Leaves` in a file of this package and name it in `LOSSES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from torch import Tensor

from model.objectives.dmd import dmd_loss, score_gap
from model.objectives.gan import generator_loss, relativistic_generator_loss
from model.objectives.sid import sid_loss

Prediction = Literal["real", "fake", "logits", "data_logits"]
"""The guided teacher's x0 of the student's noised video, the critic's, the critic's logits of that video, and its
logits of a noised video of the data."""
Leaves = Mapping[Literal["video"] | Prediction, Tensor]
"""What a loss is computed from: the student's `video` [B, F, C, H, W] and the predictions that it reads; x0 are
of the video's shape, logits [B, classes]."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss on the student's whole video."""

    weights: dict[str, float] = field(default_factory=lambda: {"dmd": 1.0})
    """Weight of each loss that takes part: `dmd` (distribution matching), `sid` (score identity), `gan` (adversarial) or
    `relativistic_gan`."""
    sid_alpha: float = 1.0
    """Weight of SiD's second term; the published runs use 1."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(LOSSES))
        if unknown:
            raise ValueError(f"weights names {unknown[0]!r}, which is no loss; use {', '.join(LOSSES)}.")
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise ValueError("weights must give each loss that takes part a positive weight, and name one.")

    @property
    def reads(self) -> tuple[Prediction, ...]:
        """The predictions that the losses are computed from."""
        read = {name for loss in self.weights for name in LOSSES[loss].reads}
        return tuple(name for name in get_args(Prediction) if name in read)

    @property
    def flows(self) -> tuple[Prediction, ...]:
        """The predictions through which gradient flows back to the video."""
        through = {name for loss in self.weights for name in LOSSES[loss].flows}
        return tuple(name for name in get_args(Prediction) if name in through)

    def __call__(self, leaves: Leaves) -> Tensor:
        """The weighted loss, a mean over the samples."""
        losses = [weight * LOSSES[name].compute(leaves, self) for name, weight in self.weights.items()]
        return sum(losses[1:], start=losses[0])

    def statistics(self, leaves: Leaves) -> dict[str, float]:
        """What the losses report of their leaves beside their value; losses that share a name share its meaning."""
        named = [each for loss in self.weights for each in LOSSES[loss].statistics.items()]
        return {name: measure(leaves).item() for name, measure in named}


@dataclass(frozen=True)
class Loss:
    """One holistic loss and what it asks of the scorers."""

    compute: Callable[[Leaves, ObjectiveConfig], Tensor]
    reads: tuple[Prediction, ...]
    flows: tuple[Prediction, ...] = ()
    """Those of `reads` with respect to which it has a gradient; data is no function of the student's video."""
    statistics: Mapping[str, Callable[[Leaves], Tensor]] = field(default_factory=dict)
    """Scalars by name, for the run's metrics."""


_SCORE_GAP: dict[str, Callable[[Leaves], Tensor]] = {
    "score_gap": lambda leaves: score_gap(leaves["real"], leaves["fake"])
}
LOSSES: dict[str, Loss] = {
    "dmd": Loss(
        lambda leaves, _: dmd_loss(leaves["video"], leaves["real"], leaves["fake"]),
        reads=("real", "fake"),
        statistics=_SCORE_GAP,
    ),
    "sid": Loss(
        lambda leaves, config: sid_loss(leaves["video"], leaves["real"], leaves["fake"], config.sid_alpha),
        reads=("real", "fake"),
        flows=("real", "fake"),
        statistics=_SCORE_GAP,
    ),
    "gan": Loss(lambda leaves, _: generator_loss(leaves["logits"]), reads=("logits",), flows=("logits",)),
    "relativistic_gan": Loss(
        lambda leaves, _: relativistic_generator_loss(leaves["logits"], leaves["data_logits"]),
        reads=("logits", "data_logits"),
        flows=("logits",),
    ),
}
