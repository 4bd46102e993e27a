"""GAN Dissection: the role of a generator's units (Bau et al. 2019, arXiv:1811.10597).

A unit is a channel of a layer. If its feature map matches the segmentation of a class in the generated images, the unit
represents that class; whether it causes the class is tested by switching the unit off and on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = 1 - torch.logspace(-0.3, -2.7, 25)  # quantiles of a unit's values that are tried as thresholds: 0.5 to 0.998
Segment = Callable[[Tensor], Tensor]  # maps float B×C×H×W in [-1, 1] to classes, int64 B×H×W
Batches = Sequence[tuple[Tensor, Tensor | None]]  # noise, and labels of a conditional generator


@dataclass(frozen=True)
class Layer:
    """Results of a layer with C units, for K classes.

    Args:
        name: name in the generator.
        iou: float C×K: IoU of the pixels where a unit is above its threshold with those of a class.
        threshold: float C×K: the threshold for that class.
        on: float C×K: mean of a unit over the pixels of a class; its overall mean if the class never occurs.
    """

    name: str
    iou: Tensor
    threshold: Tensor
    on: Tensor

    def best(self, label: int, count: int) -> list[int]:
        """Returns the units with the highest IoU for a class."""
        return self.iou[:, label].topk(min(count, len(self.iou))).indices.tolist()


@dataclass(frozen=True)
class Effect:
    """Fraction of pixels of a class under interventions.

    Args:
        plain: without intervention.
        off: with the class's units set to zero everywhere.
        on: with the units set everywhere to their mean over the class's pixels.
        control: with as many random other units set to zero.
    """

    plain: float
    off: float
    on: float
    control: float

    @property
    def causal(self) -> float:
        """Average causal effect, equation 3 of the paper."""
        return self.on - self.off


def dissectible_layers(generator: nn.Module, noise: Tensor, label: Tensor | None) -> list[str]:
    """Returns the layers that can be dissected: rectifiers with feature maps, in order.

    Raises:
        ValueError: there are none.
    """
    found: list[str] = []
    rectifiers = {name: part for name, part in generator.named_modules() if isinstance(part, nn.ReLU | nn.LeakyReLU)}
    hooks = [
        part.register_forward_hook(
            lambda _, __, maps, name=name: found.append(name) if maps.ndim == 4 and maps.shape[-1] > 1 else None
        )
        for name, part in rectifiers.items()
    ]
    try:
        with torch.no_grad():
            generator(noise, label)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("This generator has no feature maps to dissect: use a convolutional one.")
    return found


@contextmanager
def _kept(part: nn.Module) -> Iterator[list[Tensor]]:
    """Collects the outputs of a layer."""
    maps: list[Tensor] = []
    hook = part.register_forward_hook(lambda _, __, made: maps.append(made))
    try:
        yield maps
    finally:
        hook.remove()


@contextmanager
def switched(part: nn.Module, channels: Sequence[int], values: Tensor) -> Iterator[None]:
    """Fixes channels of a layer at given values, float N."""

    def hold(_: nn.Module, __: object, maps: Tensor) -> Tensor:
        held = maps.clone()
        held[:, list(channels)] = values.to(maps)[None, :, None, None]
        return held

    hook = part.register_forward_hook(hold)
    try:
        yield
    finally:
        hook.remove()


def agreement(n11: Tensor, n1: Tensor, m1: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Computes the agreement of two sets of pixels.

    Args:
        n11: number of pixels in both.
        n1: number of pixels in the first.
        m1: number of pixels in the second.
        total: number of all pixels.

    Returns:
        The information quality ratio, mutual information over joint entropy (section 3.1 of the paper), and the IoU; 0
        if undefined.
    """
    joint = torch.stack(torch.broadcast_tensors(n11, n1 - n11, m1 - n11, total - n1 - m1 + n11)).double() / total
    one, other = (joint[0] + joint[1], joint[0] + joint[2])
    even = torch.stack([one * other, one * (1 - other), (1 - one) * other, (1 - one) * (1 - other)])
    entropy = torch.special.entr(joint).sum(0)
    information = torch.where(joint > 0, joint * (joint / even).log(), 0).sum(0)
    quality = torch.where(entropy > 1e-12, information / entropy.clamp_min(1e-12), 0)
    union = (n1 + m1 - n11).double()
    return quality, torch.where(union > 0, n11 / union.clamp_min(1), 0)


@torch.no_grad()
def dissect_layer(generator: nn.Module, name: str, batches: Batches, segment: Segment, num_classes: int) -> Layer:
    """Compares the feature maps of a layer, upsampled to the segmentation's size, with the classes in the images.

    Args:
        generator: maps noise, and labels, to images, float B×C×H×W in [-1, 1].
        name: name of the layer.
        batches: inputs of the generator; used twice.
        segment: segments the images.
        num_classes: number of classes.
    """
    part = generator.get_submodule(name)
    with _kept(part) as maps:
        for noise, label in batches:
            generator(noise, label)
    values = torch.cat([m.transpose(0, 1).flatten(1) for m in maps], 1).float()
    chosen = values[:, torch.linspace(0, values.shape[1] - 1, min(values.shape[1], 100_000)).long()]
    edges = torch.quantile(chosen, LEVELS.to(values), dim=1).T.contiguous()
    units, levels = edges.shape
    counts = torch.zeros(units * (levels + 1) * num_classes, dtype=torch.int64, device=values.device)
    sums, overall = torch.zeros(units, num_classes, device=values.device), values.mean(1)
    for noise, label in batches:
        with _kept(part) as maps:
            seen = segment(generator(noise, label))
        high = F.interpolate(maps[0].float(), seen.shape[1:], mode="bilinear", align_corners=False)
        high, flat = high.transpose(0, 1).flatten(1).contiguous(), seen.flatten()
        place = torch.searchsorted(edges, high)  # number of levels that a value exceeds
        unit = torch.arange(units, device=place.device)[:, None]
        counts += torch.bincount(((unit * (levels + 1) + place) * num_classes + flat).flatten(), minlength=len(counts))
        sums.index_add_(1, flat, high)
    table = counts.view(units, levels + 1, num_classes)
    above = table.flip(1).cumsum(1).flip(1)[:, 1:]  # pixels of a class where the unit exceeds each threshold
    pixels = table[0].sum(0)
    quality, iou = agreement(above, above.sum(2, keepdim=True), pixels, int(pixels.sum()))
    level = quality.argmax(1, keepdim=True)
    on = torch.where(pixels > 0, sums / pixels.clamp_min(1), overall[:, None])
    threshold = edges[:, :, None].expand_as(iou).gather(1, level)[:, 0]
    return Layer(name, iou.gather(1, level)[:, 0], threshold, on)


@torch.no_grad()
def effect(
    generator: nn.Module,
    layer: Layer,
    label: int,
    units: Sequence[int],
    batches: Batches,
    segment: Segment,
    seed: int = 0,
) -> Effect:
    """Measures the effect on a class of switching units off and on, everywhere in the image.

    Args:
        generator: see `dissect_layer`.
        layer: results of the layer.
        label: the class.
        units: the channels.
        batches: inputs of the generator.
        segment: segments the images.
        seed: seed of the control units.
    """
    part, zero = generator.get_submodule(layer.name), torch.zeros(len(units))
    rest = [k for k in range(len(layer.iou)) if k not in set(units)]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[: len(units)]
    others = [rest[k] for k in order.tolist()]

    def share() -> float:
        seen = torch.cat([segment(generator(noise, of)).flatten() for noise, of in batches])
        return float((seen == label).double().mean())

    plain = share()
    with switched(part, units, zero):
        off = share()
    with switched(part, units, layer.on[list(units), label]):
        on = share()
    with switched(part, others, zero[: len(others)]):
        control = share()
    return Effect(plain, off, on, control)
