"""Networks for small images: an MLP, LeNet of 1989, LeNet-4, LeNet-5, DQN, and a small convnet."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from modules.networks.base import BackboneError, Network, Side, side_of, sides_of


class ScaledTanh(nn.Module):
    """1.7159·tanh(2x/3), the activation of LeCun et al. (1989; 1998, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies the activation elementwise; any shape."""
        return 1.7159 * torch.tanh(x * (2 / 3))


class MLP(Network):
    """Multilayer perceptron on pixels: 784-300-100-10 as in LeCun et al. (1998, III.C.3): 266,610 parameters.

    Args:
        hidden: sizes of the hidden layers.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Side = 28,
        hidden: Sequence[int] = (300, 100),
        drop_rate: float = 0.0,
    ) -> None:
        layers: list[nn.Module] = [nn.Flatten()]
        size = in_chans * math.prod(sides_of(img_size))
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        super().__init__({}, nn.Sequential(*layers), size, (), num_classes, drop_rate)


class Embedding(Network):
    """Embedding of the single pixel of an image, an integer from 0 to 255.

    Args:
        in_chans: must be 1.
        img_size: must be 1.
        width: size of the embedding.

    Raises:
        BackboneError: images have more than one value.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, img_size: Side = 1, width: int = 64, drop_rate: float = 0.0
    ) -> None:
        if in_chans != 1 or side_of(img_size) != 1:
            raise BackboneError("it is for series of numbers, which are images of one grey pixel.")
        super().__init__({}, _Lookup(256, width), width, (), num_classes, drop_rate)


class _Lookup(nn.Embedding):
    def forward(self, x: Tensor) -> Tensor:
        """Embeds float B×1×1×1, integers divided by 255, as float B×width."""
        return super().forward((x.flatten() * 255).round().long())


class UntiedConv(nn.Module):
    """Convolution with a bias for each output unit and, for each output map, a selection of input maps.

    Args:
        sources: for each output map, the indices of its input maps.
        in_chans: number of input maps.
        kernel, stride, padding: in pixels.
        side: side of the output maps, in pixels.
    """

    sources: Tensor

    def __init__(
        self, sources: Sequence[Sequence[int]], in_chans: int, kernel: int, stride: int, padding: int, side: int
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.in_chans = stride, padding, in_chans
        self.register_buffer("sources", torch.tensor(sources), persistent=False)
        fan_in = len(sources[0]) * kernel**2
        spread = 2.4 / fan_in  # LeCun et al. 1989: uniform in ±2.4 / fan-in
        self.weight = nn.Parameter(torch.empty(len(sources), len(sources[0]), kernel, kernel).uniform_(-spread, spread))
        self.bias = nn.Parameter(torch.zeros(len(sources), side, side))

    def forward(self, x: Tensor) -> Tensor:
        """Convolves float B×in_chans×H×W to float B×maps×side×side."""
        full = self.weight.new_zeros(self.weight.shape[0], self.in_chans, *self.weight.shape[2:])
        index = self.sources[:, :, None, None].expand_as(self.weight)
        full = full.scatter(1, index, self.weight)
        return nn.functional.conv2d(x, full, None, self.stride, self.padding) + self.bias


class LeNet1989(Network):
    """The zip-code network of LeCun et al. (1989, Neural Computation 1(4)): 9,760 parameters, 16×16 grey images.

    Two strided 5×5 convolutions of 12 maps, each unit with its own bias, then 30 units and ten. Each map of the second
    sees eight maps of the first; the paper does not list them, here they are assigned cyclically.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, drop_rate: float = 0.0) -> None:
        first = UntiedConv([list(range(in_chans))] * 12, in_chans, 5, 2, 2, 8)
        second = UntiedConv([[(k + i) % 12 for i in range(8)] for k in range(12)], 12, 5, 2, 2, 4)
        body = {"h1": nn.Sequential(first, ScaledTanh()), "h2": nn.Sequential(second, ScaledTanh())}
        neck = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), ScaledTanh())
        super().__init__(body, neck, 30, (("h1", 12, 2), ("h2", 12, 4)), num_classes, drop_rate)


class LeNet4(Network):
    """LeNet-4 (Bottou et al. 1994; LeCun et al. 1998, III.C.5): 4 maps, pooled to 8, 16 maps, 120 units: 16,698 parameters.

    Pooling has a weight and a bias for each map. The papers have no table of connections, only "about 17,000" free
    parameters; with 120 units that see all 16 maps there would be 52,698. Here each unit sees four maps.

    Args:
        img_size: side of the input, in pixels, at least 12; padded by two pixels, so that 28 corresponds to the paper's
            32.

    Raises:
        BackboneError: the input is too small.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: Side = 28, drop_rate: float = 0.0) -> None:
        side = (side_of(img_size) // 2 - 4) // 2
        if side < 1:
            raise BackboneError(
                f"lenet4 needs images of at least 12 pixels, not {side_of(img_size)}: set --data.image_size 28."
            )
        body = {
            "conv1": nn.Sequential(nn.Conv2d(in_chans, 4, 5, padding=2), ScaledTanh()),
            "pool1": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(4, 8, 1, groups=4), ScaledTanh()),
            "conv2": nn.Sequential(nn.Conv2d(8, 16, 5), ScaledTanh()),
            "pool2": nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 16, 1, groups=16), ScaledTanh()),
        }
        neck = nn.Sequential(nn.Conv2d(16, 120, side, groups=4), nn.Flatten(), ScaledTanh())
        super().__init__(body, neck, 120, (("pool1", 8, 2), ("pool2", 16, 4)), num_classes, drop_rate)


class LeNet5(Network):
    """LeNet-5 (LeCun et al. 1998): two 5×5 convolutions (6 and 16 channels), then 120, 84 and ``num_classes`` units.

    61,706 parameters for 28×28 grey images and ten classes. (The original has about 60,000: its second convolution is
    only partially connected, its pooling has weights, its output units are radial basis functions.)

    Args:
        num_classes: size of the last layer; 0 for the 84 features.
        img_size: side of the input, in pixels, at least 12.
        form: ``modern`` with ReLU and max pooling, ``published`` with tanh and average pooling.

    Raises:
        BackboneError: the input is too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Side = 28,
        drop_rate: float = 0.0,
        form: Literal["modern", "published"] = "modern",
    ) -> None:
        side = (side_of(img_size) // 2 - 4) // 2
        if side < 1:
            raise BackboneError(
                f"lenet5 needs images of at least 12 pixels, not {side_of(img_size)}: set --data.image_size 28."
            )
        act, pool = (nn.ReLU, nn.MaxPool2d) if form == "modern" else (ScaledTanh, nn.AvgPool2d)
        body: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(in_chans, 6, 5, padding=2),
            "pool1": nn.Sequential(act(), pool(2)),
            "conv2": nn.Conv2d(6, 16, 5),
            "pool2": nn.Sequential(act(), pool(2)),
        }
        neck = nn.Sequential(nn.Flatten(), nn.Linear(16 * side**2, 120), act(), nn.Linear(120, 84), act())
        super().__init__(body, neck, 84, (("pool1", 6, 2), ("pool2", 16, 4)), num_classes, drop_rate)


class DQN(Network):
    """The convolutions of the deep Q-network (Mnih et al. 2015, doi:10.1038/nature14236), without padding, each with
    ReLU. Its features are the last map, flattened.

    Args:
        convolutions: channels, kernel and stride of each; ``[[16, 3, 1]]`` is the network of MinAtar (Young & Tian
            2019, arXiv:1903.03176).

    Raises:
        BackboneError: the input is too small.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 4,
        img_size: Side = 84,
        convolutions: Sequence[Sequence[int]] = ((32, 8, 4), (64, 4, 2), (64, 3, 1)),
        drop_rate: float = 0.0,
    ) -> None:
        body: dict[str, nn.Module] = {}
        stages, side, before, reduction = list[tuple[str, int, int]](), side_of(img_size), in_chans, 1
        for n, (after, kernel, stride) in enumerate(convolutions, 1):
            body[f"block{n}"] = nn.Sequential(nn.Conv2d(before, after, kernel, stride), nn.ReLU())
            side, before, reduction = (side - kernel) // stride + 1, after, reduction * stride
            stages.append((f"block{n}", after, reduction))
        if side < 1:
            raise BackboneError(
                f"its convolutions do not fit images of {side_of(img_size)} pixels: for those of 10, give "
                "--model.backbone.options.convolutions '[[16, 3, 1]]'."
            )
        super().__init__(body, nn.Flatten(), before * side**2, stages, num_classes, drop_rate)


class ConvNet(Network):
    """A small convnet for small images: 3×3 convolutions of stride 2, group normalisation (Wu & He 2018,
    arXiv:1803.08494), which is independent of the batch, and ReLU. Its features are the last map, flattened.

    Args:
        channels: channels of each convolution, multiples of eight; each halves the side.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Side = 28,
        channels: Sequence[int] = (32, 64, 128),
        drop_rate: float = 0.0,
    ) -> None:
        body: dict[str, nn.Module] = {}
        stages, (height, width), before = list[tuple[str, int, int]](), sides_of(img_size), in_chans
        for n, after in enumerate(channels, 1):
            conv = nn.Conv2d(before, after, 3, 2, 1, bias=False)
            body[f"block{n}"] = nn.Sequential(conv, nn.GroupNorm(8, after), nn.ReLU())
            stages.append((f"block{n}", after, 2**n))
            height, width, before = -(-height // 2), -(-width // 2), after
        super().__init__(body, nn.Flatten(), before * height * width, stages, num_classes, drop_rate)
