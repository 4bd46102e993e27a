"""GAN losses of both players, and gradient penalties of the discriminator."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from modules.networks.parts import Part, within
from modules.ranges import NonNegative, Positive, PositiveInt, ShareBelowOne


class Verdict(NamedTuple):
    """Output of a discriminator.

    Args:
        score: float B. High for real images; for an autoencoder as discriminator it is the energy, which is low for
            them.
        features: float B×F, from which the score is computed.
    """

    score: Tensor
    features: Tensor


class Objective(Part):
    """Base class of the losses of both players."""

    energy = 0  # exponent p of the error |x̂ − x|^p if the score is that of an autoencoder, otherwise 0
    threshold: float | None = 0.0  # score that separates real and generated; None for the mid-point of their means

    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        """Computes the discriminator's loss, a scalar, averaged over a batch of real and one of generated images."""
        raise NotImplementedError

    def generator(self, fake: Verdict) -> Tensor:
        """Computes the generator's loss, a scalar, averaged over a batch of generated images; by default, −D(G(z)), or the
        energy of generated images."""
        return fake.score.mean() if self.energy else -fake.score.mean()

    def after_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        """Updates the objective after a step of the generator.

        Args:
            real: mean score of the last real images, over all processes.
            fake: mean score of the images of the generator's last step.

        Returns:
            Metrics to log.
        """
        return {}


class NonSaturating(Objective):
    """The non-saturating GAN loss (Goodfellow et al. 2014, arXiv:1406.2661): binary cross-entropy for the
    discriminator, and −log D(G(z)) for the generator.

    Args:
        saturating: use log(1 − D(G(z))) for the generator, equation 1 of the paper, to demonstrate that its gradient
            vanishes for a confident discriminator.
        label_smoothing: one-sided label smoothing, subtracted from the target of real images (Salimans et al. 2016,
            arXiv:1606.03498, section 3.4).
    """

    def __init__(self, saturating: bool = False, label_smoothing: ShareBelowOne = 0.0) -> None:
        super().__init__()
        within("label_smoothing", label_smoothing, 0, 0.5)
        self.saturating, self.label_smoothing = saturating, label_smoothing

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        target = torch.full_like(real.score, 1 - self.label_smoothing)
        return F.binary_cross_entropy_with_logits(real.score, target) + F.softplus(fake.score).mean()

    @override
    def generator(self, fake: Verdict) -> Tensor:
        return -F.softplus(fake.score).mean() if self.saturating else F.softplus(-fake.score).mean()


class LeastSquares(Objective):
    """Least-squares GAN: ½(D(x) − 1)² + ½D(G(z))² and ½(D(G(z)) − 1)² (Mao et al. 2017, arXiv:1611.04076, equation
    9)."""

    threshold = 0.5

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        return 0.5 * ((real.score - 1).square().mean() + fake.score.square().mean())

    @override
    def generator(self, fake: Verdict) -> Tensor:
        return 0.5 * (fake.score - 1).square().mean()


class Hinge(Objective):
    """Hinge loss: max(0, 1 − D(x)) + max(0, 1 + D(G(z))) and −D(G(z)) (Lim & Ye 2017, arXiv:1705.02894; with spectral
    normalisation, Miyato et al. 2018, arXiv:1802.05957).

    >>> sure = Verdict(torch.tensor([2.0]), torch.zeros(1, 1))
    >>> Hinge().discriminator(sure, sure), Hinge().generator(sure)
    (tensor(3.), tensor(-2.))
    """

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        return F.relu(1 - real.score).mean() + F.relu(1 + fake.score).mean()


class Wasserstein(Objective):
    """Wasserstein GAN: D(G(z)) − D(x) and −D(G(z)) (Arjovsky et al. 2017, arXiv:1701.07875), for use with
    `GradientPenalty`.

    Args:
        drift: weight of D(x)², which keeps scores near zero (Karras et al. 2018, arXiv:1710.10196, appendix A.1).
    """

    threshold = None

    def __init__(self, drift: NonNegative = 0.001) -> None:
        super().__init__()
        self.drift = drift

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        return fake.score.mean() - real.score.mean() + self.drift * real.score.square().mean()


def pulling_away(features: Tensor) -> Tensor:
    """Pulling-away term: the mean squared cosine similarity between the features of different images, in [0, 1] (Zhao
    et al. 2017, arXiv:1609.03126, equation 4).

    Args:
        features: float B×F with B of at least 2.
    """
    unit = F.normalize(features.float(), dim=1)
    count = len(unit)
    return ((unit @ unit.T).square().sum() - unit.square().sum(1).square().sum()) / (count * (count - 1))


class EnergyBased(Objective):
    """Energy-based GAN: E(x) + max(0, m − E(G(z))) and E(G(z)) with the pulling-away term, where the energy E is the
    error of the discriminator, an autoencoder (Zhao et al. 2017, arXiv:1609.03126, equations 1, 2 and 4).

    Args:
        margin: m, in units of the mean squared error of normalised images.
        pull: weight of the pulling-away term (EBGAN-PT); 0 for EBGAN.
    """

    energy, threshold = 2, None

    def __init__(self, margin: NonNegative = 1.0, pull: NonNegative = 0.1) -> None:
        super().__init__()
        within("margin", margin, 0)
        self.margin, self.pull = margin, pull

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        return real.score.mean() + F.relu(self.margin - fake.score).mean()

    @override
    def generator(self, fake: Verdict) -> Tensor:
        loss = super().generator(fake)
        return loss + self.pull * pulling_away(fake.features) if self.pull and len(fake.score) > 1 else loss


class BoundaryEquilibrium(Objective):
    """BEGAN: L(x) − k·L(G(z)) and L(G(z)), with k ← k + λ(γ L(x) − L(G(z))) in [0, 1]; L is the error of the
    discriminator, an autoencoder (Berthelot et al. 2017, arXiv:1703.10717, section 3.4). Logs k and the convergence
    measure M = L(x) + |γ L(x) − L(G(z))|, which can also fall in a failing training: check the coverage too.

    Args:
        gamma: γ, in [0, 1], target ratio of the errors of generated and real images; lower values give better but less
            diverse images.
        step: λ.
    """

    energy, threshold = 1, None
    balance: Tensor

    def __init__(self, gamma: Positive = 0.5, step: NonNegative = 0.001) -> None:
        super().__init__()
        within("gamma", gamma, 0, 1)
        self.gamma, self.step = gamma, step
        self.register_buffer("balance", torch.tensor(0.0))

    @override
    def discriminator(self, real: Verdict, fake: Verdict) -> Tensor:
        return real.score.mean() - self.balance * fake.score.mean()

    @override
    def after_step(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        difference = self.gamma * real - fake
        self.balance.copy_((self.balance + self.step * difference).clamp(0, 1))
        return {"balance": self.balance.clone(), "convergence": real + difference.abs()}


Score = Callable[[Tensor], Tensor]  # maps float32 B×C×H×W to float32 B


def slope(score: Score, image: Tensor) -> Tensor:
    """Computes ‖∂score/∂image‖² of each image, float32 B, with a graph for double backward. Always in float32: squared
    gradients exceed the range of half precision.

    Args:
        score: the discriminator.
        image: float B×C×H×W.
    """
    with torch.autocast(image.device.type, enabled=False):
        image = image.detach().float().requires_grad_()
        (gradient,) = torch.autograd.grad(score(image).sum(), image, create_graph=True)
    return gradient.square().flatten(1).sum(1)


class Regularizer(Part):
    """Base class of gradient penalties of the discriminator."""

    every = 1  # discriminator's steps per step with the penalty

    def forward(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        """Computes the weighted penalty, a scalar.

        Args:
            score: the discriminator.
            real: float B×C×H×W, normalised real images.
            fake: float B×C×H×W, normalised generated images, without a graph.
        """
        raise NotImplementedError


class GradientPenalty(Regularizer):
    """Gradient penalty λ (‖∇D‖ − 1)² at random points between real and generated images (Gulrajani et al. 2017,
    arXiv:1704.00028).

    The discriminator must not have batch normalisation: the score of an image must not depend on other images.

    Args:
        weight: λ.
    """

    def __init__(self, weight: NonNegative = 10.0) -> None:
        super().__init__()
        self.weight = weight

    @override
    def forward(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        share = torch.rand(len(real), 1, 1, 1, device=real.device)
        norm = (slope(score, torch.lerp(real.float(), fake.float(), share)) + 1e-12).sqrt()
        return self.weight * (norm - 1).square().mean()


class R1(Regularizer):
    """R1 penalty γ/2 ‖∇D‖² at real images (Mescheder et al. 2018, arXiv:1801.04406), applied every few steps with a
    correspondingly larger weight (Karras et al. 2020, arXiv:1912.04958, appendix B).

    Args:
        weight: γ.
        every: discriminator's steps per step with the penalty.
    """

    def __init__(self, weight: NonNegative = 1.0, every: PositiveInt = 8) -> None:
        super().__init__()
        within("every", every, 1)
        self.weight, self.every = weight, every

    @override
    def forward(self, score: Score, real: Tensor, fake: Tensor) -> Tensor:
        return 0.5 * self.weight * self.every * slope(score, real).mean()
