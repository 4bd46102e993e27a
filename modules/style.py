"""Neural style transfer (Gatys, Ecker & Bethge 2016, doi:10.1109/CVPR.2016.265)."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.measures.images import FixedFeatures

PAPER = [f"features.{n}" for n in (1, 6, 11, 20, 29)], "features.22"  # ReLU of conv1_1 … conv5_1, and of conv4_2


def gram(maps: Tensor) -> Tensor:
    """Computes Gram matrices FFᵀ / (K·h·w) of maps, float B×K×h×w, as float B×K×K; comparable across image sizes."""
    flat = maps.flatten(2)
    return flat @ flat.mT / flat[0].numel()


def content_loss(maps: Tensor, wanted: Tensor) -> Tensor:
    """Computes ½Σ(F − P)² per image from maps, float B×K×h×w, as float B (equation 1)."""
    return 0.5 * (maps - wanted).square().flatten(1).sum(1)


def style_loss(grams: Tensor, wanted: Tensor) -> Tensor:
    """Computes ¼Σ(G − A)² of Gram matrices, as float B: equation 4, whose 1 / (4 K² h² w²) is part of `gram` here."""
    return 0.25 * (grams - wanted).square().flatten(1).sum(1)


def total_variation(image: Tensor) -> Tensor:
    """Computes the mean squared difference of vertical and horizontal neighbours of float B×C×H×W; 0 along a side of
    one pixel."""
    differences = (image.diff(dim=2), image.diff(dim=3))
    return sum((each.square().mean() for each in differences if each.numel()), image.new_zeros(()))


def luminance(image: Tensor) -> Tensor:
    """Converts RGB, float B×3×H×W, to luminance, float B×1×H×W."""
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601-2


def usual_layers(features: FixedFeatures, image: Tensor) -> tuple[list[str], str]:
    """Returns the default style layers and content layer: for VGG19 those of the paper, otherwise all levels of the
    feature pyramid, and the last level with a stride of at most 8 pixels."""
    if features.backbone.split(".")[0] == "vgg19":
        return PAPER
    info = features.network(image).feature_info
    names, strides = info.module_name(), info.reduction()
    return names, [n for n, s in zip(names, strides, strict=True) if s <= max(8, strides[0])][-1]


class StyleLosses(NamedTuple):
    """Scalar losses: the total, and its three parts before weighting."""

    total: Tensor
    content: Tensor
    style: Tensor
    variation: Tensor


class StyleObjective:
    """Computes αL_content + βL_style + γL_variation of images, float B×3×H×W, averaged over them.

    L_content is `content_loss` relative to its value for maps of zeros. L_style is the mean over the layers of
    `style_loss`, normalised in the same way. These normalisers are the paper's w_l: weights are comparable across
    networks and sizes.

    Args:
        features: the network.
        content: default content image of `__call__`, float 1×3×H×W in [0, 1].
        style: style image, float 1×3×h×w in [0, 1].
        style_layers, content_layer: names of layers; None for `usual_layers`.
        weights: α, β and γ.
    """

    def __init__(
        self, features: FixedFeatures, content: Tensor, style: Tensor, style_layers: Sequence[str] | None = None,
        content_layer: str | None = None, weights: tuple[float, float, float] = (1.0, 30.0, 100.0),
    ) -> None:  # fmt: skip
        usual = usual_layers(features, content)
        self.features, self.weights = features, weights
        self.style_layers, self.content_layer = [*(style_layers or usual[0])], content_layer or usual[1]
        with torch.no_grad():
            self._wanted = self._content(content)
            self._grams = {name: gram(maps) for name, maps in features.named(style, self.style_layers).items()}

    @torch.no_grad()
    def _content(self, image: Tensor) -> Tensor:
        return self.features.named(image, [self.content_layer])[self.content_layer]

    def __call__(self, image: Tensor, content: Tensor | None = None) -> StyleLosses:
        """Computes the losses of images with their own content images, or with the default one."""
        wanted = self._wanted if content is None else self._content(content)
        maps = self.features.named(image, [*self.style_layers, self.content_layer])
        content_share = _share(content_loss, maps[self.content_layer], wanted)
        style = torch.stack([_share(style_loss, gram(maps[name]), a) for name, a in self._grams.items()]).mean()
        parts = torch.stack([content_share, style, total_variation(image)])
        return StyleLosses((parts * parts.new_tensor(self.weights)).sum(), *parts)


def _share(loss: Callable[[Tensor, Tensor], Tensor], value: Tensor, wanted: Tensor) -> Tensor:
    return (loss(value, wanted) / loss(torch.zeros_like(wanted), wanted).clamp_min(1e-12)).mean()


def stylize(
    objective: Callable[[Tensor], StyleLosses], start: Tensor, steps: int, method: Literal["lbfgs", "adam"],
    seen: Callable[[int, StyleLosses, Tensor], None],
) -> Tensor:  # fmt: skip
    """Minimises the objective by gradient descent from ``start``, float 1×C×H×W; a single channel is repeated to three.

    ``steps`` counts evaluations of the loss. ``seen`` is called after each with its number from 1 on, its losses and
    its image.
    """
    x, count = start.clone(memory_format=torch.contiguous_format).requires_grad_(), 0
    optimizer: torch.optim.Optimizer = torch.optim.Adam([x], lr=0.02)
    if method == "lbfgs":
        optimizer = torch.optim.LBFGS([x], 1, steps, steps, 0.0, 0.0, 20, "strong_wolfe")  # runs all steps

    def closure() -> float:
        nonlocal count
        optimizer.zero_grad()
        losses = objective(x.expand(-1, 3, -1, -1))
        losses.total.backward()
        count += 1
        seen(count, StyleLosses(*(loss.detach() for loss in losses)), x.detach())
        return losses.total.item()

    for _ in range(1 if method == "lbfgs" else steps):
        optimizer.step(closure)
    return x.detach()
