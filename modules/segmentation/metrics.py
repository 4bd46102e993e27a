"""Metrics of semantic segmentation, from counts of pixels and of boundary pixels."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multiclass_confusion_matrix

from modules.segmentation.losses import IGNORE

TOLERANCE = 0.0075  # tolerance of boundary F1, as a fraction of the image's diagonal


class SegmentationMetric(Metric):
    """Counts pixels over all images and processes.

    Args:
        num_classes: number of classes K.
    """

    full_state_update = False
    confusion: Tensor
    boundary: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("confusion", torch.zeros(num_classes, num_classes, dtype=torch.int64), "sum")
        self.add_state("boundary", torch.zeros(4, num_classes, dtype=torch.int64), "sum")

    def update(self, found: Tensor, truth: Tensor) -> None:
        """Adds images.

        Args:
            found: predicted classes, int64 B×H×W.
            truth: true classes, int64 B×H×W; 255 for ignored pixels.
        """
        self.confusion += multiclass_confusion_matrix(
            found, truth, self.num_classes, ignore_index=IGNORE, validate_args=False
        )
        self.boundary += boundary_counts(found, truth, self.num_classes)

    def compute(self) -> dict[str, Any]:
        """Returns all metrics, see `figures`, and ``confusion``."""
        return figures(self.confusion, self.boundary) | {"confusion": self.confusion}


def figures(confusion: Tensor, boundary: Tensor) -> dict[str, Any]:
    """Computes metrics from counts.

    Args:
        confusion: int64 K×K, true classes in rows.
        boundary: int64 4×K, see `boundary_counts`.

    Returns:
        ``miou`` (mean intersection over union, Jaccard index), ``dice`` and ``boundary_f1`` are means over the classes
        that occur in the ground truth or the prediction; ``accuracy`` is the fraction of correct pixels; all are
        floats. A metric without anything to count, such as boundaries, is left out. ``iou_per_class``,
        ``dice_per_class``, ``boundary_f1_per_class`` are float K, NaN for a class that does not occur.
    """
    counts = confusion.double()
    hits, true, found = counts.diag(), counts.sum(1), counts.sum(0)
    found_near, found_all, true_near, true_all = boundary.double()
    precision, recall = found_near / found_all.clamp(min=1), true_near / true_all.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    f1[(found_all + true_all) == 0] = torch.nan
    iou, dice = hits / (true + found - hits), 2 * hits / (true + found)
    means = {"miou": iou, "dice": dice, "boundary_f1": f1, "accuracy": hits.sum() / counts.sum()}
    return {
        **{key: float(value.nanmean()) for key, value in means.items() if not value.isnan().all()},
        "iou_per_class": iou,
        "dice_per_class": dice,
        "boundary_f1_per_class": f1,
    }


def edges(mask: Tensor) -> Tensor:
    """Finds pixels with a 4-connected neighbour of another class, bool B×H×W; ignored pixels are not neighbours.

    Args:
        mask: int64 B×H×W.

    >>> edges(torch.tensor([[[0, 0, 1, 1]]])).tolist()
    [[[False, True, True, False]]]
    """
    result = torch.zeros_like(mask, dtype=torch.bool)
    for axis in (1, 2):
        one, other = mask.narrow(axis, 1, mask.shape[axis] - 1), mask.narrow(axis, 0, mask.shape[axis] - 1)
        differ = (one != other) & (one != IGNORE) & (other != IGNORE)
        result.narrow(axis, 1, mask.shape[axis] - 1).logical_or_(differ)
        result.narrow(axis, 0, mask.shape[axis] - 1).logical_or_(differ)
    return result


def boundary_counts(found: Tensor, truth: Tensor, num_classes: int, tolerance: float = TOLERANCE) -> Tensor:
    """Counts boundary pixels per class, and how many have one of the same class in the other map nearby (Csurka et al.
    2013, "What is a good evaluation measure for semantic segmentation?", section 3.2, with Chebyshev distances).

    Args:
        found: predicted classes, int64 B×H×W.
        truth: true classes, int64 B×H×W; 255 for ignored pixels.
        num_classes: number of classes K.
        tolerance: maximum distance, as a fraction of the diagonal; at least one pixel.

    Returns:
        int64 4×K: predicted pixels near a true one, all predicted ones, true pixels near a predicted one, all true
        ones.
    """
    height, width = truth.shape[1:]
    reach = max(1, round(tolerance * (height**2 + width**2) ** 0.5))
    found = found.where(truth != IGNORE, IGNORE)
    borders = [mask.where(edges(mask), IGNORE) for mask in (found, truth)]
    result = truth.new_zeros(4, num_classes)
    for k in torch.unique(torch.cat(borders)).tolist():
        if k == IGNORE:
            continue
        ours, true = ((border == k)[:, None].float() for border in borders)
        near_ours, near_true = (F.max_pool2d(x, 2 * reach + 1, 1, reach) for x in (ours, true))
        counts = (ours * near_true, ours, true * near_ours, true)
        result[:, k] = torch.stack([value.sum(dtype=torch.float64) for value in counts]).long()
    return result
