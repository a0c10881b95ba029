"""The adversarial objective on a classification branch's logits, plain and relativistic.

Sources: Goodfellow et al. 2014 (non-saturating loss); Jolicoeur-Martineau, arXiv 1807.00734 (relativistic
pairing); Lin et al., arXiv 2501.08316 (R1 approximated by a finite difference). `fake` and `real` are logits
[B, classes] of the noised student video and of noised data; every mean is over samples and classes.
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus

from infra.settings import at_least, positive
from model.discriminator import BranchConfig
from model.objectives.loss import Loss


@dataclass(frozen=True)
class DiscriminatorConfig(BranchConfig):
    """The critic's classification branch and how it learns; without taps there is none."""

    weight: float = 1.0
    """Weight of the discriminator's loss."""
    flow_weight: float = 1.0
    """Weight of the critic's flow matching beside it; a purely adversarial objective may do with 0."""
    r1_weight: float = 0.0
    """Weight of the approximate R1 penalty, on data."""
    r1_sigma: float = 0.01
    """How far R1 perturbs noised data."""
    r2_weight: float = 0.0
    """Weight of the approximate R2 penalty, on the student's videos."""
    r2_sigma: float = 0.01
    """How far R2 perturbs noised videos."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "weight", "flow_weight", "r1_weight", "r2_weight")
        positive(self, "r1_sigma", "r2_sigma")


def generator_loss(fake: Tensor) -> Tensor:
    """`mean softplus(−fake)`."""
    return softplus(-fake).mean()


def relativistic_generator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """`mean softplus(real − fake)`, sample by sample."""
    return softplus(real - fake).mean()


def discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """`mean softplus(−real) + mean softplus(fake)`."""
    return softplus(-real).mean() + softplus(fake).mean()


def relativistic_discriminator_loss(fake: Tensor, real: Tensor) -> Tensor:
    """`mean softplus(fake − real)`, sample by sample."""
    return softplus(fake - real).mean()


def gradient_penalty(perturbed: Tensor, logit: Tensor, sigma: float) -> Tensor:
    """Approximate R1 (on data) or R2 (on the student's videos): `mean(((perturbed − logit) / sigma)²)`.

    `perturbed` is the logit of the same noisy video plus `sigma` times fresh noise. Both carry a gradient.
    """
    return ((perturbed - logit) / sigma).square().mean()


LOSSES = {
    "gan": Loss(lambda leaves, _: generator_loss(leaves["logits"]), reads=("logits",), flows=("logits",)),
    "relativistic_gan": Loss(
        lambda leaves, _: relativistic_generator_loss(leaves["logits"], leaves["data_logits"]),
        reads=("logits", "data_logits"),
        flows=("logits",),
    ),
}
