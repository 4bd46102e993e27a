"""Feature pyramid at the strides that a detector or decoder needs."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.networks import BackboneError
from modules.networks.backbones import freeze_unreached, skip_last

if TYPE_CHECKING:
    from modules.base import VisionModule


class Pyramid(nn.Module):
    """Selects the feature maps of a backbone by stride, and computes missing ones.

    A missing stride is computed from the map with the nearest one: a finer map by transposed convolutions, a coarser
    one by convolutions of stride 2. For a plain ViT, whose maps all have stride 16, this is the simple feature pyramid
    of Li et al. 2022 (arXiv:2203.16527, section 3).

    Args:
        backbone: created with ``features_only``; only its ``feature_info`` is read, it does not become a submodule.
        strides: ascending powers of two.

    Raises:
        BackboneError: the strides are not ascending powers of two.
    """

    def __init__(self, backbone: Any, strides: Sequence[int]) -> None:
        super().__init__()
        if list(strides) != sorted(set(strides)) or any(stride < 1 or stride & (stride - 1) for stride in strides):
            raise BackboneError(
                f"The strides of a detector or decoder must be ascending powers of two, not {list(strides)}."
            )
        channels, reductions = backbone.feature_info.channels(), backbone.feature_info.reduction()
        self.strides, self.channels, self.chosen = list(strides), [], []
        self.adapters = nn.ModuleList()
        for stride in strides:
            # The deepest of several maps with the same stride.
            near = min(range(len(channels)), key=lambda i: (_factor(reductions[i], stride), -i))
            width, factor = channels[near], _factor(reductions[near], stride)
            steps: list[nn.Module] = []
            while factor > 1:
                if reductions[near] > stride:
                    steps += [nn.ConvTranspose2d(width, width, 2, 2), nn.GELU()]
                else:
                    steps += [nn.Conv2d(width, width, 3, 2, 1), nn.GELU()]
                factor /= 2
            self.chosen.append(near)
            self.channels.append(width)
            self.adapters.append(nn.Sequential(*steps))

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Converts all maps of the backbone, float B×C×H×W, to maps at `strides` with `channels`."""
        return [adapter(features[i]) for i, adapter in zip(self.chosen, self.adapters, strict=True)]


def aligned(maps: Sequence[Tensor], strides: Sequence[int], exact: bool = True) -> list[Tensor]:
    """Pads maps with their borders, where convolutions without padding (AlexNet, Inception, …) left them too small to be added
    to those of other strides; others are returned as they are.

    Args:
        maps: float B×C×H×W each, finest first.
        strides: of the maps.
        exact: each side must be that of the coarser map times the ratio of strides; otherwise as many as cover it.
    """

    def fits(fine: int, coarse: int, ratio: int) -> bool:
        return fine == ratio * coarse if exact else coarse == -(-fine // ratio)

    last = strides[-1]
    if all(
        fits(fine.shape[axis], coarse.shape[axis], strides[i + 1] // strides[i])
        for i, (fine, coarse) in enumerate(pairwise(maps))
        for axis in (2, 3)
    ):
        return [*maps]
    cells = [
        max(-(-one.shape[axis] * stride // last) for one, stride in zip(maps, strides, strict=True)) for axis in (2, 3)
    ]
    padded = []
    for one, stride in zip(maps, strides, strict=True):
        down, across = (count * last // stride - side for count, side in zip(cells, one.shape[2:], strict=True))
        padded.append(F.pad(one, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate"))
    return padded


def skip_unread(module: "VisionModule", *pyramids: Pyramid) -> None:
    """Freezes the layers of a module's backbone, in place, after the last map that pyramids read, such as a ResNet's last stage
    if the largest stride is 16, and leaves out their computation; see `skip_last`.

    Args:
        module: a module with feature maps; nothing is done if it shares the backbone of another one.
        pyramids: all that reads the maps.
    """
    last = len(module.backbone.feature_info.channels()) - 1
    chosen = {i for pyramid in pyramids for i in pyramid.chosen}
    if last in chosen or module.shared_maps is not None:
        return
    module.backbone.eval()
    with torch.inference_mode(False), torch.enable_grad():
        maps = module.backbone(module.normalize(torch.zeros(1, module.in_chans, *module.size)))
        unreached = freeze_unreached(module.backbone, [maps[i] for i in chosen])
    module.backbone.train()
    skip_last(module.backbone, unreached)


def _factor(one: int, other: int) -> float:
    return max(one, other) / min(one, other)
