"""Base classes of detectors: from feature maps to boxes, labels and scores."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, nms
from typing_extensions import override

from modules.networks.pyramid import Pyramid
from modules.spec import sides
from modules.training_data import Batch
from modules.warm_start import ClassRows

Detections = dict[
    str, Tensor
]  # of one image: boxes float N×4 (xyxy, pixels of the input), labels int64 N, scores float N

CANDIDATES = 1000  # minimum number of candidates for non-maximum suppression
UNSEEN = -1e4  # logit without loss and gradient for negatives
MIN_SCORE = 0.01  # boxes with lower scores do not affect the useful part of a precision-recall curve


class Detector(nn.Module):
    """Base class of detectors on the feature maps of a backbone. A subclass defines the layers, the loss and the
    decoding, and lists in ``class_layers`` the layers with class rows.

    Args:
        backbone: created with ``features_only``; only its ``feature_info`` is read.
        num_classes: number of classes without the background.
        image_size: size of the input; see `modules.spec.sides`.
        strides: strides of the feature maps to use.
        options: the subclass's own arguments, from which it is recreated.
    """

    class_layers: ClassVar[Mapping[str, ClassRows]] = {}
    max_detections = 100  # COCO's limit
    nms_iou = 0.6
    across_classes = False

    def __init__(
        self, backbone: Any, num_classes: int, image_size: int | str, strides: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.num_classes, self.size = num_classes, sides(image_size)
        self.options = {"strides": list(strides), **options}
        self.pyramid = Pyramid(backbone, strides)

    @property
    def multiple(self) -> int:
        """Required divisor of height and width of inputs of another size than ``image_size``: the largest stride."""
        return max(self.pyramid.strides)

    def forward(self, features: Sequence[Tensor]) -> Any:
        """Computes raw outputs, in the format of `losses` and `detect`, from the feature maps of the backbone."""
        raise NotImplementedError

    def losses(self, outputs: Any, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """Computes the terms of the loss, whose sum is minimised, and the number that they are averaged over, all
        scalars.

        Args:
            outputs: result of `forward`.
            batch: ``boxes``, ``labels`` and ``ignore``, lists with one tensor per image.
        """
        raise NotImplementedError

    def detect(self, outputs: Any) -> list[Detections]:
        """Returns at most `max_detections` boxes per image, the most confident first."""
        raise NotImplementedError

    def within(self, boxes: Tensor) -> Tensor:
        """Clips boxes …×4 to the input."""
        height, width = self.size
        return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))

    def choose(self, max_detections: int | None, nms_iou: float | None, across_classes: bool | None) -> None:
        """Sets which boxes are kept; None leaves a setting unchanged.

        Args:
            max_detections: maximum number of boxes per image.
            nms_iou: IoU threshold of non-maximum suppression.
            across_classes: apply non-maximum suppression across classes.
        """
        self.max_detections = self.max_detections if max_detections is None else max_detections
        self.nms_iou = self.nms_iou if nms_iou is None else nms_iou
        self.across_classes = self.across_classes if across_classes is None else across_classes

    def suppressed(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Applies non-maximum suppression to N boxes: returns the indices of at most `max_detections`, the most
        confident first, int64."""
        one = (
            nms(boxes, scores, self.nms_iou)
            if self.across_classes
            else batched_nms(boxes, scores, labels, self.nms_iou)
        )
        return one[: self.max_detections]

    @torch.no_grad()
    def fused(self, views: Sequence[Detections]) -> Detections:
        """Fuses the detections in several views of an image by weighted boxes fusion (Solovyev et al. 2021,
        arXiv:1910.13302).

        A box that non-maximum suppression keeps becomes the mean of itself and the boxes that it suppresses, weighted
        by their scores; its score is the mean over the views, with 0 for a view without such a box.

        Args:
            views: detections in each view, in pixels of the same input.

        Returns:
            At most `max_detections` objects, the most confident first.
        """
        boxes, labels, scores = (torch.cat([one[key] for one in views]) for key in ("boxes", "labels", "scores"))
        owner = torch.cat([labels.new_full((len(one["scores"]),), k) for k, one in enumerate(views)])
        kept = batched_nms(boxes, scores, torch.zeros_like(labels) if self.across_classes else labels, self.nms_iou)
        if not len(kept):
            return {"boxes": boxes, "labels": labels, "scores": scores}
        overlap = box_iou(boxes[kept], boxes)
        if not self.across_classes:
            overlap = overlap * (labels[kept, None] == labels)
        overlap[torch.arange(len(kept)), kept] = 2.0  # each box belongs to its own group
        best, group = overlap.max(0)
        weight = scores * (best > self.nms_iou)
        sums = boxes.new_zeros(len(kept), 5).index_add_(
            0, group, torch.cat((boxes, torch.ones_like(boxes[:, :1])), 1) * weight[:, None]
        )
        seen = scores.new_zeros(len(kept) * len(views)).scatter_reduce_(0, group * len(views) + owner, weight, "amax")
        sure = seen.view(-1, len(views)).mean(1)
        order = sure.argsort(descending=True, stable=True)[: self.max_detections]
        return {"boxes": (sums[:, :4] / sums[:, 4:])[order], "labels": labels[kept][order], "scores": sure[order]}


class OneStageDetector(Detector):
    """Base class of detectors that classify all locations of a dense grid in a single pass."""

    def dense(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Returns boxes, float32 B×A×4 within the image, and scores, float32 B×A×K in [0, 1], of all A locations."""
        raise NotImplementedError

    @property
    def candidates(self) -> int:
        """Number of scores per image, the highest over all locations and classes, that enter non-maximum
        suppression."""
        return max(CANDIDATES, 10 * self.max_detections)

    @torch.no_grad()
    @override
    def detect(self, outputs: Any) -> list[Detections]:
        return [self._select(boxes, scores) for boxes, scores in zip(*self.dense(outputs), strict=True)]

    def _select(self, boxes: Tensor, scores: Tensor) -> Detections:
        """Selects the best of A boxes with K scores each."""
        values, order = scores.flatten().topk(min(self.candidates, scores.numel()))
        order = order[values > MIN_SCORE]
        values = values[: len(order)]
        boxes, labels = boxes[order // self.num_classes], order % self.num_classes
        keep = self.suppressed(boxes, values, labels)
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": values[keep]}


def default_strides(image_size: int | str, count: int = 3) -> list[int]:
    """Returns strides of ``count`` maps, each twice the one before: from 8 pixels on, or from 4 for images of up to 256."""
    first = 8 if max(sides(image_size)) > 256 else 4
    return [first * 2**i for i in range(count)]


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points lie in boxes: float A×2 (x, y) and float …×M×4 to bool …×M×A."""
    gaps = torch.cat((points - boxes[..., None, :2], boxes[..., None, 2:] - points), -1)
    return gaps.amin(-1) > 0


def ignored(points: Tensor, batch: Batch) -> Tensor:
    """Whether locations A×2 lie in a box of the batch that is to be ignored: bool B×A."""
    rows = [inside(points, boxes[ignore]).any(0) for boxes, ignore in zip(batch["boxes"], batch["ignore"], strict=True)]
    return torch.stack(rows)


def unseen(points: Tensor, boxes: Tensor, ignore: Tensor) -> Tensor:
    """Whether locations A×2 lie in a box of an image that is to be ignored, and in none to learn: bool A."""
    there = inside(points, boxes)
    return there[ignore].any(0) & ~there[~ignore].any(0)
