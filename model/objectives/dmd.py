"""Distribution matching distillation on the whole video (Yin et al., arXiv 2311.18828; Self Forcing, equation 5)."""

from torch import Tensor


def dmd_loss(video: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD loss whose gradient with respect to `video` is `g / numel`, with `g = (fake − real) / mean|video − real|`.

    All are x0 videos [B, F, C, H, W]: the student's, the guided teacher's prediction, and the critic's. The normaliser is per sample.
    Gradient reaches `video` only. The value is `½ mean(g²)`.
    """
    normaliser = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    g = ((fake - real) / normaliser).detach()
    return 0.5 * (video - (video - g).detach()).square().mean()
