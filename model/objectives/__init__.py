"""Objectives: plain functions of videos and predictions, and the gradients that workers pass on.

A holistic loss is computed on *leaves*, tensors without a graph, where the student's video is alive. What it
sends to the video stays there; what it sends to a prediction travels back to the scorer that made it. To add
one, write a function of `Leaves` in a file of this package and name it in `LOSSES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from model.objectives.dmd import dmd_loss
from model.objectives.sid import sid_loss


@dataclass(frozen=True)
class ObjectiveConfig:
    """The loss on the student's whole video."""

    weights: Mapping[str, float] = field(default_factory=lambda: {"dmd": 1.0})
    """Weight of each loss that takes part: `dmd` (distribution matching) or `sid` (score identity)."""
    sid_alpha: float = 1.0
    """Weight of SiD's second term; the published runs use 1."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.weights) - set(LOSSES))
        if unknown:
            raise ValueError(f"weights names {unknown[0]!r}, which is no loss; use {', '.join(LOSSES)}.")
        if not self.weights or any(not weight > 0 for weight in self.weights.values()):
            raise ValueError("weights must give each loss that takes part a positive weight.")

    @property
    def through_scores(self) -> bool:
        """Whether gradient flows back through the predictions of teacher and critic."""
        return any(LOSSES[name].through_scores for name in self.weights)

    def __call__(self, leaves: "Leaves") -> Tensor:
        """The weighted loss, a mean over the samples."""
        return sum(weight * LOSSES[name].compute(leaves, self) for name, weight in self.weights.items())  # type: ignore[return-value]


@dataclass(frozen=True)
class Leaves:
    """What a loss is computed from; videos [B, F, C, H, W]."""

    video: Tensor
    """The student's video."""
    real: Tensor
    """The guided teacher's x0 of that video, noised."""
    fake: Tensor
    """The critic's."""


@dataclass(frozen=True)
class Loss:
    """One holistic loss and what it asks of the scorers."""

    compute: Callable[[Leaves, ObjectiveConfig], Tensor]
    through_scores: bool = False
    """Whether it has a gradient with respect to the predictions."""


LOSSES: dict[str, Loss] = {
    "dmd": Loss(lambda leaves, _: dmd_loss(leaves.video, leaves.real, leaves.fake)),
    "sid": Loss(
        lambda leaves, config: sid_loss(leaves.video, leaves.real, leaves.fake, config.sid_alpha),
        through_scores=True,
    ),
}
