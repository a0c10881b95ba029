"""What only moving digits can be asked: is the digit right, and does it move as the prompt says.

Videos are `[N, F, C, H, W]` in [-1, 1] on a canvas that wraps around its edges.
"""

import torch
from torch import Tensor

_LARGEST_SHIFT = 4


def correct_digits(logits: Tensor, digits: Tensor) -> Tensor:
    """1 where the strongest logit `[N, F, 10]` is the video's digit `[N]`, else 0; float `[N, F]`."""
    return (logits.argmax(-1) == digits[:, None]).float()


def followed_motion(videos: Tensor, shifts: Tensor) -> Tensor:
    """1 where the content moved as asked from a frame to the next, else 0; float `[N, F − 1]`.

    `shifts` `[N, 2]` are the expected `(dy, dx)` in pixels a frame. The observed shift is the one with the
    largest circular cross-correlation of the two frames, among all of at most 4 pixels either way; a still or
    blank video has shift zero.
    """
    reach = range(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1)
    # Zero comes first: where all correlations are equal, as between blank frames, nothing moved.
    candidates = sorted(((dy, dx) for dy in reach for dx in reach), key=lambda shift: shift != (0, 0))
    before, after = videos[:, :-1], videos[:, 1:]
    correlations = [(before.roll(shift, dims=(-2, -1)) * after).sum((-3, -2, -1)) for shift in candidates]
    observed = torch.tensor(candidates, device=videos.device)[torch.stack(correlations).argmax(0)]
    return (observed == shifts[:, None]).all(-1).float()
