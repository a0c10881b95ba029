"""Flow matching (Lipman et al. 2022): pretraining, and the critic on the student's videos."""

from torch import Tensor


def flow_matching_loss(velocity: Tensor, noise: Tensor, x0: Tensor) -> Tensor:
    """`mean((velocity − (noise − x0))²)` over everything, unweighted."""
    return (velocity - (noise - x0)).square().mean()
