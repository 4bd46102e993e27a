"""Discriminators of DCGAN, of pix2pix and CycleGAN, and of Progressive GAN."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks.base import BackboneError, Network, Side, sides_of


class DCGAN(Network):
    """The discriminator of DCGAN (Radford et al. 2016, arXiv:1511.06434): 4×4 convolutions of stride 2 and leaky ReLU
    of slope 0.2, until the feature map is at most four pixels high or wide. Its features are the last map, flattened.

    Args:
        width: channels of the first convolution; doubled at each further one, up to 512.
        norm: batch normalisation after all convolutions but the first, as published.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Side = 28,
        width: int = 32,
        norm: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        body: dict[str, nn.Module] = {}
        stages, (high, wide), before = list[tuple[str, int, int]](), sides_of(img_size), in_chans
        while min(high, wide) > 4 or not body:
            after = min(512, width * 2 ** len(body))
            batch_norm = [nn.BatchNorm2d(after)] if norm and body else []
            name = f"block{len(body) + 1}"
            body[name] = nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), *batch_norm, nn.LeakyReLU(0.2))
            stages.append((name, after, 2 ** len(body)))
            high, wide, before = high // 2, wide // 2, after
        if min(high, wide) < 1:
            raise BackboneError("dcgan needs images of at least 2 pixels.")
        super().__init__(body, nn.Flatten(), before * high * wide, stages, num_classes, drop_rate)


def halvings(side: int) -> int:
    """Returns the number of stride-2 convolutions of `PatchGAN`, at most three, with which the patch fits into the
    image."""
    return 1 + sum(patch <= side for patch in (34, 70))


class PatchGAN(Network):
    """A patch discriminator (Isola et al. 2017, arXiv:1611.07004; Li & Wand 2016, arXiv:1604.04382): 4×4 convolutions
    of stride 2, then one of stride 1. Together with the convolution of the score, patches are 16, 34 or 70 pixels wide,
    the largest that fits into the image. Its features are the mean over the last map.

    Args:
        width: channels of the first convolution; doubled at each further one, up to eight times.
        norm: instance normalisation after all convolutions but the first, as published.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Side = 28,
        width: int = 64,
        norm: bool = True,
        drop_rate: float = 0.0,
    ) -> None:
        side, before = min(sides_of(img_size)), in_chans
        if side < 8:
            raise BackboneError("patchgan needs images of at least 8 pixels.")
        steps = halvings(side)
        body: dict[str, nn.Module] = {}
        stages = list[tuple[str, int, int]]()
        for k in range(steps + 1):
            after, last = width * 2 ** min(k, 3), k == steps
            normed = norm and k > 0
            conv = nn.Conv2d(before, after, 4, 1 if last else 2, "same" if last else 1, bias=not normed)
            body[f"block{k + 1}"] = nn.Sequential(
                conv, *([nn.InstanceNorm2d(after)] if normed else []), nn.LeakyReLU(0.2)
            )
            if k != steps - 1:  # of two with the same stride, only the deeper one
                stages.append((f"block{k + 1}", after, 2 ** min(k + 1, steps)))
            before = after
        neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(body, neck, before, stages, num_classes, drop_rate)


class EqualizedConv2d(nn.Conv2d):
    """Convolution with weights drawn from N(0, 1) and scaled at run time, so that adaptive optimisers like Adam change
    all layers at the same rate (Karras et al. 2018, arXiv:1710.10196, section 4.1).

    Args:
        in_chans: input channels.
        out_chans: output channels.
        kernel: side of the kernel, or its height and width.
        padding: zero padding.
        gain: the scale is √(gain / fan-in).
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: Side, padding: int = 0, gain: float = 2.0) -> None:
        super().__init__(in_chans, out_chans, kernel, padding=padding)
        self.scale = math.sqrt(gain / (in_chans * math.prod(sides_of(kernel))))
        nn.init.normal_(self.weight)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves float B×in_chans×H×W to float B×out_chans×H'×W'."""
        return self._conv_forward(x, self.weight * self.scale, self.bias)


def pyramid(size: tuple[int, int], width: int) -> tuple[tuple[int, int], list[int]]:
    """Returns the resolutions of progressively growing networks: height and width of the smallest, whose shorter side
    has four to seven pixels and which is doubled until it covers the image, and the channels at each resolution.

    >>> pyramid((32, 48), 16)
    ((4, 6), [128, 64, 32, 16])
    """
    steps = max(0, int(math.log2(min(size) / 4)))
    start = -(-size[0] // 2**steps), -(-size[1] // 2**steps)
    return start, [min(512, width * 2 ** (steps - k)) for k in range(steps + 1)]


def at_level(start: tuple[int, int], level: int) -> tuple[int, int]:
    """Returns height and width of a resolution of progressively growing networks, counted from the smallest."""
    return start[0] * 2**level, start[1] * 2**level


class ProgressiveDiscriminator(Network):
    """The discriminator of Progressive GAN (Karras et al. 2018, arXiv:1710.10196), with the minibatch standard
    deviation as an additional map (section 3). ``phase`` sets the current resolution, see
    `modules.networks.decoders.Progressive`; images of the full size are downsampled to it.

    Args:
        width: channels at the highest resolution; doubled at each lower one, up to 512.
    """

    phase: Tensor

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, img_size: Side = 28, width: int = 32, drop_rate: float = 0.0
    ) -> None:
        start, widths = pyramid(sides_of(img_size), width)
        body: dict[str, nn.Module] = {}
        for level in range(len(widths) - 1, 0, -1):
            body[f"block{level}"] = nn.Sequential(
                EqualizedConv2d(widths[level], widths[level], 3, 1), nn.LeakyReLU(0.2),
                EqualizedConv2d(widths[level], widths[level - 1], 3, 1), nn.LeakyReLU(0.2), nn.AvgPool2d(2),
            )  # fmt: skip
        final = EqualizedConv2d(widths[0] + 1, widths[0], 3, 1)
        body["block0"] = nn.Sequential(final, nn.LeakyReLU(0.2))
        stages = [(f"block{k}", widths[k - 1], 2 ** (len(widths) - k)) for k in range(len(widths) - 1, 0, -1)]
        neck = nn.Sequential(EqualizedConv2d(widths[0], widths[0], start), nn.LeakyReLU(0.2), nn.Flatten())
        super().__init__(body, neck, widths[0], stages or [("block0", widths[0], 1)], num_classes, drop_rate)
        self.levels, self.start = len(widths), start
        self.entries = nn.ModuleList(
            nn.Sequential(EqualizedConv2d(in_chans, wide, 1), nn.LeakyReLU(0.2)) for wide in widths
        )
        self.register_buffer("phase", torch.tensor(float(len(widths) - 1)))

    def _entry(self, image: Tensor, level: int) -> Tensor:
        return self.entries[level](F.adaptive_avg_pool2d(image, at_level(self.start, level)))

    def forward_features(self, image: Tensor) -> Tensor:
        """Computes the feature map, float B×K×H×W, from float B×C×S×S."""
        phase = float(self.phase)
        level, share = int(phase), phase - int(phase)
        x = self._entry(image, level)
        if share:
            x = torch.lerp(x, getattr(self, f"block{level + 1}")(self._entry(image, level + 1)), share)
        for k in range(level, 0, -1):
            x = getattr(self, f"block{k}")(x)
        deviation = (x.float().var(0, correction=0) + 1e-8).sqrt().mean().to(x.dtype)
        last = self.get_submodule("block0")
        return last(torch.cat([x, deviation.expand(len(x), 1, *x.shape[2:])], 1))
