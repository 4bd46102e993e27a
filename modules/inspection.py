"""Looking inside a network: its filters and feature maps, what excites a unit, what an answer rests on, how far it sees.

For convolutional networks and transformers alike: what a layer gives out is looked at as maps, float B×K×H×W, however the
network itself lays it out.
"""

import difflib
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from functools import cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from modules.base import VisionModule

CANVASES = (256, 1024, 4096)  # columns on which receptive fields are measured
PLACES = 4  # a map of fewer places a side says little about where


class NotApplicableError(ValueError):
    """What is asked for has no meaning for this network; the message says why."""


class Field(NamedTuple):
    """What the units of a layer see of the image.

    Args:
        size: side of the square that a unit sees, in pixels; None for all of the image.
        stride: pixels from one unit to the next.
        start: first pixel that the first unit sees, negative where it sees the padding.
    """

    size: int | None
    stride: int
    start: int

    def box(self, y: int, x: int, side: int) -> tuple[int, int, int, int]:
        """What the unit at row y and column x sees of an image of this side: left, top, right, bottom in pixels."""
        if self.size is None:
            return 0, 0, side, side
        left, top = (self.start + self.stride * place for place in (x, y))
        return max(0, left), max(0, top), min(side, left + self.size), min(side, top + self.size)


class Patch(NamedTuple):
    """Where a unit was excited: how much, by which image, at which row and column of its map."""

    value: float
    image: int
    y: int
    x: int


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
        raise ValueError(f"What {self.name} gives out ({shape}) cannot be laid out as maps: choose another layer.")


@contextmanager
def tapped(module: VisionModule, layers: Sequence[str], square: bool = True) -> Iterator[dict[str, Tap]]:
    """Taps at layers, which hold the ``maps`` of the last forward pass; the module is in evaluation mode meanwhile.

    Args:
        module: the network.
        layers: names as `find_layer` takes them.
        square: the images are square, so that the maps are.

    Raises:
        ValueError: there is no such layer.
    """
    backbone, training = module.backbone, module.training
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
        module.backbone(module.normalize(pixels * 255))
    else:
        module(pixels * 255)
    for name, tap in taps.items():
        if len(tap.maps) != len(pixels):
            raise ValueError(
                f"What {name} gives out is cut into windows, and no map of an image: choose another layer."
            )


def _pixels(module: VisionModule, image: Tensor) -> Tensor:
    return image.to(module.device).float() / 255


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
            channels, side = (module.architecture[key] for key in ("in_chans", "image_size"))
            if weight.shape[1] != channels * side**2:
                raise NotApplicableError(f"{name} is fully connected, and not to the pixels: it has no filters.")
            weight = weight.unflatten(1, (channels, side, side))
        if weight.ndim != 4 or weight.shape[-1] == 1:
            raise NotApplicableError(f"The kernels of {name} have one pixel: there is no pattern in them.")
        return name, weight.detach().float().cpu().numpy()
    raise NotApplicableError(f"{layer or 'The network'} has no filters.")


class _Spread(TorchFunctionMode):
    """Lets not-a-number spread as convolutions and fully connected layers would, without their arithmetic."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.linear:
            return args[0].sum(-1, keepdim=True).expand(*args[0].shape[:-1], len(args[1]))
        if func is not F.conv2d:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = (
            {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
            | dict(zip(names, args, strict=False))
            | (kwargs or {})
        )
        image, kernel = given["input"], given["weight"].shape[2:]
        reach = [d * (k - 1) for d, k in zip(_pair(given["dilation"]), kernel, strict=True)]
        rim = [(r // 2, r - r // 2) for r in reach] if given["padding"] == "same" else []
        rim = rim or [(0, 0) if given["padding"] == "valid" else (p, p) for p in _pair(given["padding"])]
        groups = F.pad(image.unflatten(1, (given["groups"], -1)).sum(2), (*rim[1], *rim[0]))
        spread = F.max_pool2d(groups, kernel, given["stride"], 0, given["dilation"])
        return spread.repeat_interleave(len(given["weight"]) // given["groups"], 1)


class _Leaky(TorchFunctionMode):
    """Lets a slope pass where a rectifier is shut, so that also a unit at rest can be excited; values stay as they are."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in (F.relu, F.relu6, F.hardtanh, torch.relu):
            return func(*args, **(kwargs or {}))
        top = 6 if func in (F.relu6, F.hardtanh) else math.inf
        leak = 0.1 * args[0]
        return args[0].clamp(0, top) + leak - leak.detach()


def _pair(value: Any) -> tuple[Any, Any]:
    return (value, value) if isinstance(value, int) else (value[0], value[-1])


def receptive_fields(module: VisionModule, layers: Sequence[str]) -> dict[str, Field]:
    """How much of the image a unit in the middle of each layer sees, exactly.

    Not-a-number spreads from a pixel to every unit that depends on it, whatever the weights: the edges of the field are
    found by bisection over the columns that are set to it. Convolutional networks are given a strip, so long that also
    fields beyond the image are measured; a network that takes one size only, that size.

    Args:
        module: the network.
        layers: names in the backbone.

    Returns:
        The field of each layer. (Theory: Araujo et al. 2019, doi:10.23915/distill.00021.)
    """
    side, channels = module.architecture["image_size"], module.architecture["in_chans"]
    twin = deepcopy(module).cpu().float()
    fields: dict[str, Field] = {}
    with torch.no_grad(), tapped(twin, layers) as taps, _Spread():
        twin.backbone(torch.zeros(1, channels, side, side))
    strips = CANVASES if all(tap.as_it_is for tap in taps.values()) else ()
    for height, width in [*((min(side, 64), columns) for columns in strips), (side, side)]:

        @cache
        def reached(first: int, last: int, height: int = height, width: int = width) -> dict[str, tuple[bool, int]]:
            """Whether columns reach the middle unit of each layer, and how many columns the layer has."""
            canvas = torch.zeros(1, channels, height, width)
            canvas[..., first:last] = torch.nan
            with torch.no_grad(), tapped(twin, layers, height == width) as taps, _Spread():
                try:
                    twin.backbone(canvas)
                except (RuntimeError, AssertionError, ValueError):  # fully connected layers of another size
                    if not all(hasattr(tap, "maps") for tap in taps.values()):
                        return {}
            units = {name: tap.maps[0, :, tap.maps.shape[2] // 2] for name, tap in taps.items()}
            return {name: (bool(u[:, u.shape[1] // 2].isnan().any()), u.shape[1]) for name, u in units.items()}

        for name in layers if reached(0, 0) else ():
            if name in fields:
                continue
            first = bisect_left(range(width), True, key=lambda x, name=name: reached(0, x + 1)[name][0])  # type: ignore[misc]
            last = bisect_left(range(width), True, key=lambda x, name=name: not reached(x, width)[name][0])  # type: ignore[misc]
            stride = round(width / reached(0, 0)[name][1])
            whole = (first, last) == (0, width)
            if (first > 0 and last < width) or width == side:
                fields[name] = Field(
                    None if whole else last - first, stride, first - reached(0, 0)[name][1] // 2 * stride
                )
    return {name: fields.get(name, Field(None, 1, 0)) for name in layers}


def class_names(module: VisionModule) -> list[str]:
    """The classes that the module tells apart.

    Raises:
        NotApplicableError: it does not give one score to each class for an image.
    """
    names = module.architecture.get("label_names")
    if not names or not hasattr(module, "head"):
        raise NotApplicableError(
            f"A {type(module).__name__} does not give each image one class: there is no score to explain."
        )
    return list(names)


def chosen_class(module: VisionModule, image: Tensor, label: str | None = None) -> Tensor:
    """The class to explain for each image: the one that is named, or else the one that is predicted; int64 B.

    Raises:
        ValueError: there is no such class.
    """
    names = class_names(module)
    if label is not None and label not in names:
        near = difflib.get_close_matches(label, names, 3, 0.4) or names[:10]
        raise ValueError(f"There is no class {label!r} among the {len(names)}; there is {', '.join(near)}.")
    with torch.no_grad(), tapped(module, []):
        guess = module(image.to(module.device)).argmax(1)
    return guess if label is None else torch.full_like(guess, names.index(label))


def speaking_layer(module: VisionModule, image: Tensor, target: Tensor) -> str:
    """The deepest layer with at least 4×4 places on which the score of a class depends place by place.

    It is a stage, or, in a transformer, the normalised input of a stage's last block: the sum that the blocks add to has
    channels of all sizes, and what a ViT's last block gives out is read at its class token only.

    Args:
        module: a classifier.
        image: uint8 B×C×S×S.
        target: classes, int64 B.

    Raises:
        NotApplicableError: there is none.
    """
    norms = [name for name, part in module.backbone.named_modules()
             if isinstance(part, nn.LayerNorm) and name.endswith(".norm1")]  # fmt: skip
    within = {stage: [name for name in norms if name.startswith(f"{stage}.")] for stage in stages(module)}
    layers = [names[-1] if names else stage for stage, names in within.items()]
    with torch.enable_grad(), tapped(module, layers) as taps:
        scores = module(_pixels(module, image).requires_grad_() * 255)
        score = scores.gather(1, target[:, None]).sum()
        slopes = torch.autograd.grad(score, [tap.maps for tap in taps.values()], allow_unused=True) if layers else ()
    for name, slope in reversed(list(zip(layers, slopes, strict=True))):
        if slope is not None and slope.shape[-1] >= PLACES and slope.any():
            return name
    raise NotApplicableError(f"The {type(module.backbone).__name__} has no maps of at least {PLACES}×{PLACES} places.")


def grad_cam(module: VisionModule, image: Tensor, target: Tensor, layer: str, whole: bool = True) -> Tensor:
    """Where a class is seen: the maps of a layer, each weighted by the mean slope of the score (arXiv:1610.02391, eq. 1, 2).

    Args:
        module: a classifier.
        image: uint8 B×C×S×S.
        target: classes, int64 B.
        layer: the layer whose maps are used, such as `speaking_layer`.
        whole: sum over the maps, and keep what is positive.

    Returns:
        float B×1×H×W, at least 0; or what each map adds, float B×K×H×W.
    """
    from captum.attr import LayerGradCam  # only here: its import takes time

    with torch.enable_grad(), tapped(module, [layer]) as taps:
        method = LayerGradCam(lambda pixels: module(pixels * 255), taps[layer])
        pixels = _pixels(module, image).requires_grad_()
        result = method.attribute(pixels, target, relu_attributions=whole, attr_dim_summation=whole)
    return result.detach()


@torch.no_grad()
def occlusion(module: VisionModule, image: Tensor, target: Tensor, windows: int = 5) -> Tensor:
    """How much the score of a class falls when a part of the image is covered (Zeiler & Fergus 2014, arXiv:1311.2901).

    Args:
        module: a classifier.
        image: uint8 B×C×S×S; it is covered with the median colour of its rim, which most often is background.
        target: classes, int64 B.
        windows: covering windows side by side; they overlap by two thirds.

    Returns:
        float B×1×S×S: the mean over the windows that cover a pixel; negative where the score rises.
    """
    from captum.attr import Occlusion

    pixels = _pixels(module, image)
    rim = torch.cat([pixels[..., (0, -1), :].flatten(2), pixels[..., (0, -1)].flatten(2)], 2).median(2).values
    window = max(2, image.shape[-1] // windows)
    with tapped(module, []):
        result = Occlusion(lambda pixels: module(pixels * 255)).attribute(
            pixels,
            (image.shape[1], window, window),
            (image.shape[1], max(1, window // 3), max(1, window // 3)),
            rim[..., None, None].expand_as(pixels),
            target,
            perturbations_per_eval=max(1, 32 // len(image)),
        )
    return result[:, :1]


def check_unit(maps: Tensor, layer: str, channel: int) -> None:
    """Raises a ValueError where a layer, whose maps are float B×K×H×W, has no such channel."""
    if not 0 <= channel < maps.shape[1]:
        raise ValueError(f"{layer} has the channels 0 to {maps.shape[1] - 1}, and no channel {channel}.")


def top_patches(
    module: VisionModule, images: Tensor, layer: str, channel: int, count: int = 9, batch_size: int = 64
) -> list[Patch]:
    """The images, each at its best place, that excite a unit most (Zeiler & Fergus 2014, arXiv:1311.2901, figure 2).

    Args:
        module: the network.
        images: uint8 N×C×S×S.
        layer, channel: the unit; it is looked for at every place of the map.
        count: how many.
        batch_size: images that go through the network together.

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
    """Makes an image that excites a unit, beginning with faint noise.

    So that it looks like something, the image is made of waves of which the short ones are weak, and in each step moved,
    turned and scaled a little before the network sees it (Olah et al. 2017, doi:10.23915/distill.00007).

    Args:
        module: the network.
        layer, channel: the unit; its mean over the map is raised.
        steps: of Adam.
        rate: Adam's learning rate.
        seed: seed of the noise and of the movements.

    Returns:
        The image, uint8 S×S×C, and the unit's activation at the beginning and at the end.

    Raises:
        ValueError: there is no such unit.
    """
    side, channels = module.architecture["image_size"], module.architecture["in_chans"]
    generator, device = torch.Generator().manual_seed(seed), module.device

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    frequency = torch.sqrt(torch.fft.fftfreq(side)[:, None] ** 2 + torch.fft.rfftfreq(side)[None] ** 2)
    weight = (0.25 / frequency.clamp(min=1 / side)).to(device)
    colours = torch.eye(channels, device=device)
    if channels == 3:  # brightness, red against green, yellow against blue, as strong as in photographs
        colours = torch.tensor([[1.0, 1.0, 1.0], [0.35, -0.35, 0.0], [0.15, 0.15, -0.3]], device=device)
    waves = (0.01 * draw(1, channels, side, side // 2 + 1, 2)).requires_grad_()

    def picture() -> Tensor:
        values = torch.fft.irfft2(torch.view_as_complex(waves) * weight, s=(side, side), norm="ortho")
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


@torch.no_grad()
def pooled_features(module: VisionModule, images: Tensor, batch_size: int = 64) -> NDArray[np.float32]:
    """What the backbone makes of images uint8 N×C×S×S: float N×K, of a feature pyramid the mean of its last maps."""
    parts = []
    with tapped(module, []):
        for batch in images.split(batch_size):
            features = module.backbone(module.normalize(batch.to(module.device)))
            features = features[-1].mean((2, 3)) if isinstance(features, list | tuple) else features
            parts.append(features.float().flatten(1).cpu())
    return torch.cat(parts).numpy()


def project(features: NDArray[np.float32], method: Literal["pca", "tsne"] = "pca") -> NDArray[np.float32]:
    """Lays points float N×K out in the plane, float N×2, by PCA or t-SNE (van der Maaten & Hinton 2008)."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "tsne" and len(features) > 3:
        return TSNE(perplexity=min(30, (len(features) - 1) / 3), init="pca", random_state=0).fit_transform(features)
    flat = PCA(min(2, *features.shape), random_state=0).fit_transform(features)
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))
