"""Input noise and code penalties of autoencoders."""

import torch
from torch import Tensor
from typing_extensions import override

from modules.networks.parts import Draws, Part, within
from modules.ranges import NonNegative, Positive, PositiveInt, Share


class Noise(Part):
    """Base class of input noise that a denoising autoencoder removes (Vincent et al. 2008,
    doi:10.1145/1390156.1390294)."""

    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        """Adds noise to float B×C×H×W in [0, 1]."""
        raise NotImplementedError


class GaussianNoise(Noise):
    """Adds noise from N(0, σ²) to each value. The result is not clipped to [0, 1].

    Args:
        sigma: standard deviation, relative to white.
    """

    def __init__(self, sigma: NonNegative = 0.3) -> None:
        super().__init__()
        within("sigma", sigma, 0)
        self.sigma = sigma

    @override
    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        return image + self.sigma * draws.normal(*image.shape[1:])


class SaltAndPepper(Noise):
    """Sets a fraction of the pixels to black or white, in all channels.

    Args:
        share: fraction of the pixels, in [0, 1].
    """

    def __init__(self, share: Share = 0.2) -> None:
        super().__init__()
        within("share", share, 0, 1)
        self.share = share

    @override
    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        chance = draws.uniform(1, *image.shape[2:])
        return torch.where(chance < self.share, (chance < self.share / 2).to(image.dtype), image)


class Masking(Noise):
    """Sets a fraction of the patches to black.

    Args:
        share: fraction of the patches, in [0, 1].
        patch: side of a patch, in pixels; 1 masks single pixels.
    """

    def __init__(self, share: Share = 0.5, patch: PositiveInt = 4) -> None:
        super().__init__()
        within("share", share, 0, 1)
        within("patch", patch, 1)
        self.share, self.patch = share, patch

    @override
    def forward(self, image: Tensor, draws: Draws) -> Tensor:
        height, width = image.shape[2:]
        chance = draws.uniform(1, -(-height // self.patch), -(-width // self.patch))
        masked = (chance < self.share).repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)
        return image.masked_fill(masked[:, :, :height, :width], 0)


class Penalty(Part):
    """Base class of penalties on the code, which are added to the loss in training only."""

    needs_input_gradient = False

    def forward(self, code: Tensor, image: Tensor) -> Tensor:
        """Computes the weighted penalty of a batch, a scalar.

        Args:
            code: input of the decoder, float B×….
            image: input of the encoder, float B×C×H×W.
        """
        raise NotImplementedError


class L1Sparsity(Penalty):
    """L1 sparsity: λ Σ|a| over the activations of the code, averaged over the batch.

    Args:
        weight: λ, in units of the reconstruction loss.
    """

    def __init__(self, weight: NonNegative = 0.1) -> None:
        super().__init__()
        self.weight = weight

    @override
    def forward(self, code: Tensor, image: Tensor) -> Tensor:
        return self.weight * code.abs().flatten(1).sum(1).mean()


class KLSparsity(Penalty):
    """λ Σ KL(ρ ‖ ρ̂) over the units, where ρ̂ is the mean activation of a unit over the batch of a process (Ng 2011,
    CS294A lecture notes, section 3). Requires activations in [0, 1], as of a bottleneck with a sigmoid; in a map,
    channels are units.

    Args:
        target: ρ, the target activation, in (0, 1).
        weight: λ, in units of the reconstruction loss.
    """

    def __init__(self, target: Positive = 0.05, weight: NonNegative = 1.0) -> None:
        super().__init__()
        within("target", target, 1e-6, 1 - 1e-6)
        self.target, self.weight = target, weight

    @override
    def forward(self, code: Tensor, image: Tensor) -> Tensor:
        mean = code.flatten(2).mean((0, 2)) if code.ndim > 2 else code.mean(0)
        mean, rho = mean.clamp(1e-6, 1 - 1e-6), self.target
        divergence = rho * (rho / mean).log() + (1 - rho) * ((1 - rho) / (1 - mean)).log()
        return self.weight * divergence.sum()


class Contractive(Penalty):
    """Contractive penalty λ ‖∂code/∂image‖²_F (Rifai et al. 2011, ICML), estimated by one random projection per image:
    for v from N(0, 1), the expectation of ‖vᵀJ‖² is ‖J‖²_F. The image is the network's normalised input.

    Args:
        weight: λ, in units of the reconstruction loss.
    """

    needs_input_gradient = True

    def __init__(self, weight: NonNegative = 0.1) -> None:
        super().__init__()
        self.weight = weight

    @override
    def forward(self, code: Tensor, image: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(code, image, torch.randn_like(code), create_graph=True)
        return self.weight * product.square().flatten(1).sum(1).mean()
