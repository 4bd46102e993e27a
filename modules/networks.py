"""The lectures' networks that timm lacks, registered with timm: MLP, LeNet, AlexNet, two of VGG's, GoogLeNet; and a
small convnet."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

Side = int | tuple[int, int]  # timm gives the image size as a pair


class BackboneError(ValueError):
    """A backbone cannot be made; the message names what is wrong and the way out."""


def _side(img_size: Side) -> int:
    return img_size[0] if isinstance(img_size, tuple) else img_size


class Network(nn.Module):
    """A convolutional part, fully connected layers, and a linear classifier, with the methods that timm's models have.

    Args:
        body: the layers of the convolutional part, by name, from the input on.
        neck: turns its result into a vector; the fully connected layers but the last.
        hidden: length of that vector.
        stages: name of a layer, its channels and its reduction of the side, for each level of the feature pyramid.
        num_classes: size of the classifier; 0 leaves the vector.
        drop_rate: dropout before the classifier.
    """

    def __init__(
        self,
        body: Mapping[str, nn.Module],
        neck: nn.Module,
        hidden: int,
        stages: Sequence[tuple[str, int, int]],
        num_classes: int,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self._body = tuple(body)
        for name, layer in body.items():
            self.add_module(name, layer)
        self.neck = neck
        self.head_drop = nn.Dropout(drop_rate)
        self.num_features = stages[-1][1] if stages else hidden
        self.head_hidden_size = hidden
        self.feature_info = [{"module": m, "num_chs": c, "reduction": r} for m, c, r in stages]
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """The last layer."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the last layer; 0 removes it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """The layers from input to output, for layer-wise learning rates."""
        layers = [name for name in self._body if any(True for _ in getattr(self, name).parameters())]
        blocks = [(rf"^{name}\.", (depth,)) for depth, name in enumerate([*layers, "neck", "aux"])]
        return {"stem": r"^$", "blocks": blocks}

    def forward_features(self, image: Tensor) -> Tensor:
        """float B×C×S×S to the result of the convolutional part, float B×K×H×W."""
        for name in self._body:
            image = getattr(self, name)(image)
        return image

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """float B×K×H×W to float B×num_classes, or to the vector before the classifier."""
        features = self.head_drop(self.neck(features))
        return features if pre_logits else self.fc(features)

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×S×S to float B×num_classes."""
        return self.forward_head(self.forward_features(image))


class ScaledTanh(nn.Module):
    """1.7159·tanh(2x/3), the activation of LeCun et al. (1989; 1998, appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        return 1.7159 * torch.tanh(x * (2 / 3))


class MLP(Network):
    """Pixels, two hidden layers, classes: 784-300-100-10 as in LeCun et al. (1998, III.C.3): 266,610 parameters.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels.
        hidden: sizes of the hidden layers.
        drop_rate: dropout before the classifier.
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
        size = in_chans * _side(img_size) ** 2
        for width in hidden:
            layers += [nn.Linear(size, width), nn.ReLU()]
            size = width
        super().__init__({}, nn.Sequential(*layers), size, (), num_classes, drop_rate)


class UntiedConv(nn.Module):
    """A convolution with a bias for each output unit and, for each output map, a choice of input maps.

    Args:
        sources: for each output map the input maps that it sees.
        in_chans: input maps.
        kernel, stride, padding: in pixels.
        side: side of the output maps, in pixels.
    """

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
        """float B×in_chans×H×W to float B×maps×side×side."""
        full = self.weight.new_zeros(self.weight.shape[0], self.in_chans, *self.weight.shape[2:])
        index = self.sources[:, :, None, None].expand_as(self.weight)  # type: ignore[index]
        full = full.scatter(1, index, self.weight)
        return nn.functional.conv2d(x, full, None, self.stride, self.padding) + self.bias


class LeNet1989(Network):
    """The network that read zip codes (LeCun et al. 1989, Neural Computation 1(4)): 9,760 parameters, 16×16 grey images.

    Two strided 5×5 convolutions of 12 maps, each unit with a bias of its own, then 30 units and ten. Each map of the
    second sees eight of the first's; the paper does not say which, here they follow each other cyclically.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, drop_rate: float = 0.0) -> None:
        first = UntiedConv([list(range(in_chans))] * 12, in_chans, 5, 2, 2, 8)
        second = UntiedConv([[(k + i) % 12 for i in range(8)] for k in range(12)], 12, 5, 2, 2, 4)
        body = {"h1": nn.Sequential(first, ScaledTanh()), "h2": nn.Sequential(second, ScaledTanh())}
        neck = nn.Sequential(nn.Flatten(), nn.Linear(192, 30), ScaledTanh())
        super().__init__(body, neck, 30, (("h1", 12, 2), ("h2", 12, 4)), num_classes, drop_rate)


class LeNet4(Network):
    """LeNet-4 (Bottou et al. 1994; LeCun et al. 1998, III.C.5): 4 maps, pooled to 8, 16 maps, 120 units: 16,698 parameters.

    Pooling has a weight and a bias for each map. The papers give no table of connections, only "about 17,000" free
    parameters, which 120 units that see all 16 maps would pass threefold (52,698). Here each sees four of them.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels, at least 12; a rim of two pixels is added, so that 28 is the paper's 32.
        drop_rate: dropout before the classifier.

    Raises:
        BackboneError: the input is too small.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: Side = 28, drop_rate: float = 0.0) -> None:
        side = (_side(img_size) // 2 - 4) // 2
        if side < 1:
            raise BackboneError(
                f"lenet4 needs images of at least 12 pixels, not {_side(img_size)}: set --data.image_size 28."
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

    61,706 parameters for 28×28 grey images and ten classes. (The paper's own has about 60,000: its second convolution
    is not fully connected, its pooling has weights, its output units are radial basis functions.)

    Args:
        num_classes: size of the last layer; 0 leaves the 84 features.
        in_chans: input channels.
        img_size: side of the input, in pixels, at least 12.
        drop_rate: dropout before the last layer.
        form: ``modern`` has ReLU and max pooling, ``published`` tanh and average pooling.

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
        side = (_side(img_size) // 2 - 4) // 2
        if side < 1:
            raise BackboneError(
                f"lenet5 needs images of at least 12 pixels, not {_side(img_size)}: set --data.image_size 28."
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


class ConvNet(Network):
    """A small convnet for small images: 3×3 convolutions with stride 2, group normalisation (Wu & He 2018,
    arXiv:1803.08494, which depends on no other image) and ReLU. Its features are the last map, flattened.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels.
        channels: channels of each convolution, multiples of eight; each halves the side.
        drop_rate: dropout before the classifier.
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
        stages, side, before = list[tuple[str, int, int]](), _side(img_size), in_chans
        for n, after in enumerate(channels, 1):
            conv = nn.Conv2d(before, after, 3, 2, 1, bias=False)
            body[f"block{n}"] = nn.Sequential(conv, nn.GroupNorm(8, after), nn.ReLU())
            stages.append((f"block{n}", after, 2**n))
            side, before = -(-side // 2), after
        super().__init__(body, nn.Flatten(), before * side**2, stages, num_classes, drop_rate)


class DCGAN(Network):
    """The discriminator of DCGAN (Radford et al. 2016, arXiv:1511.06434): 4×4 convolutions of stride 2 and leaky ReLU of
    slope 0.2, until the map is at most four pixels wide. Its features are the last map, flattened.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels.
        width: channels of the first convolution; each further one has twice as many, up to 512.
        norm: batch normalisation behind all convolutions but the first, as published.
        drop_rate: dropout before the classifier.
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
        stages, side, before = list[tuple[str, int, int]](), _side(img_size), in_chans
        while side > 4 or not body:
            after = min(512, width * 2 ** len(body))
            batch_norm = [nn.BatchNorm2d(after)] if norm and body else []
            name = f"block{len(body) + 1}"
            body[name] = nn.Sequential(nn.Conv2d(before, after, 4, 2, 1), *batch_norm, nn.LeakyReLU(0.2))
            stages.append((name, after, 2 ** len(body)))
            side, before = side // 2, after
        if side < 1:
            raise BackboneError("dcgan needs images of at least 2 pixels.")
        super().__init__(body, nn.Flatten(), before * side**2, stages, num_classes, drop_rate)


def _halvings(side: int) -> int:
    """Convolutions of stride 2 of `PatchGAN`: as many as leave the patch within the image, up to three."""
    return 1 + sum(patch <= side for patch in (34, 70))


class PatchGAN(Network):
    """A discriminator that looks at patches (Isola et al. 2017, arXiv:1611.07004; Li & Wand 2016, arXiv:1604.04382): 4×4
    convolutions of stride 2, then one of stride 1. With another one for the score a patch is 16, 34 or 70 pixels wide,
    as far as that is within the image. Its features are the mean over the last map.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels.
        width: channels of the first convolution; each further one has twice as many, up to eight times.
        norm: instance normalisation behind all convolutions but the first, as published.
        drop_rate: dropout before the classifier.
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
        side, before = _side(img_size), in_chans
        if side < 8:
            raise BackboneError("patchgan needs images of at least 8 pixels.")
        halvings = _halvings(side)
        body: dict[str, nn.Module] = {}
        stages = list[tuple[str, int, int]]()
        for k in range(halvings + 1):
            after, last = width * 2 ** min(k, 3), k == halvings
            normed = norm and k > 0
            conv = nn.Conv2d(before, after, 4, 1 if last else 2, "same" if last else 1, bias=not normed)
            body[f"block{k + 1}"] = nn.Sequential(
                conv, *([nn.InstanceNorm2d(after)] if normed else []), nn.LeakyReLU(0.2)
            )
            if k != halvings - 1:  # of two with the same side, the deeper one
                stages.append((f"block{k + 1}", after, 2 ** min(k + 1, halvings)))
            before = after
        neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(body, neck, before, stages, num_classes, drop_rate)


class EqualizedConv2d(nn.Conv2d):
    """A convolution whose weights are drawn from N(0, 1) and scaled at run time, so that an optimiser like Adam moves all
    layers alike (Karras et al. 2018, arXiv:1710.10196, 4.1).

    Args:
        in_chans: input channels.
        out_chans: output channels.
        kernel: side of the kernel.
        padding: rim of zeros.
        gain: the scale is √(gain / inputs of a unit).
    """

    def __init__(self, in_chans: int, out_chans: int, kernel: int, padding: int = 0, gain: float = 2.0) -> None:
        super().__init__(in_chans, out_chans, kernel, padding=padding)
        self.scale = math.sqrt(gain / (in_chans * kernel**2))
        nn.init.normal_(self.weight)
        nn.init.zeros_(self.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """float B×in_chans×H×W to float B×out_chans×H'×W'."""
        return self._conv_forward(x, self.weight * self.scale, self.bias)


def pyramid(side: int, width: int) -> tuple[int, list[int]]:
    """The resolutions of networks that grow: the smallest side, of four to seven pixels, which doubles until it covers an
    image, and the channels at each."""
    steps = max(0, int(math.log2(side / 4)))
    return -(-side // 2**steps), [min(512, width * 2 ** (steps - k)) for k in range(steps + 1)]


class Progressive(Network):
    """The discriminator of Progressive GAN (Karras et al. 2018, arXiv:1710.10196), with the standard deviation over the
    batch as a further map (section 3). ``phase`` says which resolution it looks at, see `modules.decoders.Progressive`;
    images of the full side are reduced to it.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels.
        width: channels at the highest resolution; each further one has twice as many, up to 512.
        drop_rate: dropout before the classifier.
    """

    phase: Tensor

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, img_size: Side = 28, width: int = 32, drop_rate: float = 0.0
    ) -> None:
        start, widths = pyramid(_side(img_size), width)
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
        return self.entries[level](F.adaptive_avg_pool2d(image, self.start * 2**level))

    def forward_features(self, image: Tensor) -> Tensor:
        """float B×C×S×S to float B×K×H×W."""
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


def _fully_connected(channels: int, side: int, width: float, drop_rate: float) -> tuple[nn.Module, int]:
    """The two layers of 4,096 units of AlexNet and VGG."""
    hidden = round(4096 * width)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(side),
        nn.Flatten(),
        nn.Linear(channels * side**2, hidden),
        nn.ReLU(),
        nn.Dropout(drop_rate),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
    ), hidden


class AlexNet(Network):
    """AlexNet as published (Krizhevsky et al. 2012): two groups, local response normalisation, 60,965,224 parameters.

    Up to 64 pixels the first layer loses its stride, and the fully connected part sees 3×3 places instead of 6×6.

    Args:
        num_classes: size of the classifier.
        in_chans: input channels.
        img_size: side of the input, in pixels, at least 28.
        width: factor on all channels.
        drop_rate: dropout in the fully connected part.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: Side = 224,
        width: float = 1.0,
        drop_rate: float = 0.5,
    ) -> None:
        small = _side(img_size) <= 64
        c1, c2, c3, c5 = (2 * round(c * width / 2) for c in (96, 256, 384, 256))
        first = nn.Conv2d(in_chans, c1, 3, padding=1) if small else nn.Conv2d(in_chans, c1, 11, 4, 2)
        body: dict[str, nn.Module] = {
            "conv1": first,
            "pool1": nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0), nn.MaxPool2d(3, 2)),
            "conv2": nn.Conv2d(c1, c2, 5, padding=2, groups=2),
            "pool2": nn.Sequential(nn.ReLU(), nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0), nn.MaxPool2d(3, 2)),
            "conv3": nn.Sequential(nn.Conv2d(c2, c3, 3, padding=1), nn.ReLU()),
            "conv4": nn.Sequential(nn.Conv2d(c3, c3, 3, padding=1, groups=2), nn.ReLU()),
            "conv5": nn.Conv2d(c3, c5, 3, padding=1, groups=2),
            "pool5": nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2)),
        }
        neck, hidden = _fully_connected(c5, 3 if small else 6, width, drop_rate)
        stages = [
            (f"pool{n}", c, 2**k if small else 4 * 2**k) for k, (n, c) in enumerate([(1, c1), (2, c2), (5, c5)], 1)
        ]
        super().__init__(body, neck, hidden, stages, num_classes, drop_rate)


class VGG(Network):
    """The two configurations of VGG (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1) that timm lacks.

    A-LRN is A with local response normalisation (132,863,336 parameters); C is D with 1×1 kernels in the third layers
    (133,638,952). A, B, D and E are timm's ``vgg11``, ``vgg13``, ``vgg16`` and ``vgg19``.

    Args:
        layers: channels of each convolution; negative for a 1×1 kernel, 0 for pooling, None for the normalisation.
        num_classes: size of the classifier.
        in_chans: input channels.
        width: factor on all channels.
        drop_rate: dropout in the fully connected part.
    """

    def __init__(
        self,
        layers: Sequence[int | None],
        num_classes: int = 1000,
        in_chans: int = 3,
        width: float = 1.0,
        drop_rate: float = 0.5,
    ) -> None:
        body: dict[str, nn.Module] = {}
        stages: list[tuple[str, int, int]] = []
        channels, block = in_chans, list[nn.Module]()
        for layer in layers:
            if layer is None:
                block.append(nn.LocalResponseNorm(5, 1e-4, 0.75, 2.0))
            elif layer:
                kernel, wide = (1 if layer < 0 else 3), round(abs(layer) * width)
                block += [nn.Conv2d(channels, wide, kernel, padding=kernel // 2), nn.ReLU()]
                channels = wide
            else:
                name = f"block{len(body) + 1}"
                body[name] = nn.Sequential(*block, nn.MaxPool2d(2))
                stages.append((name, channels, 2 ** len(body)))
                block = []
        neck, hidden = _fully_connected(channels, 7, width, drop_rate)
        super().__init__(body, neck, hidden, stages, num_classes, drop_rate)


class Inception(nn.Module):
    """Four paths side by side: 1×1, 3×3, 5×5, and pooling (Szegedy et al. 2015, figure 2b).

    Args:
        in_chans: input channels.
        sizes: channels as table 1 of the paper lists them: 1×1, 3×3 reduce, 3×3, 5×5 reduce, 5×5, pool projection.
        norm: batch normalisation after each convolution.
    """

    def __init__(self, in_chans: int, sizes: Sequence[int], norm: bool) -> None:
        super().__init__()
        one, reduce3, three, reduce5, five, pool = sizes
        self.out_chans = one + three + five + pool
        self.paths = nn.ModuleList(
            [
                _conv(in_chans, one, 1, norm=norm),
                nn.Sequential(_conv(in_chans, reduce3, 1, norm=norm), _conv(reduce3, three, 3, norm=norm)),
                nn.Sequential(_conv(in_chans, reduce5, 1, norm=norm), _conv(reduce5, five, 5, norm=norm)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), _conv(in_chans, pool, 1, norm=norm)),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        """float B×in_chans×H×W to float B×K×H×W."""
        return torch.cat([path(x) for path in self.paths], 1)


def _conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=not norm)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(out_chans)] if norm else []), nn.ReLU())


class GoogLeNet(Network):
    """GoogLeNet, Inception v1 (Szegedy et al. 2015, arXiv:1409.4842), with its two auxiliary classifiers.

    As published, with biases and without batch normalisation, it has 6,998,552 parameters, and 13,378,280 with the
    auxiliary classifiers, which are there for the training only: in training mode a forward pass leaves their logits in
    ``aux_logits``, and `modules.ClassificationModule` adds their losses with weight 0.3.

    Args:
        num_classes: size of the classifiers.
        in_chans: input channels.
        width: factor on all channels.
        drop_rate: dropout before the classifier.
        norm: batch normalisation after each convolution, instead of local response normalisation.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        width: float = 1.0,
        drop_rate: float = 0.4,
        norm: bool = False,
    ) -> None:
        local = nn.Identity() if norm else nn.LocalResponseNorm(5, 1e-4, 0.75)
        channels = 0

        def conv(given: int, size: int, kernel: int, stride: int = 1) -> nn.Module:
            nonlocal channels
            channels = max(1, round(size * width))
            return _conv(given, channels, kernel, stride, norm)

        def inception(*sizes: int) -> Inception:
            nonlocal channels
            given, wide = channels, [max(1, round(size * width)) for size in sizes]
            channels = wide[0] + wide[2] + wide[4] + wide[5]
            return Inception(given, wide, norm)

        body: dict[str, nn.Module] = {
            "conv1": conv(in_chans, 64, 7, 2),
            "pool1": nn.Sequential(nn.MaxPool2d(3, 2, ceil_mode=True), local),
            "conv2": nn.Sequential(conv(channels, 64, 1), conv(channels, 192, 3), local),
            "pool2": nn.MaxPool2d(3, 2, ceil_mode=True),
            "inception3a": inception(64, 96, 128, 16, 32, 32),
            "inception3b": inception(128, 128, 192, 32, 96, 64),
            "pool3": nn.MaxPool2d(3, 2, ceil_mode=True),
            "inception4a": inception(192, 96, 208, 16, 48, 64),
            "inception4b": inception(160, 112, 224, 24, 64, 64),
            "inception4c": inception(128, 128, 256, 24, 64, 64),
            "inception4d": inception(112, 144, 288, 32, 64, 64),
            "inception4e": inception(256, 160, 320, 32, 128, 128),
            "pool4": nn.MaxPool2d(3, 2, ceil_mode=True),
            "inception5a": inception(256, 160, 320, 32, 128, 128),
            "inception5b": inception(384, 192, 384, 48, 128, 128),
        }
        sizes = {name: layer.out_chans for name, layer in body.items() if isinstance(layer, Inception)}
        stages = [("conv1", max(1, round(64 * width)), 2), ("conv2", max(1, round(192 * width)), 4)]
        stages += [(name, sizes[name], 2**k) for k, name in enumerate(("inception3b", "inception4e", "inception5b"), 3)]
        neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        super().__init__(body, neck, channels, stages, num_classes, drop_rate)
        middle, hidden = max(1, round(128 * width)), max(1, round(1024 * width))
        self.aux = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.AdaptiveAvgPool2d(4), _conv(sizes[name], middle, 1), nn.Flatten(),
                    nn.Linear(16 * middle, hidden), nn.ReLU(), nn.Dropout(0.7), nn.Linear(hidden, num_classes),
                )
                for name in ("inception4a", "inception4d")
            }
            if num_classes
            else {}
        )  # fmt: skip
        self.aux_logits: list[Tensor] = []

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers; 0 removes the main one, so that another head may take its place."""
        super().reset_classifier(num_classes, global_pool)
        for aux in getattr(self, "aux", {}).values():
            if num_classes:
                aux[-1] = nn.Linear(aux[-1].in_features, num_classes)

    def forward_features(self, image: Tensor) -> Tensor:
        """float B×C×S×S to float B×K×H×W; in training mode `aux_logits` holds float B×num_classes twice."""
        self.aux_logits = []
        for name in self._body:
            image = getattr(self, name)(image)
            if self.training and name in self.aux:
                self.aux_logits.append(self.aux[name](image))
        return image


def _cfg(
    side: int = 224, chans: int = 3, classes: int = 1000, first_conv: str = "conv1", **more: Any
) -> dict[str, Any]:
    mean, std = ((0.5,), (0.5,)) if chans == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {
        "input_size": (chans, side, side), "num_classes": classes, "mean": mean, "std": std, "interpolation": "bicubic",
        "crop_pct": 1.0 if chans == 1 else 0.875, "first_conv": first_conv, "classifier": "fc", **more,
    }  # fmt: skip


default_cfgs = generate_default_cfgs(  # where timm's registration looks for them
    {
        "mlp.untrained": _cfg(28, 1, 10, "neck.1", fixed_input_size=True),
        "lenet1989.untrained": _cfg(16, 1, 10, "h1.0"),
        "lenet4.untrained": _cfg(28, 1, 10, "conv1.0", fixed_input_size=True),
        "lenet5.untrained": _cfg(28, 1, 10, fixed_input_size=True),
        "convnet.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "dcgan.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "patchgan.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "progressive.untrained": _cfg(28, 1, 10, "entries.0.0", fixed_input_size=True),
        "alexnet.untrained": _cfg(fixed_input_size=True),
        "vgg11_lrn.untrained": _cfg(first_conv="block1.0"),
        "vgg16_c.untrained": _cfg(first_conv="block1.0"),
        "googlenet.untrained": _cfg(first_conv="conv1.0"),
    }
)


def _build(network: type[Network], name: str, pretrained: bool, levels: int, **kwargs: Any) -> Network:
    return build_model_with_cfg(network, name, pretrained, feature_cfg={"out_indices": tuple(range(levels))}, **kwargs)


@register_model
def mlp(pretrained: bool = False, **kwargs: Any) -> Network:
    """The MLP on pixels, 784-300-100-10."""
    return _build(MLP, "mlp", pretrained, 0, **kwargs)


@register_model
def lenet1989(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet of 1989, for images of 16 pixels."""
    return _build(LeNet1989, "lenet1989", pretrained, 2, **kwargs)


@register_model
def lenet4(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet-4."""
    return _build(LeNet4, "lenet4", pretrained, 2, **kwargs)


@register_model
def lenet5(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet-5; ``form="published"`` for tanh and average pooling."""
    return _build(LeNet5, "lenet5", pretrained, 2, **kwargs)


@register_model
def convnet(pretrained: bool = False, **kwargs: Any) -> Network:
    """The small convnet; ``channels=(32, 64)`` for two convolutions instead of three."""
    levels = len(kwargs.get("channels", (32, 64, 128)))
    return _build(ConvNet, "convnet", pretrained, levels, **kwargs)


@register_model
def dcgan(pretrained: bool = False, **kwargs: Any) -> Network:
    """DCGAN's discriminator; ``norm=True`` for its batch normalisation."""
    return _build(DCGAN, "dcgan", pretrained, 2, **kwargs)


@register_model
def patchgan(pretrained: bool = False, **kwargs: Any) -> Network:
    """PatchGAN, the discriminator of pix2pix and CycleGAN; ``norm=False`` without its instance normalisation."""
    return _build(PatchGAN, "patchgan", pretrained, _halvings(_side(kwargs.get("img_size", 28))), **kwargs)


@register_model
def progressive(pretrained: bool = False, **kwargs: Any) -> Network:
    """Progressive GAN's discriminator."""
    return _build(Progressive, "progressive", pretrained, 1, **kwargs)


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> Network:
    """AlexNet as published."""
    return _build(AlexNet, "alexnet", pretrained, 3, **kwargs)


@register_model
def vgg11_lrn(pretrained: bool = False, **kwargs: Any) -> Network:
    """VGG's configuration A-LRN."""
    layers = (64, None, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
    return _build(VGG, "vgg11_lrn", pretrained, 5, layers=layers, **kwargs)


@register_model
def vgg16_c(pretrained: bool = False, **kwargs: Any) -> Network:
    """VGG's configuration C."""
    layers = (64, 64, 0, 128, 128, 0, 256, 256, -256, 0, 512, 512, -512, 0, 512, 512, -512, 0)
    return _build(VGG, "vgg16_c", pretrained, 5, layers=layers, **kwargs)


@register_model
def googlenet(pretrained: bool = False, **kwargs: Any) -> Network:
    """GoogLeNet with its auxiliary classifiers; ``norm=True`` for batch normalisation."""
    return _build(GoogLeNet, "googlenet", pretrained, 5, **kwargs)
