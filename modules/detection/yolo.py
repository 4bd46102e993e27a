"""An anchor-free one-stage detector of the YOLO family."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.ops import box_iou, complete_box_iou_loss
from typing_extensions import override

from modules.detection.detector import OneStageDetector, default_strides, ignored
from modules.networks.pyramid import aligned
from modules.processes import mean_over_processes
from modules.ranges import PositiveInt
from modules.training_data import Batch
from modules.warm_start import ClassRows

PRIOR = 0.01  # initial probability of an object at a location (Lin et al. 2017, arXiv:1708.02002)
NEAREST = -1.0  # minimum distance of a side, in strides; negative for locations next to thin objects


class YOLO(OneStageDetector):
    """YOLO, you only look once (Redmon et al. 2016, arXiv:1506.02640), with later improvements.

    Each location of each map predicts the distances to the four sides of its object, and the probability of each class.
    Distances are predicted as distributions (Li et al. 2020, arXiv:2006.04388). Classes and boxes have separate
    branches, shared by all maps except for their normalisation (Ge et al. 2021, arXiv:2107.08430; Lyu et al. 2022,
    arXiv:2212.07784). The maps are fused top-down and bottom-up (Liu et al. 2018, arXiv:1803.01534). Objects are
    assigned to locations by their predictions, see `assign`. The class loss has the quality of the box as its target;
    the box loss is complete IoU (Zheng et al. 2020, arXiv:1911.08287) plus the distribution focal loss. The weights of
    class, box and distribution are those of Xu et al. 2022 (arXiv:2203.16250): 1, 2.5 and 0.5.

    Args:
        strides: strides of the feature maps; by default three, from 4 on up to 256 pixels, otherwise from 8 on.
        width: channels of neck and branches.
        depth: number of 3×3 convolutions in each branch.
        bins: number of bins of a side's distribution, one stride each, from -1 on.
        norm: ``batch`` normalisation, or ``group`` normalisation, which does not depend on the batch.
    """

    class_layers: ClassVar[Mapping[str, ClassRows]] = {"class_branch.last": ClassRows()}

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int | str,
        strides: list[int] | None = None,
        width: PositiveInt = 64,
        depth: PositiveInt = 2,
        bins: PositiveInt = 16,
        norm: Literal["batch", "group"] = "batch",
    ) -> None:
        strides = strides or default_strides(image_size)
        options = {"width": width, "depth": depth, "bins": bins, "norm": norm}
        super().__init__(backbone, num_classes, image_size, strides, options)
        self.bins, levels = bins, range(len(strides))
        self.lateral = nn.ModuleList(_Conv(channels, width, 1, norm=norm) for channels in self.pyramid.channels)
        self.top_down = nn.ModuleList(_Conv(width, width, norm=norm) for _ in levels[1:])
        self.down = nn.ModuleList(_Conv(width, width, stride=2, norm=norm) for _ in levels[1:])
        self.bottom_up = nn.ModuleList(_Conv(width, width, norm=norm) for _ in levels[1:])
        self.class_branch = _Branch(width, depth, num_classes, len(strides), norm)
        self.box_branch = _Branch(width, depth, 4 * bins, len(strides), norm)
        nn.init.constant_(self.class_branch.last.bias, -math.log(1 / PRIOR - 1))
        # Initially a distribution is about two strides wide on each side.
        self.box_branch.last.bias.data = -0.25 * torch.arange(bins).float().repeat(4)

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """See `Detector.forward`.

        Returns:
            For all A locations of all maps: logits of the classes, float B×A×K; logits of the distances to left, top,
            right and bottom, float B×A×4×R; the locations, float A×2 (x, y) in pixels; their strides, float A.
        """
        read = aligned(self.pyramid(features), self.pyramid.strides, exact=False)
        maps = [lateral(x) for lateral, x in zip(self.lateral, read, strict=True)]
        for i in range(len(maps) - 2, -1, -1):
            maps[i] = self.top_down[i](maps[i] + F.interpolate(maps[i + 1], maps[i].shape[2:]))
        for i in range(1, len(maps)):
            maps[i] = self.bottom_up[i - 1](maps[i] + self.down[i - 1](maps[i - 1]))
        classes = torch.cat([self.class_branch(x, i).flatten(2) for i, x in enumerate(maps)], 2).transpose(1, 2)
        sides = torch.cat([self.box_branch(x, i).flatten(2) for i, x in enumerate(maps)], 2).transpose(1, 2)
        points, strides = cell_centres([tuple(x.shape[2:]) for x in maps], self.pyramid.strides, classes.device)
        return classes.float(), sides.float().unflatten(2, (4, self.bins)), points, strides

    @override
    def dense(self, outputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        classes, sides, points, strides = outputs
        return self.within(decode_boxes(sides, points, strides)), classes.sigmoid()

    @override
    def losses(self, outputs: tuple[Tensor, Tensor, Tensor, Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        classes, sides, points, strides = outputs
        counted = [~ignore for ignore in batch["ignore"]]
        boxes, labels = (
            pad_sequence([value[keep] for value, keep in zip(batch[key], counted, strict=True)], batch_first=True)
            for key in ("boxes", "labels")
        )
        real = pad_sequence([torch.ones_like(keep[keep]) for keep in counted], batch_first=True)
        guesses = decode_boxes(sides, points, strides)
        matched, quality = assign(classes.sigmoid(), guesses, points, strides, boxes, labels, real)
        target = torch.zeros_like(classes)
        hit = matched >= 0
        image, place = hit.nonzero(as_tuple=True)
        row = matched[image, place]
        weight = quality[image, place]
        target[image, place, labels[image, row]] = weight
        doubt = quality_focal_loss(classes, target).sum(2) * ~(ignored(points, batch) & ~hit)
        truth = boxes[image, row]
        overlap = complete_box_iou_loss(guesses[image, place], truth)
        distances = torch.cat((points[place] - truth[:, :2], truth[:, 2:] - points[place]), 1) / strides[place, None]
        spread = distribution_focal_loss(sides[image, place], distances - NEAREST)
        total = mean_over_processes(weight.sum()).clamp(min=1)
        parts = {"class": doubt.sum(), "box": 2.5 * (overlap * weight).sum(), "spread": 0.5 * (spread * weight).sum()}
        return {key: value / total for key, value in parts.items()}, total


def cell_centres(
    sizes: Sequence[tuple[int, ...]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the centres of the cells of feature maps.

    Returns:
        The centre of each cell, float A×2 (x, y) in pixels of the input, and its stride, float A; row by row, map by
        map.
    """
    points, steps = [], []
    for (height, width), stride in zip(sizes, strides, strict=True):
        y, x = ((torch.arange(side, device=device) + 0.5) * stride for side in (height, width))
        points.append(torch.stack((x.repeat(height), y.repeat_interleave(width)), 1))
        steps.append(torch.full((height * width,), float(stride), device=device))
    return torch.cat(points), torch.cat(steps)


def decode_boxes(sides: Tensor, points: Tensor, strides: Tensor) -> Tensor:
    """Decodes boxes from the distributions of their distances: the expected distances.

    Args:
        sides: logits, float B×A×4×R; bin r stands for r - 1 strides.
        points: float A×2.
        strides: float A.

    Returns:
        float B×A×4, xyxy in pixels.
    """
    bins = torch.arange(sides.shape[-1], device=sides.device, dtype=sides.dtype) + NEAREST
    distances = sides.softmax(-1) @ bins * strides[:, None]
    return torch.cat((points - distances[..., :2], points + distances[..., 2:]), -1)


def quality_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Quality focal loss: binary cross-entropy towards a quality, reduced for good predictions (Li et al. 2020,
    equation 5, with β = 2).

    Args:
        logits: float, any shape.
        target: float in [0, 1], the same shape; 0 for negatives.

    Returns:
        Loss of the same shape.
    """
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (target - logits.sigmoid()).square() * entropy


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Distribution focal loss: cross-entropy towards the two bins next to a distance, weighted by proximity (Li et al.
    2020, equation 6).

    The entropy of the target is subtracted, which changes no gradient, so that the loss of a perfect prediction is 0.

    Args:
        logits: float N×4×R.
        target: float N×4, in bins; clipped to 0 … R - 1.

    Returns:
        float N, averaged over the four sides.
    """
    target = target.clamp(0, logits.shape[-1] - 1 - 1e-3)
    low = target.long()
    share = target - low
    likely = logits.log_softmax(-1)
    near, far = (likely.gather(-1, index[..., None])[..., 0] for index in (low, low + 1))
    entropy = -(share.xlogy(share) + (1 - share).xlogy(1 - share))
    return (-(near * (1 - share) + far * share) - entropy).mean(-1)


@torch.no_grad()
def assign(
    scores: Tensor,
    guesses: Tensor,
    points: Tensor,
    strides: Tensor,
    boxes: Tensor,
    labels: Tensor,
    real: Tensor,
    top: int = 13,
    alpha: float = 1.0,
    beta: float = 6.0,
) -> tuple[Tensor, Tensor]:
    """Task-aligned assignment (Feng et al. 2021, arXiv:2108.07755, section 3.2).

    An object is assigned to the ``top`` locations in its box with the highest t = s^α·u^β of class score s and overlap
    u (IoU); a location that is assigned to several objects keeps the one with the largest overlap. The target score is
    t, scaled so that the largest t of an object becomes its largest u. Boxes narrower than a cell count as a cell wide,
    so that every object gets a location.

    Args:
        scores: predicted scores, float B×A×K in [0, 1].
        guesses: predicted boxes, float B×A×4.
        points: locations, float A×2.
        strides: their strides, float A.
        boxes: true boxes, float B×M×4, padded.
        labels: their classes, int64 B×M, padded.
        real: False for padding, bool B×M.
        top: maximum number of locations per object.
        alpha: exponent of the score.
        beta: exponent of the overlap.

    Returns:
        For each location the index of its object or -1, int64 B×A, and the quality in [0, 1], 0 without an object,
        float B×A.
    """
    batch, places, count = *guesses.shape[:2], boxes.shape[1]
    if count == 0:
        return torch.full((batch, places), -1, device=boxes.device), guesses.new_zeros(batch, places)
    middle, half = (boxes[..., :2] + boxes[..., 2:]) / 2, (boxes[..., 2:] - boxes[..., :2]) / 2
    reach = half[:, :, None].maximum(strides[:, None] / 2)  # B×M×A×2
    near = ((points - middle[:, :, None]).abs() <= reach).all(-1) & real[..., None]
    overlap = torch.stack([box_iou(one, other) for one, other in zip(boxes, guesses, strict=True)])  # B×M×A
    overlap = overlap.nan_to_num(0).clamp(0, 1)
    score = scores.transpose(1, 2).gather(1, labels[..., None].expand(-1, -1, places))
    fit = (score**alpha * overlap**beta + 1e-12) * near
    best, where = fit.topk(min(top, places), 2)
    wanted = torch.zeros_like(near).scatter_(2, where, best > 0)
    most, matched = overlap.masked_fill(~wanted, -1).max(1)
    matched[most < 0] = -1
    own = wanted & (matched[:, None] == torch.arange(count, device=boxes.device)[:, None])
    fit, overlap = fit * own, overlap * own
    quality = fit / fit.amax(2, keepdim=True).clamp(min=1e-12) * overlap.amax(2, keepdim=True)
    return matched, quality.amax(1)


class _Conv(nn.Sequential):
    """Convolution, normalisation, SiLU."""

    def __init__(self, in_chans: int, width: int, kernel: int = 3, stride: int = 1, norm: str = "batch") -> None:
        convolution = nn.Conv2d(in_chans, width, kernel, stride, kernel // 2, bias=False)
        super().__init__(convolution, _norm(norm, width), nn.SiLU(inplace=True))


def _norm(kind: str, width: int) -> nn.Module:
    return nn.BatchNorm2d(width) if kind == "batch" else nn.GroupNorm(min(8, width), width)


class _Branch(nn.Module):
    """Convolutions shared by all maps, with separate normalisation per map, and a linear last layer."""

    def __init__(self, width: int, depth: int, out_chans: int, levels: int, norm: str) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(depth))
        self.norms = nn.ModuleList(nn.ModuleList(_norm(norm, width) for _ in range(depth)) for _ in range(levels))
        self.last: Any = nn.Conv2d(width, out_chans, 1)
        nn.init.normal_(self.last.weight, std=0.01)

    def forward(self, x: Tensor, level: int) -> Tensor:
        norms: Any = self.norms[level]
        for conv, norm in zip(self.convs, norms, strict=True):
            x = F.silu(norm(conv(x)))
        return self.last(x)
