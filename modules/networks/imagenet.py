"""Networks for photographs: AlexNet, two configurations of VGG, GoogLeNet."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modules.networks.base import Network, Side, side_of


def _fully_connected(channels: int, side: int, width: float, drop_rate: float) -> tuple[nn.Module, int]:
    """Creates the two layers of 4,096 units of AlexNet and VGG."""
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

    Up to 64 pixels the first layer has no stride, and the fully connected part sees 3×3 positions instead of 6×6.

    Args:
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
        small = side_of(img_size) <= 64
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
    """The two configurations of VGG (Simonyan & Zisserman 2015, arXiv:1409.1556, table 1) that timm does not have.

    A-LRN is A with local response normalisation (132,863,336 parameters); C is D with 1×1 kernels in the third layers
    (133,638,952). A, B, D and E are timm's ``vgg11``, ``vgg13``, ``vgg16`` and ``vgg19``.

    Args:
        layers: channels of each convolution; negative for a 1×1 kernel, 0 for pooling, None for local response
            normalisation.
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
    """An inception block of four parallel paths: 1×1, 3×3, 5×5, and pooling (Szegedy et al. 2015, figure 2b).

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
        """Computes float B×K×H×W from float B×in_chans×H×W."""
        return torch.cat([path(x) for path in self.paths], 1)


def _conv(in_chans: int, out_chans: int, kernel: int, stride: int = 1, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(in_chans, out_chans, kernel, stride, kernel // 2, bias=not norm)]
    return nn.Sequential(*layers, *([nn.BatchNorm2d(out_chans)] if norm else []), nn.ReLU())


class GoogLeNet(Network):
    """GoogLeNet, Inception v1 (Szegedy et al. 2015, arXiv:1409.4842), with its two auxiliary classifiers.

    As published, with biases and without batch normalisation, it has 6,998,552 parameters, and 13,378,280 with the
    auxiliary classifiers, which are used in training only: in training mode, a forward pass stores their logits in
    ``aux_logits``, and `modules.ClassificationModule` adds their losses with weight 0.3.

    Args:
        width: factor on all channels.
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
        self._aux = sizes, max(1, round(128 * width)), max(1, round(1024 * width))
        self.aux = self._auxiliary(num_classes)
        self.aux_logits: list[Tensor] = []

    def _auxiliary(self, num_classes: int) -> nn.ModuleDict:
        sizes, middle, hidden = self._aux
        return nn.ModuleDict(
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

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        if not self.aux:  # as in timm's builder, for weights that have these, but no classifier of their own
            for key in [key for key in state_dict if key.startswith(f"{prefix}aux.")]:
                del state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifiers; 0 removes only the main one, for use with another head."""
        super().reset_classifier(num_classes, global_pool)
        if num_classes and not getattr(self, "aux", True):
            self.aux = self._auxiliary(num_classes)
        for aux in getattr(self, "aux", {}).values():
            if num_classes:
                aux[-1] = nn.Linear(aux[-1].in_features, num_classes)

    def forward_features(self, image: Tensor) -> Tensor:
        """Computes the feature map, float B×K×H×W, from float B×C×S×S; in training mode `aux_logits` holds two float
        B×num_classes."""
        self.aux_logits = []
        for name in self._body:
            image = getattr(self, name)(image)
            if self.training and name in self.aux:
                self.aux_logits.append(self.aux[name](image))
        return image
