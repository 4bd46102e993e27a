"""Access to a network's layers: feature maps and filters."""

import difflib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from modules.base import VisionModule
from modules.networks.backbones import computed_whole
from modules.spec import sides


class NotApplicableError(ValueError):
    """The request does not apply to this network; the message says why."""


def stages(module: VisionModule) -> list[str]:
    """Returns the last layers of the backbone's blocks, in order; empty for a network without feature maps."""
    info = getattr(module.backbone, "feature_info", [])
    names = [level["module"] for level in getattr(info, "info", info)]
    known = dict(module.backbone.named_modules())
    spelt = [(name, name.replace(".", "_"), f"model.{name}") for name in names]  # the latter two in feature pyramids
    return [next(n for n in these if n in known) for these in spelt if not known.keys().isdisjoint(these)]


def find_layer(module: VisionModule, name: str) -> nn.Module:
    """Returns a layer by its name in the backbone, or in the module (``head``).

    Raises:
        ValueError: there is no such layer; the message names similar ones.
    """
    known = dict(module.named_modules()) | dict(module.backbone.named_modules())
    if name not in known or not name:
        near = difflib.get_close_matches(name, known, 3, 0.4)
        hint = f"; near are {', '.join(near)}" if near else ""
        kind = type(module.backbone).__name__
        raise ValueError(
            f"The {kind} has no layer {name!r}; its stages are {', '.join(stages(module)) or 'none'}{hint}."
        )
    return known[name]


class Tap(nn.Module):
    """Records the feature maps of a layer without changing them, also for gradients."""

    def __init__(self, name: str, channels_last: bool, prefix: int, square: bool) -> None:
        super().__init__()
        self.name, self.channels_last, self.prefix, self.square = name, channels_last, prefix, square
        self.maps: Tensor
        self.as_it_is = False  # the layer's output has the format of feature maps

    def forward(self, maps: Tensor) -> Tensor:
        """Records float B×K×H×W."""
        self.maps = maps
        return maps.clone()  # the next layer may modify it in place

    def hook(self, layer: nn.Module, given: Any, result: Any) -> Tensor:
        """Converts the output of a layer to feature maps, and back.

        B×K×H×W is used unchanged; B×H×W×K (Swin) is permuted; tokens B×N×K of a transformer are arranged in a square,
        without its prefix tokens; a vector B×K is a map of one pixel.

        Raises:
            ValueError: it has another format.
        """
        if isinstance(result, Tensor) and result.ndim == 2:
            return self(result[..., None, None])[..., 0, 0]
        if isinstance(result, Tensor) and result.ndim == 4:
            _, a, b, c = result.shape
            if (a == b and (b != c or self.channels_last)) if self.square else self.channels_last:
                return self(result.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            self.as_it_is = True
            return self(result)
        if isinstance(result, Tensor) and result.ndim == 3:
            side = math.isqrt(result.shape[1] - self.prefix)
            if side * side == result.shape[1] - self.prefix:
                whole, places = result[:, : self.prefix], result[:, self.prefix :]
                maps = self(places.transpose(1, 2).unflatten(2, (side, side)))
                return torch.cat([whole, maps.flatten(2).transpose(1, 2)], 1)
        shape = "×".join(map(str, result.shape)) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"The output of {self.name} ({shape}) cannot be shown as maps: choose another layer.")


@contextmanager
def tapped(module: VisionModule, layers: Sequence[str], square: bool | None = None) -> Iterator[dict[str, Tap]]:
    """Context that records the ``maps`` of layers in the last forward pass, with the module in evaluation mode, and all
    layers computed.

    Args:
        module: the network.
        layers: names that `find_layer` accepts.
        square: whether the images, and so the maps, are square; None for the module's image size.

    Raises:
        ValueError: there is no such layer.
    """
    backbone, training = module.backbone, module.training
    if square is None:
        height, width = sides(module.architecture["image_size"])
        square = height == width
    channels_last = str(getattr(backbone, "output_fmt", "NCHW")) == "NHWC"
    prefix = getattr(backbone, "num_prefix_tokens", 0)
    taps = {name: Tap(name, channels_last, prefix, square) for name in layers}
    hooks = [find_layer(module, name).register_forward_hook(tap.hook) for name, tap in taps.items()]
    try:
        with torch.compiler.set_stance("force_eager"), computed_whole(backbone):  # taps are not called in compiled code
            module.eval()
            yield taps
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()


def _run(module: VisionModule, pixels: Tensor, taps: dict[str, Tap]) -> None:
    """Runs the backbone on pixels, float B×C×H×W in [0, 1], or the whole module if a tap needs it."""
    inner = dict(module.backbone.named_modules())
    if all(name in inner for name in taps):
        module.backbone(module.normalize(pixels * module.full))
    else:
        module(pixels * module.full)
    for name, tap in taps.items():
        if len(tap.maps) != len(pixels):
            raise ValueError(
                f"The output of {name} is divided into windows and is not a map of the image: choose another layer."
            )


def _pixels(module: VisionModule, image: Tensor) -> Tensor:
    return image.to(module.device).float() / module.full


@torch.no_grad()
def feature_maps(module: VisionModule, image: Tensor, layers: Sequence[str]) -> dict[str, Tensor]:
    """Computes the feature maps of layers for images.

    Args:
        module: the network.
        image: uint8 B×C×S×S.
        layers: names that `find_layer` accepts.

    Returns:
        Feature maps of each layer, float B×K×H×W.
    """
    with tapped(module, layers) as taps:
        _run(module, _pixels(module, image), taps)
        return {name: tap.maps for name, tap in taps.items()}


def filters(module: VisionModule, layer: str | None = None) -> tuple[str, NDArray[np.float32]]:
    """Returns the kernels of a convolution; for the fully connected first layer of an MLP, its weights as images.

    Args:
        module: the network.
        layer: name of the layer; None for the first.

    Returns:
        The layer's name, and float K×C×h×w.

    Raises:
        NotApplicableError: it has no kernels, or only 1×1 kernels.
        ValueError: there is no such layer.
    """
    found = {layer: find_layer(module, layer)} if layer else dict(module.backbone.named_modules())
    for name, part in found.items():
        weight = getattr(part, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            continue
        if weight.ndim == 2:
            channels, (height, width) = module.architecture["in_chans"], sides(module.architecture["image_size"])
            if weight.shape[1] != channels * height * width:
                raise NotApplicableError(f"{name} is fully connected, and not to the pixels: it has no filters.")
            weight = weight.unflatten(1, (channels, height, width))
        if weight.ndim != 4 or weight.shape[-1] == 1:
            raise NotApplicableError(f"The kernels of {name} are 1×1: there is no pattern in them.")
        return name, weight.detach().float().cpu().numpy()
    raise NotApplicableError(f"{layer or 'The network'} has no filters.")


def check_unit(maps: Tensor, layer: str, channel: int) -> None:
    """Raises a ValueError if a layer, whose maps are float B×K×H×W, has no such channel."""
    if not 0 <= channel < maps.shape[1]:
        raise ValueError(f"{layer} has the channels 0 to {maps.shape[1] - 1}, and no channel {channel}.")
