"""What a loss on the student's whole video declares."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

Leaves = Mapping[str, Tensor]
"""What a loss is computed from: the student's `video` [B, F, C, H, W] and the predictions that it reads.

Predictions have the names that the scorers give them: x0 of the noised video, of the video's shape, are
`real` (the guided teacher's) and `fake` (the critic's); `logits` [B, classes] are the critic's of the same;
`data_logits` are its logits of a noised video of the data, and so for any prediction.
"""


@dataclass(frozen=True)
class Loss:
    """One holistic loss and what it asks of the scorers."""

    compute: Callable[[Leaves, Any], Tensor]
    """The mean over samples, of leaves and the run's `ObjectiveConfig`."""
    reads: tuple[str, ...]
    flows: tuple[str, ...] = ()
    """Those of `reads` with respect to which it has a gradient; data is no function of the video."""
    statistics: Mapping[str, Callable[[Leaves], Tensor]] = field(default_factory=dict)
    """Scalars by name, for the run's metrics."""
