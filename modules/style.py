"""Neural style transfer (Gatys, Ecker & Bethge 2016, doi:10.1109/CVPR.2016.265): one picture painted as another is."""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from modules.measures.images import FixedFeatures

PAPER = [f"features.{n}" for n in (1, 6, 11, 20, 29)], "features.22"  # ReLU of conv1_1 … conv5_1, and of conv4_2


def gram(maps: Tensor) -> Tensor:
    """FFᵀ / (K·h·w) of maps, float B×K×h×w, as float B×K×K: so divided, pictures of other sizes compare."""
    flat = maps.flatten(2)
    return flat @ flat.mT / flat[0].numel()


def content_loss(maps: Tensor, wanted: Tensor) -> Tensor:
    """½Σ(F − P)² of each picture's maps, float B×K×h×w, as float B (equation 1)."""
    return 0.5 * (maps - wanted).square().flatten(1).sum(1)


def style_loss(grams: Tensor, wanted: Tensor) -> Tensor:
    """¼Σ(G − A)² of what `gram` gives, as float B: equation 4, whose 1 / (4 K² h² w²) is in the Gram matrices here."""
    return 0.25 * (grams - wanted).square().flatten(1).sum(1)


def total_variation(image: Tensor) -> Tensor:
    """Mean squared difference of neighbours, down and across, of float B×C×H×W; 0 along a side of one pixel."""
    differences = (image.diff(dim=2), image.diff(dim=3))
    return sum((each.square().mean() for each in differences if each.numel()), image.new_zeros(()))


def luminance(image: Tensor) -> Tensor:
    """Float B×3×H×W in RGB to its brightness, float B×1×H×W."""
    return (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)  # ITU-R 601-2


def usual_layers(features: FixedFeatures, image: Tensor) -> tuple[list[str], str]:
    """The layers for style, and the one for content, where none are named: of VGG19 the paper's, else all levels of the
    pyramid, and the last of them with a stride of at most 8 pixels."""
    if features.backbone.split(".")[0] == "vgg19":
        return PAPER
    info = features.network(image).feature_info
    names, strides = info.module_name(), info.reduction()
    return names, [n for n, s in zip(names, strides, strict=True) if s <= max(8, strides[0])][-1]


class StyleLosses(NamedTuple):
    """Scalars: what is made small, and its three parts before they are weighted."""

    total: Tensor
    content: Tensor
    style: Tensor
    variation: Tensor


class StyleObjective:
    """αL_content + βL_style + γL_variation of pictures, float B×3×H×W; the mean over them.

    L_content is `content_loss` as a share of what maps of zeros would cost, and so is `style_loss` in each layer, of which
    L_style is the mean. These constants are w_l of the paper: weights mean the same in all networks and sizes.

    Args:
        features: the network.
        content: what `__call__` compares with by itself, float 1×3×H×W in [0, 1].
        style: float 1×3×h×w in [0, 1].
        style_layers, content_layer: names of layers; None takes `usual_layers`.
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
        """The losses of pictures, with contents of their own or the one that was given first."""
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
    """Descends from ``start``, float 1×C×H×W, of which one channel stands for three.

    ``steps`` are evaluations of the losses. ``seen`` is told the number of each from 1 on, its losses, and what they are of.
    """
    x, count = start.clone(memory_format=torch.contiguous_format).requires_grad_(), 0
    optimizer: torch.optim.Optimizer = torch.optim.Adam([x], lr=0.02)
    if method == "lbfgs":
        optimizer = torch.optim.LBFGS([x], 1, steps, steps, 0.0, 0.0, 20, "strong_wolfe")  # it ends by steps alone

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
