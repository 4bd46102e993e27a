"""Bottlenecks of autoencoders: plain, variational and vector-quantised codes."""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.measures.images import gaussian_kl
from modules.networks.parts import Draws, Part, Shape, within
from modules.ranges import NonNegative, PositiveInt, Share


@dataclass
class Code:
    """Output of a bottleneck for a batch.

    Args:
        value: input of the decoder, float B×….
        saved: stored form of the code: numbers, or indices into a codebook as int64.
        loss: loss of the bottleneck, float B, or 0.
        kl: KL divergence of each unit in nats, float B×…, if the code is a distribution.
        mean: mean of the distribution, float B×…; otherwise ``value``.
    """

    value: Tensor
    saved: Tensor
    loss: Tensor | float = 0.0
    kl: Tensor | None = None
    mean: Tensor = field(default_factory=lambda: torch.empty(0))


class Bottleneck(Part):
    """Base class of bottlenecks, which compute a code from features. `build` creates the layers once the features are
    known.

    Args:
        size: size of the code, or channels of a map.
        spatial: keep the code a map, with the height and width of the encoder's last features.
    """

    entries = 0  # size of the codebook
    shape: Shape  # shape of the decoder's input for one image

    def __init__(self, size: PositiveInt = 32, spatial: bool = False) -> None:
        super().__init__()
        within("size", size, 1)
        self.size, self.spatial = size, spatial

    def build(self, features: Shape) -> None:
        """Creates the layers.

        Args:
            features: shape of the features of an image, K×H×W or K.
        """
        raise NotImplementedError

    def _layer(self, features: Shape, size: int) -> nn.Module:
        """Creates a layer from features to ``size`` numbers or channels; sets `shape` for ``self.size`` of them."""
        if self.spatial and len(features) == 3:
            self.shape = (self.size, *features[1:])
            return nn.Conv2d(features[0], size, 1)
        self.shape = (self.size,)
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(features), size))

    @property
    def bits(self) -> float:
        """Number of bits of a stored code: 16 per number."""
        return 16.0 * math.prod(self.shape)

    def load(self, saved: Tensor) -> Tensor:
        """Converts a stored code to the decoder's input."""
        return saved.float().view(saved.shape[0], *self.shape)

    def forward(self, features: Tensor, draws: Draws, progress: float) -> Code:
        """Computes the codes of a batch.

        Args:
            features: float B×K×H×W or B×K.
            draws: random numbers.
            progress: completed fraction of the training, in [0, 1].
        """
        raise NotImplementedError


class Plain(Bottleneck):
    """A code of numbers, with an optional activation.

    Args:
        size: size of the code, or channels of a map.
        spatial: keep the code a map.
        activation: such as ``torch.nn.ReLU`` or `TopK` for a sparse code, ``torch.nn.Sigmoid`` for `KLSparsity`.
        norm: batch normalisation before the activation (Ioffe & Szegedy 2015, arXiv:1502.03167), so that each number
            of a sparse code is among the active ones for some images.
    """

    def __init__(
        self, size: PositiveInt = 32, spatial: bool = False, activation: nn.Module | None = None, norm: bool = False
    ) -> None:
        super().__init__(size, spatial)
        self.activation, self.norm = activation, norm

    @override
    def build(self, features: Shape) -> None:
        self.project = self._layer(features, self.size)
        if self.norm:
            self.normalize = nn.BatchNorm1d(self.size) if len(self.shape) == 1 else nn.BatchNorm2d(self.size)

    @override
    def forward(self, features: Tensor, draws: Draws, progress: float) -> Code:
        value = self.project(features)
        if self.norm:
            value = self.normalize(value)
        if self.activation is not None:
            value = self.activation(value)
        return Code(value, value, mean=value)


class TopK(Part):
    """Keeps the largest activations of each code, if they are positive, and sets the others to zero (Makhzani & Frey
    2014, arXiv:1312.5663): an activation of `Plain` for sparse codes. In a map it compares channels.

    Args:
        active: number of activations to keep.

    >>> TopK(1)(torch.tensor([[0.5, 2.0, -3.0]]))
    tensor([[0., 2., 0.]])
    """

    def __init__(self, active: PositiveInt = 16) -> None:
        super().__init__()
        within("active", active, 1)
        self.active = active

    def forward(self, value: Tensor) -> Tensor:
        """Sparsifies float B×size×…."""
        largest = value.topk(min(self.active, value.shape[1]), 1)
        return torch.zeros_like(value).scatter(1, largest.indices, largest.values.relu())


class Variational(Bottleneck):
    """A variational code: a Gaussian per number, regularised towards N(0, 1) (Kingma & Welling 2014, arXiv:1312.6114;
    β: Higgins et al. 2017).

    The code is sampled in training and for the ELBO in evaluation, with one sample per image; the mean is stored and
    drawn.

    Args:
        size: size of the code, or channels of a map.
        spatial: keep the code a map.
        beta: weight of the KL divergence in the loss.
        warmup: fraction of the training in which the weight rises from zero, in [0, 1].
    """

    def __init__(
        self, size: PositiveInt = 32, spatial: bool = False, beta: NonNegative = 1.0, warmup: Share = 0.1
    ) -> None:
        super().__init__(size, spatial)
        within("beta", beta, 0)
        within("warmup", warmup, 0, 1)
        self.beta, self.warmup = beta, warmup

    @override
    def build(self, features: Shape) -> None:
        self.project = self._layer(features, 2 * self.size)

    @override
    def forward(self, features: Tensor, draws: Draws, progress: float) -> Code:
        mean, log_variance = self.project(features).float().chunk(2, 1)
        log_variance = log_variance.clamp(-15, 15)
        value = mean + (0.5 * log_variance).exp() * draws.normal(*mean.shape[1:])
        kl = gaussian_kl(mean, log_variance)
        weight = self.beta * (min(1.0, progress / self.warmup) if self.warmup else 1.0)
        return Code(value, mean, weight * kl.flatten(1).sum(1), kl, mean)


class VectorQuantized(Bottleneck):
    """A vector-quantised code: the nearest codebook entry at each position of a map (van den Oord et al. 2017,
    arXiv:1711.00937, equation 3).

    The gradient is straight-through. Entries have few dimensions, which keeps more of them in use (Yu et al. 2022,
    arXiv:2110.04627, section 3.2).

    Args:
        entries: size of the codebook.
        size: dimensions of an entry.
        commitment: weight of the commitment loss, which pulls features towards their entries.
    """

    def __init__(self, entries: PositiveInt = 256, size: PositiveInt = 8, commitment: NonNegative = 0.25) -> None:
        super().__init__(size, spatial=True)
        within("entries", entries, 2, 65536)
        self.entries, self.commitment = entries, commitment

    @override
    def build(self, features: Shape) -> None:
        self.project = self._layer(features, self.size)
        self.codebook = nn.Parameter(torch.randn(self.entries, self.size))

    @property
    def bits(self) -> float:
        """Number of bits of a stored code: 8 or 16 per position."""
        return (8.0 if self.entries <= 256 else 16.0) * math.prod(self.shape[1:])

    @override
    def load(self, saved: Tensor) -> Tensor:
        places = self.shape[1:]
        count = saved.shape[0]  # not len, which exporters treat as a constant
        return self.codebook[saved.long()].view(count, -1, self.size).mT.reshape(count, self.size, *places)

    def quantize(self, value: Tensor) -> Tensor:
        """Returns the indices of the nearest codebook entries, int64 B×…, for float B×size×…."""
        flat = value.flatten(2).mT if value.ndim > 2 else value[:, None]
        distance = flat.square().sum(2, keepdim=True) - 2 * flat @ self.codebook.mT + self.codebook.square().sum(1)
        return distance.argmin(2).view(value.shape[0], *value.shape[2:])

    @override
    def forward(self, features: Tensor, draws: Draws, progress: float) -> Code:
        value = self.project(features).float()
        index = self.quantize(value)
        entry = self.load(index)
        pull = F.mse_loss(entry, value.detach(), reduction="none") + self.commitment * F.mse_loss(
            value, entry.detach(), reduction="none"
        )
        return Code(value + (entry - value).detach(), index, pull.flatten(1).sum(1), mean=entry)
