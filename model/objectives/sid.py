"""Score identity distillation (Zhou et al., arXiv 2404.04057), as Self Forcing uses it."""

from torch import Tensor

from model.objectives.dmd import score_gap
from model.objectives.loss import Loss


def sid_loss(video: Tensor, real: Tensor, fake: Tensor, alpha: float) -> Tensor:
    """SiD loss `mean((real − fake) · ((real − video) − alpha (real − fake)) / mean|video − real|)`.

    All are x0 videos [B, F, C, H, W]: the student's, the guided teacher's prediction, and the critic's. The
    normaliser is per sample and a constant. Gradient reaches all three.
    """
    normaliser = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True).detach()
    gap = real - fake
    return (gap * ((real - video) - alpha * gap) / normaliser).mean()


LOSSES = {
    "sid": Loss(
        lambda leaves, config: sid_loss(leaves["video"], leaves["real"], leaves["fake"], config.sid_alpha),
        reads=("real", "fake"),
        flows=("real", "fake"),
        statistics={"score_gap": score_gap},
    )
}
