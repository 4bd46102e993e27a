"""Decoders from a latent code to an image, for autoencoders and generators."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.networks import BackboneError
from modules.networks.discriminators import EqualizedConv2d, at_level, pyramid
from modules.networks.parts import Part, Shape, within
from modules.ranges import PositiveInt


class Decoder(Part):
    """Base class of decoders from a code to an image. `build` creates the layers once the sizes of code and image are
    known."""

    def build(self, code: Shape, channels: int, size: tuple[int, int]) -> None:
        """Creates the layers.

        Args:
            code: shape of the code of an image, a vector or C×H×W.
            channels: channels of the images.
            size: height and width of the images, in pixels.
        """
        raise NotImplementedError

    def forward(self, code: Tensor) -> Tensor:
        """Decodes float B×code to float B×channels×H×W, unbounded."""
        raise NotImplementedError


Norm = Literal["none", "batch", "pixel"]


class PixelNorm(nn.Module):
    """Normalises the channel vector at each position to a mean square of 1 (Karras et al. 2018, arXiv:1710.10196,
    section 4.2)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises float B×C×…."""
        return x * (x.square().mean(1, keepdim=True) + 1e-8).rsqrt()


def normalization(norm: Norm, channels: int) -> nn.Module:
    """Creates the layer that a `Norm` names, for float B×channels×H×W.

    Raises:
        BackboneError: the name is unknown.
    """
    if norm not in (known := get_args(Norm)):
        raise BackboneError(f"norm of a part must be one of {', '.join(known)}, not {norm!r}.")
    return nn.BatchNorm2d(channels) if norm == "batch" else PixelNorm() if norm == "pixel" else nn.Identity()


class _Doubling(Decoder):
    """Projects the code to a small map and doubles its sides until it covers the image.

    Args:
        width: channels before the last layer; doubled at each step towards the code, up to 512.
        norm: normalisation of each hidden map.
    """

    def __init__(self, width: PositiveInt = 32, norm: Norm = "none") -> None:
        super().__init__()
        within("width", width, 1)
        self.width, self.norm = width, norm

    def _norm(self, channels: int) -> list[nn.Module]:
        return [] if self.norm == "none" else [normalization(self.norm, channels)]

    def _double(self, before: int, after: int) -> nn.Module:
        raise NotImplementedError

    @override
    def build(self, code: Shape, channels: int, size: tuple[int, int]) -> None:
        if len(code) == 3:
            steps = max(0, *(math.ceil(math.log2(side / there)) for side, there in zip(size, code[1:], strict=True)))
        else:  # from a map whose shorter side has four to seven pixels
            start, levels = pyramid(size, self.width)
            steps = len(levels) - 1
        widths = [min(512, self.width * 2 ** (steps - 1 - k)) for k in range(steps)] or [self.width]
        if len(code) == 3:
            self.project: nn.Module = nn.Conv2d(code[0], widths[0], 3, padding=1)
        else:
            dense = nn.Linear(math.prod(code), widths[0] * math.prod(start))
            self.project = nn.Sequential(dense, nn.Unflatten(1, (widths[0], *start)))
        layers: list[nn.Module] = []
        for before, after in zip(widths, [*widths[1:], channels], strict=True):
            layers += [
                *self._norm(before),
                nn.ReLU(),
                self._double(before, after) if steps else nn.Conv2d(before, after, 3, padding=1),
            ]
        self.layers, self.size = nn.Sequential(*layers), size

    @override
    def forward(self, code: Tensor) -> Tensor:
        return self.layers(self.project(code))[..., : self.size[0], : self.size[1]]


class TransposedConvolutions(_Doubling):
    """Linear projection and reshape, then transposed 4×4 convolutions of stride 2 (Radford et al. 2016,
    arXiv:1511.06434, figure 1, by default without its batch normalisation: normalisation removes brightness, and cost
    60 % more error here).

    Args:
        width: channels before the last layer; doubled at each step towards the code, up to 512.
        norm: normalisation of each hidden map.
    """

    def _double(self, before: int, after: int) -> nn.Module:
        return nn.ConvTranspose2d(before, after, 4, 2, 1)


class UpsampledConvolutions(_Doubling):
    """Nearest-neighbour upsampling followed by a 3×3 convolution, which avoids checkerboard artefacts (Odena et al.
    2016, doi:10.23915/distill.00003) at a higher cost.

    Args:
        width: channels before the last layer; doubled at each step towards the code, up to 512.
        norm: normalisation of each hidden map.
    """

    def _double(self, before: int, after: int) -> nn.Module:
        return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1))


class Progressive(Decoder):
    """Grows from a map whose shorter side has four to seven pixels to the image's size (Karras et al. 2018,
    arXiv:1710.10196): all resolutions exist from the start, and ``phase`` sets the current one; between n and n + 1,
    resolution n + 1 is faded in. The output always has the full size: lower resolutions are upsampled.

    Args:
        width: channels at the highest resolution; doubled at each step towards the code, up to 512.
    """

    phase: Tensor

    def __init__(self, width: PositiveInt = 32) -> None:
        super().__init__()
        within("width", width, 1)
        self.width = width

    @override
    def build(self, code: Shape, channels: int, size: tuple[int, int]) -> None:
        start, widths = pyramid(size, self.width)
        self.size, self.levels, (high, wide) = size, len(widths), start
        first = nn.Sequential(
            PixelNorm(), nn.Unflatten(1, (math.prod(code), 1, 1)), nn.ConstantPad2d((wide - 1, wide - 1, high - 1, high - 1), 0.0),
            EqualizedConv2d(math.prod(code), widths[0], start), nn.LeakyReLU(0.2), PixelNorm(),
            EqualizedConv2d(widths[0], widths[0], 3, padding=1), nn.LeakyReLU(0.2), PixelNorm(),
        )  # fmt: skip
        blocks = [
            nn.Sequential(
                nn.Upsample(scale_factor=2), EqualizedConv2d(before, after, 3, padding=1), nn.LeakyReLU(0.2), PixelNorm(),
                EqualizedConv2d(after, after, 3, padding=1), nn.LeakyReLU(0.2), PixelNorm(),
            )
            for before, after in pairwise(widths)
        ]  # fmt: skip
        self.blocks = nn.ModuleList([first, *blocks])
        self.images = nn.ModuleList(EqualizedConv2d(width, channels, 1, gain=1) for width in widths)
        self.start = start
        self.register_buffer("phase", torch.tensor(float(self.levels - 1)))

    def coarsened(self, image: Tensor) -> Tensor:
        """Reduces real images, float B×C×S×S, to the detail of the current phase: between two resolutions they are
        blended like generated ones (section 2), otherwise the finer resolution would give them away."""
        level, share = int(self.phase), float(self.phase) % 1
        coarse = self._coarse(image, level)
        return torch.lerp(coarse, self._coarse(image, level + 1), share) if share else coarse

    def _coarse(self, image: Tensor, level: int) -> Tensor:
        steps = self.levels - 1 - level
        return self._enlarged(F.adaptive_avg_pool2d(image, at_level(self.start, level)), steps) if steps else image

    def _enlarged(self, image: Tensor, steps: int) -> Tensor:
        return F.interpolate(image, scale_factor=2**steps)[..., : self.size[0], : self.size[1]]

    @override
    def forward(self, code: Tensor) -> Tensor:
        phase = float(self.phase)
        level, share = int(phase), phase - int(phase)
        x = code.flatten(1)
        for block in self.blocks[: level + 1]:
            x = block(x)
        image = self.images[level](x)
        if share:
            finer = self.images[level + 1](self.blocks[level + 1](x))
            image = torch.lerp(F.interpolate(image, scale_factor=2), finer, share)
        return self._enlarged(image, self.levels - 1 - level - (share > 0))


class Dense(Decoder):
    """Fully connected layers; without hidden ones, each unit of the code adds an image of its own.

    Args:
        hidden: sizes of the hidden layers.
    """

    def __init__(self, hidden: Sequence[int] = ()) -> None:
        super().__init__()
        self.hidden = tuple(hidden)

    @override
    def build(self, code: Shape, channels: int, size: tuple[int, int]) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        before = math.prod(code)
        for width in self.hidden:
            layers += [nn.Linear(before, width), nn.ReLU()]
            before = width
        self.layers = nn.Sequential(
            *layers, nn.Linear(before, channels * math.prod(size)), nn.Unflatten(1, (channels, *size))
        )

    @override
    def forward(self, code: Tensor) -> Tensor:
        return self.layers(code)
