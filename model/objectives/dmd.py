"""Distribution matching distillation (Yin et al., arXiv 2311.18828; Self Forcing, equation 5)."""

from torch import Tensor

from model.objectives.loss import Leaves, Loss


def dmd_loss(video: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """DMD loss `½ mean(g²)`, `g = (fake − real) / mean|video − real|`; its gradient is `g / numel`.

    All are x0 videos [B, F, C, H, W]: the student's, the guided teacher's prediction, and the critic's. The
    normaliser is per sample. Gradient reaches `video` only.
    """
    normaliser = (video - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    g = ((fake - real) / normaliser).detach()
    return 0.5 * (video - (video - g).detach()).square().mean()


def score_gap(leaves: Leaves) -> Tensor:
    """`mean|fake − real|`: how far teacher and critic are apart on the student's videos."""
    return (leaves["fake"] - leaves["real"]).detach().abs().mean()


LOSSES = {
    "dmd": Loss(
        lambda leaves, _: dmd_loss(leaves["video"], leaves["real"], leaves["fake"]),
        reads=("real", "fake"),
        statistics={"score_gap": score_gap},
    )
}
