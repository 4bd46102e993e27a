"""Taps on a network's layers: feature maps and filters."""

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
from modules.spec import sides


class NotApplicableError(ValueError):
    """What is asked for has no meaning for this network; the message says why."""


def stages(module: VisionModule) -> list[str]:
    """The layers after which the backbone's blocks end, from the input on; none for a network without maps."""
    info = getattr(module.backbone, "feature_info", [])
    names = [level["module"] for level in getattr(info, "info", info)]
    known = dict(module.backbone.named_modules())
    spelt = [(name, name.replace(".", "_"), f"model.{name}") for name in names]  # the latter two in feature pyramids
    return [next(n for n in these if n in known) for these in spelt if not known.keys().isdisjoint(these)]


def find_layer(module: VisionModule, name: str) -> nn.Module:
    """A layer by its name in the backbone, or in the module (``head``).

    Raises:
        ValueError: there is none; the message names some that there are.
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
    """Stands behind a layer and lets its maps pass, so that they can be read, and be differentiated by."""

    def __init__(self, name: str, channels_last: bool, prefix: int, square: bool) -> None:
        super().__init__()
        self.name, self.channels_last, self.prefix, self.square = name, channels_last, prefix, square
        self.maps: Tensor
        self.as_it_is = False  # the layer itself gives out maps

    def forward(self, maps: Tensor) -> Tensor:
        """float B×K×H×W."""
        self.maps = maps
        return maps.clone()  # the next layer may work in place

    def hook(self, layer: nn.Module, given: Any, result: Any) -> Tensor:
        """Turns what the layer gave out into maps, and back.

        B×K×H×W is taken as it is; B×H×W×K (Swin) is permuted; of the tokens B×N×K of a transformer those for the whole
        image are set aside and the others laid out as a square; a vector B×K is a map of one place.

        Raises:
            ValueError: it is none of these.
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
    """Taps at layers, which hold the ``maps`` of the last forward pass; the module is in evaluation mode meanwhile.

    Args:
        module: the network.
        layers: names as `find_layer` takes them.
        square: the images are square, so that the maps are; None for those of the module's data.

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
        with torch.compiler.set_stance("force_eager"):  # compiled code would not see the taps
            module.eval()
            yield taps
    finally:
        module.train(training)
        for hook in hooks:
            hook.remove()


def _run(module: VisionModule, pixels: Tensor, taps: dict[str, Tap]) -> None:
    """Lets pixels, float B×C×S×S in [0, 1], pass through the backbone, or through all of the module if a tap needs it."""
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
    """What layers give out for images.

    Args:
        module: the network.
        image: uint8 B×C×S×S.
        layers: names as `find_layer` takes them.

    Returns:
        For each layer its maps, float B×K×H×W.
    """
    with tapped(module, layers) as taps:
        _run(module, _pixels(module, image), taps)
        return {name: tap.maps for name, tap in taps.items()}


def filters(module: VisionModule, layer: str | None = None) -> tuple[str, NDArray[np.float32]]:
    """The kernels of a convolution. For the fully connected first layer of an MLP: its weights, as pictures.

    Args:
        module: the network.
        layer: name of the layer; None takes the first.

    Returns:
        The layer's name, and float K×C×h×w.

    Raises:
        NotApplicableError: it has no kernels, or kernels of one pixel.
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
    """Raises a ValueError where a layer, whose maps are float B×K×H×W, has no such channel."""
    if not 0 <= channel < maps.shape[1]:
        raise ValueError(f"{layer} has the channels 0 to {maps.shape[1] - 1}, and no channel {channel}.")
