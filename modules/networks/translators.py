"""Image-to-image networks, and tiled inference for large images."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.networks.parts import Part, within
from modules.ranges import PositiveInt


class Translator(Part):
    """Base class of networks that map an image to an image of the same size."""

    def build(self, in_chans: int, out_chans: int) -> None:
        """Creates the layers.

        Args:
            in_chans: input channels: those of the image, and those that encode the target domain.
            out_chans: output channels.
        """
        raise NotImplementedError

    def forward(self, image: Tensor) -> Tensor:
        """Computes float B×out_chans×H×W, unbounded, from float B×in_chans×H×W."""
        raise NotImplementedError


class _Residual(nn.Module):
    """A residual block of two 3×3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.InstanceNorm2d(width), nn.ReLU(),
            nn.ReflectionPad2d(1), nn.Conv2d(width, width, 3, bias=False), nn.InstanceNorm2d(width),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class ResidualTranslator(Translator):
    """Two convolutions of stride 2, residual blocks, and upsampling (Johnson et al. 2016, arXiv:1603.08155), with
    reflection padding and instance normalisation (Ulyanov et al. 2016, arXiv:1607.08022): the generator of CycleGAN and
    StarGAN.

    Upsampling is nearest-neighbour interpolation followed by a convolution instead of a transposed convolution, which
    avoids checkerboard artefacts. The first convolution is not normalised, since that would remove the constant planes
    that encode the target domain. Images need at least eight pixels; a side that is not divisible by four is padded by
    reflection and cropped again.

    Args:
        width: channels of the first convolution, 64 in the papers; the residual blocks have four times as many.
        blocks: number of residual blocks; in the papers 6 for images of 128 pixels, 9 from 256 on.
    """

    def __init__(self, width: PositiveInt = 64, blocks: PositiveInt = 6) -> None:
        super().__init__()
        within("width", width, 1)
        within("blocks", blocks, 0)
        self.width, self.blocks = width, blocks

    @override
    def build(self, in_chans: int, out_chans: int) -> None:

        def block(before: int, after: int, kernel: int, stride: int = 1, norm: bool = True) -> list[nn.Module]:
            conv = nn.Conv2d(before, after, kernel, stride, bias=not norm)
            normed = [nn.InstanceNorm2d(after)] if norm else []
            return [nn.ReflectionPad2d(kernel // 2), conv, *normed, nn.ReLU()]

        w = self.width
        self.layers = nn.Sequential(
            *block(in_chans, w, 7, norm=False), *block(w, 2 * w, 3, 2), *block(2 * w, 4 * w, 3, 2),
            *(_Residual(4 * w) for _ in range(self.blocks)),
            nn.Upsample(scale_factor=2), *block(4 * w, 2 * w, 3), nn.Upsample(scale_factor=2), *block(2 * w, w, 3),
            nn.ReflectionPad2d(3), nn.Conv2d(w, out_chans, 7),
        )  # fmt: skip

    @property
    def reach(self) -> int:
        """Radius of the receptive field in pixels, apart from the normalisation statistics; a multiple of four."""
        return 20 + 8 * self.blocks

    @override
    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[2:]
        lacking = (0, -width % 4, 0, -height % 4)
        return self.layers(F.pad(image, lacking, mode="reflect"))[..., :height, :width]


def in_pieces(network: Callable[[Tensor], Tensor], image: Tensor, side: int, reach: int, factor: int = 1) -> Tensor:
    """Applies a network to images tile by tile, without seams: the memory does not grow with the image.

    Args:
        network: maps B×C×h×w to B×C×fh×fw; its receptive field must be within ``reach``.
        image: B×C×H×W.
        side: side of the tiles, in pixels; a multiple of the network's stride.
        reach: overlap on each side, in pixels; a multiple of the network's stride.
        factor: f, the scale factor.

    Returns:
        B×C×fH×fW of the images' dtype.
    """
    f, (height, width) = factor, image.shape[-2:]
    result = image.new_empty(*image.shape[:2], f * height, f * width)
    for top in range(0, height, side):
        for left in range(0, width, side):
            y, x = max(0, top - reach), max(0, left - reach)
            made = network(image[..., y : top + side + reach, x : left + side + reach])
            made = made[..., f * (top - y) :, f * (left - x) :]
            place = result[..., f * top : f * (top + side), f * left : f * (left + side)]
            place.copy_(made[..., : place.shape[-2], : place.shape[-1]])
    return result
