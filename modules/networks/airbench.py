"""The network of airbench94, which trains on CIFAR-10 within seconds on a GPU and within minutes on a CPU."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.networks.base import Network
from modules.processes import mean_over_processes

PATCH = 2  # side of the whitened patches, in pixels


class Whitening(nn.Conv2d):
    """A first convolution that whitens image patches: its maps are decorrelated and have equal variance.

    It has one map for each principal component of the patches, divided by the standard deviation, and one for its
    negative, which a following activation does not cut off. The components are computed from the first training batch,
    over all processes; only the bias is trained.

    Args:
        in_chans: input channels.
        eps: added to the variances, so that components of pure noise stay small.
    """

    ready: Tensor

    def __init__(self, in_chans: int, eps: float = 5e-4) -> None:
        super().__init__(in_chans, 2 * in_chans * PATCH**2, PATCH)
        self.eps = eps
        self.weight.requires_grad_(False)
        self.register_buffer("ready", torch.tensor(0))
        self._whitens = False  # that it is ready, which each step would else have to wait for the device to read

    @override
    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._whitens = False

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolves float B×C×H×W to float B×8C×(H-1)×(W-1)."""
        if self.training and not self._whitens:
            if not self.ready:
                self.weight.copy_(self.whitening(input.detach()))
                self.ready.fill_(1)
            self._whitens = True
        return super().forward(input)

    @torch.no_grad()
    def whitening(self, image: Tensor) -> Tensor:
        """Computes the whitening kernels, float 8C×C×2×2, from images, float B×C×H×W."""
        with torch.autocast(image.device.type, enabled=False):
            patches = F.unfold(image.float(), PATCH).transpose(1, 2).flatten(0, 1)
            moments = patches.T @ patches / len(patches)  # about zero, which normalised images have as their mean
            variances, components = torch.linalg.eigh(mean_over_processes(moments))
        kernels = (components / (variances + self.eps).sqrt()).T.flip(0).reshape(-1, *self.weight.shape[1:])
        return torch.cat([kernels, -kernels])


class Airbench(Network):
    """The network of airbench94 (Jordan 2024, arXiv:2404.00498): whitened patches, then three blocks of two 3×3 convolutions.

    The first convolution of a block is followed by pooling, and each by batch normalisation and GELU. Convolutions are
    initialised as identities (Dirac). The features are the maxima of the last maps, divided by nine, so that logits are
    small at first. Unlike in the published network, batch norms have a learned scale, and the classifier has a bias.

    Args:
        channels: channels of each block; each block halves the side.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        channels: Sequence[int] = (64, 256, 256),
        drop_rate: float = 0.0,
    ) -> None:
        whitening = Whitening(in_chans)
        body: dict[str, nn.Module] = {"stem": nn.Sequential(whitening, nn.GELU())}
        stages, before = list[tuple[str, int, int]](), whitening.out_channels
        for n, after in enumerate(channels, 1):
            first, second = (nn.Conv2d(c, after, 3, padding=1, bias=False) for c in (before, after))
            for conv in (first, second):
                nn.init.dirac_(conv.weight[: conv.in_channels])
            norms = (nn.BatchNorm2d(after) for _ in range(2))
            body[f"block{n}"] = nn.Sequential(
                first, nn.MaxPool2d(2), next(norms), nn.GELU(), second, next(norms), nn.GELU()
            )
            stages.append((f"block{n}", after, 2**n))
            before = after
        neck = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), _Scaled(1 / 9))
        super().__init__(body, neck, before, stages, num_classes, drop_rate)


class _Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor
