"""What every detector does: from a feature pyramid to boxes, labels and scores."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms, box_iou, nms
from typing_extensions import override

from modules.networks.pyramid import Pyramid
from modules.spec import sides
from modules.warm_start import ClassRows

Detections = dict[
    str, Tensor
]  # of an image: boxes float N×4 (xyxy, pixels of the input), labels int64 N, scores float N

CANDIDATES = 1000  # at least
MIN_SCORE = 0.01  # below it, boxes count for nothing in a precision-recall curve that one would look at


class Detector(nn.Module):
    """Turns the maps of a backbone into boxes. A subclass has the layers, the loss and the decoding, and names in
    ``class_layers`` those layers that have rows for each class.

    Args:
        backbone: made with ``features_only``; only its ``feature_info`` is read.
        num_classes: number of classes, without a background.
        image_size: of the input; see `modules.spec.sides`.
        strides: strides of the maps to look at.
        options: the subclass's own arguments, with which it is made again.
    """

    class_layers: ClassVar[Mapping[str, ClassRows]] = {}
    max_detections = 100  # as COCO counts them
    nms_iou = 0.6
    across_classes = False

    def __init__(
        self, backbone: Any, num_classes: int, image_size: int | str, strides: Sequence[int], options: Mapping[str, Any]
    ) -> None:
        super().__init__()
        self.num_classes, self.size = num_classes, sides(image_size)
        self.options = {"strides": list(strides), **options}
        self.pyramid = Pyramid(backbone, strides)

    def forward(self, features: Sequence[Tensor]) -> Any:
        """The maps of the backbone to raw outputs, in whatever form `losses` and `detect` take them."""
        raise NotImplementedError

    def losses(self, outputs: Any, batch: Mapping[str, Any]) -> tuple[dict[str, Tensor], Tensor]:
        """The parts of the loss, which are to be added, and the number of what they are means over, both scalars.

        Args:
            outputs: of `forward`.
            batch: ``boxes``, ``labels`` and ``ignore``, lists with a tensor for each image.
        """
        raise NotImplementedError

    def detect(self, outputs: Any) -> list[Detections]:
        """The boxes of each image, the most certain first, `max_detections` at most."""
        raise NotImplementedError

    def within(self, boxes: Tensor) -> Tensor:
        """Boxes …×4 with their corners inside the input."""
        height, width = self.size
        return boxes.clamp(min=0).minimum(boxes.new_tensor([width, height, width, height]))

    def choose(self, max_detections: int | None, nms_iou: float | None, across_classes: bool | None) -> None:
        """Sets which boxes are kept; None leaves a setting as it is.

        Args:
            max_detections: boxes of an image.
            nms_iou: overlap from which of two boxes the less certain is dropped.
            across_classes: also where they are of different classes.
        """
        self.max_detections = self.max_detections if max_detections is None else max_detections
        self.nms_iou = self.nms_iou if nms_iou is None else nms_iou
        self.across_classes = self.across_classes if across_classes is None else across_classes

    def suppressed(self, boxes: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
        """Which of N boxes are kept, the most certain first: int64, `max_detections` at most."""
        one = (
            nms(boxes, scores, self.nms_iou)
            if self.across_classes
            else batched_nms(boxes, scores, labels, self.nms_iou)
        )
        return one[: self.max_detections]

    @torch.no_grad()
    def fused(self, views: Sequence[Detections]) -> Detections:
        """What several views show of an image, as weighted boxes fusion puts it together (Solovyev et al. 2021, arXiv:1910.13302).

        A box that non-maximum suppression keeps becomes the mean of itself and those that it suppresses, weighted by their
        scores; its score is the mean over the views, of which one that has no such box gives 0.

        Args:
            views: detections of each view, in the pixels of the same input.

        Returns:
            The objects, the most certain first, `max_detections` at most.
        """
        boxes, labels, scores = (torch.cat([one[key] for one in views]) for key in ("boxes", "labels", "scores"))
        owner = torch.cat([labels.new_full((len(one["scores"]),), k) for k, one in enumerate(views)])
        kept = batched_nms(boxes, scores, torch.zeros_like(labels) if self.across_classes else labels, self.nms_iou)
        if not len(kept):
            return {"boxes": boxes, "labels": labels, "scores": scores}
        overlap = box_iou(boxes[kept], boxes)
        if not self.across_classes:
            overlap = overlap * (labels[kept, None] == labels)
        overlap[torch.arange(len(kept)), kept] = 2.0  # each is of itself
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
    """A detector that judges places on a dense grid, all of them in one pass."""

    def dense(self, outputs: Any) -> tuple[Tensor, Tensor]:
        """Boxes, float32 B×A×4 within the image, and scores, float32 B×A×K in [0, 1], of all A places."""
        raise NotImplementedError

    @property
    def candidates(self) -> int:
        """Scores of an image, the best over all places and classes, that go into non-maximum suppression."""
        return max(CANDIDATES, 10 * self.max_detections)

    @torch.no_grad()
    @override
    def detect(self, outputs: Any) -> list[Detections]:
        return [self._select(boxes, scores) for boxes, scores in zip(*self.dense(outputs), strict=True)]

    def _select(self, boxes: Tensor, scores: Tensor) -> Detections:
        """The best of A boxes by K scores each."""
        values, order = scores.flatten().topk(min(self.candidates, scores.numel()))
        order = order[values > MIN_SCORE]
        values = values[: len(order)]
        boxes, labels = boxes[order // self.num_classes], order % self.num_classes
        keep = self.suppressed(boxes, values, labels)
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": values[keep]}


def smallest_stride(image_size: int | str) -> int:
    """The stride of the finest map by default: 8 pixels, and 4 where images are small."""
    return 8 if max(sides(image_size)) > 256 else 4


def inside(points: Tensor, boxes: Tensor) -> Tensor:
    """Whether points lie in boxes: float A×2 (x, y) and float …×M×4 to bool …×M×A."""
    gaps = torch.cat((points - boxes[..., None, :2], boxes[..., None, 2:] - points), -1)
    return gaps.amin(-1) > 0


def ignored(points: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Which of the places A×2 lie in a box of the batch that is not to be learned from: bool B×A."""
    rows = [inside(points, boxes[ignore]).any(0) for boxes, ignore in zip(batch["boxes"], batch["ignore"], strict=True)]
    return torch.stack(rows)
