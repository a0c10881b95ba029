"""The adversarial objective on a classification branch's logits, plain and relativistic.

Sources: Goodfellow et al. 2014 (non-saturating loss); Jolicoeur-Martineau, arXiv 1807.00734 (relativistic
pairing); Lin et al., arXiv 2501.08316 (R1 approximated by a finite difference). `fake` and `real` are logits
[B, classes] of the noised student video and of noised data; every mean is over samples and classes.
"""

from torch import Tensor
from torch.nn.functional import softplus


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
