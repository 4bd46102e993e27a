"""Preferred inputs of a unit: top patches, and an image from gradient ascent."""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.overrides import TorchFunctionMode

from modules.base import VisionModule
from modules.inspection.taps import _run, check_unit, feature_maps, tapped
from modules.spec import sides


class Patch(NamedTuple):
    """Location of a unit's maximum: value, index of the image, row and column of the feature map."""

    value: float
    image: int
    y: int
    x: int


class _Leaky(TorchFunctionMode):
    """Passes gradients through inactive rectifiers, so that inactive units can be excited; values do not change."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.relu, F.relu6, F.hardtanh, torch.relu):
            return func(*args, **(kwargs or {}))
        top = 6 if func in (F.relu6, F.hardtanh) else math.inf
        leak = 0.1 * args[0]
        return args[0].clamp(0, top) + leak - leak.detach()


def top_patches(
    module: VisionModule, images: Tensor, layer: str, channel: int, count: int = 9, batch_size: int = 64
) -> list[Patch]:
    """Finds the images, each at its best position, that activate a unit most (Zeiler & Fergus 2014, arXiv:1311.2901,
    figure 2).

    Args:
        module: the network.
        images: uint8 N×C×S×S.
        layer: name of the layer.
        channel: the unit; evaluated at every position of the feature map.
        count: number of patches.
        batch_size: images per forward pass.

    Raises:
        ValueError: there is no such unit.
    """
    found: list[Patch] = []
    for start in range(0, len(images), batch_size):
        maps = feature_maps(module, images[start : start + batch_size], [layer])[layer]
        check_unit(maps, layer, channel)
        values, places = maps[:, channel].flatten(1).max(1)
        for i, (value, place) in enumerate(zip(values.tolist(), places.tolist(), strict=True)):
            found.append(Patch(value, start + i, *divmod(place, maps.shape[3])))
        found = sorted(found, key=lambda patch: -patch.value)[:count]
    return found


def gradient_ascent(
    module: VisionModule, layer: str, channel: int, steps: int = 150, rate: float = 0.03, seed: int = 0
) -> tuple[NDArray[np.uint8], float, float]:
    """Optimises an image that activates a unit, starting from faint noise.

    For natural-looking results, the image is parametrised by its Fourier coefficients with high frequencies damped, and
    randomly shifted, rotated and scaled at each step (Olah et al. 2017, doi:10.23915/distill.00007).

    Args:
        module: the network.
        layer: name of the layer.
        channel: the unit, whose mean over the feature map is maximised.
        steps: number of steps of Adam.
        rate: learning rate of Adam.
        seed: seed of the noise and the transformations.

    Returns:
        The image, uint8 H×W×C, and the unit's activation at the beginning and at the end.

    Raises:
        ValueError: there is no such unit.
    """
    (height, width), channels = sides(module.architecture["image_size"]), module.architecture["in_chans"]
    generator, device = torch.Generator().manual_seed(seed), module.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    frequency = torch.sqrt(torch.fft.fftfreq(height)[:, None] ** 2 + torch.fft.rfftfreq(width)[None] ** 2)
    weight = (0.25 / frequency.clamp(min=1 / max(height, width))).to(device)
    colours = torch.eye(channels, device=device)
    if channels == 3:  # luminance, red-green, yellow-blue, scaled as in photographs
        colours = torch.tensor([[1.0, 1.0, 1.0], [0.35, -0.35, 0.0], [0.15, 0.15, -0.3]], device=device)
    waves = (0.01 * draw(1, channels, height, width // 2 + 1, 2)).requires_grad_()

    def picture() -> Tensor:
        values = torch.fft.irfft2(torch.view_as_complex(waves) * weight, s=(height, width), norm="ortho")
        return torch.sigmoid(torch.einsum("bchw,cd->bdhw", values, colours))

    def activation(pixels: Tensor) -> Tensor:
        _run(module, pixels, taps)
        check_unit(tap.maps, layer, channel)
        return tap.maps[0, channel].mean()

    optimizer = torch.optim.Adam([waves], rate)
    with torch.enable_grad(), tapped(module, [layer]) as taps, _Leaky():
        tap = taps[layer]
        before = activation(picture()).item()
        for _ in range(steps):
            angle, scale = 0.1 * draw(1), 1 + 0.08 * draw(1)
            cosine, sine = scale * torch.cos(angle), scale * torch.sin(angle)
            shift = 0.06 * draw(2)
            turn = torch.stack([torch.cat([cosine, -sine, shift[:1]]), torch.cat([sine, cosine, shift[1:]])])
            pixels = picture()
            grid = F.affine_grid(turn[None], list(pixels.shape), align_corners=False)
            moved = F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)
            optimizer.zero_grad()
            (slope,) = torch.autograd.grad(-activation(moved), waves)
            waves.grad = slope
            optimizer.step()
        after = activation(picture()).item()
    image = (picture()[0].detach() * 255).round().byte().permute(1, 2, 0)
    return image.cpu().numpy(), before, after
