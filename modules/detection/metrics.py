"""Metrics of object detection: COCO's average precision, precision-recall curves, best threshold, confusion matrix."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.detection import mean_average_precision

from modules.detection.detector import Detections

HIT = 0.5  # IoU from which a detection is a true positive, where a single IoU threshold is used
UNSURE = 0.3  # default score threshold
AREAS = ("small", "medium", "large")  # up to 32², up to 96², and more pixels
Array = NDArray[np.float64]
# COCO's settings. The library's own thresholds are rounded to float32, which changes metrics in the third decimal.
COCO: dict[str, Any] = {
    "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    "backend": "faster_coco_eval",
}


class DetectionMetric(Metric):
    """Collects detections and ground truth of all images and processes.

    Boxes are in pixels of the original images. Objects to ignore (crowds, difficult ones) are neither true positives
    nor misses, and detections in them are not false positives, as in COCO.

    Args:
        num_classes: number of classes.
        most: maximum number of detections per image, the most confident ones. COCO's metrics use 100.
    """

    full_state_update = False
    detections: list[Tensor]
    truth: list[Tensor]
    images: Tensor

    def __init__(self, num_classes: int, most: int = 100) -> None:
        super().__init__()
        self.num_classes, self.most = num_classes, most
        self.add_state("detections", [], "cat")
        self.add_state("truth", [], "cat")
        self.add_state("images", torch.tensor(0), "sum")
        self.rank, self.world_size = 0, 1

    def update(self, detections: Sequence[Detections], truth: Sequence[dict[str, Tensor]]) -> None:
        """Adds images.

        Args:
            detections: boxes, labels and scores of each image.
            truth: for each image ``boxes`` float N×4, ``labels`` int64 N, ``ignore`` bool N, and optionally ``area``
                float N, which classifies objects as small, medium or large; by default, the area of the boxes.
        """
        for found, true in zip(detections, truth, strict=True):
            # A process has every world_size-th image, so this is the image's global index.
            key = int(self.images) * self.world_size + self.rank
            self.images = self.images + 1
            self.detections.append(_rows(key, found["boxes"], found["labels"], found["scores"]))
            boxes = true["boxes"]
            area = true.get("area", (boxes[:, 2:] - boxes[:, :2]).prod(1))
            self.truth.append(_rows(key, boxes, true["labels"], true["ignore"], area))

    def compute(self) -> dict[str, Any]:
        """Computes all metrics.

        Returns:
            ``ap`` (mean over ten IoU thresholds from 0.5 to 0.95, and classes), ``ap50``, ``ap75``, ``ap_small`` … for
            the sizes that occur, ``ar100`` (or another number of detections) and ``f1``, all floats, left out if there
            are no objects; the ``threshold`` of that F1, if there are true positives; ``per_class`` K×2 (AP, AP50; NaN
            for a class without objects); ``curves`` K×101, precision at recall 0, 0.01 … 1; ``confusion`` at the
            threshold, by default `UNSURE`, int64 (K+1)×(K+1), true classes in rows, predicted ones in columns, the
            background last.
        """
        truth, found = (_joined(rows, columns) for rows, columns in ((self.truth, 8), (self.detections, 7)))
        result = average_precision(found, truth, self.num_classes, self.most)
        threshold, f1 = best_threshold(found, truth)
        if "ap" in result:
            result |= {"f1": f1} | ({} if threshold is None else {"threshold": threshold})
        confident = found[found[:, 6] >= (UNSURE if threshold is None else threshold)]
        return result | {"confusion": confusion(confident, truth, self.num_classes)}


def _rows(image: int, boxes: Tensor, *columns: Tensor) -> Tensor:
    key = boxes.new_full((len(boxes), 1), image)
    return torch.cat((key, boxes, *(values[:, None].to(boxes.dtype) for values in columns)), 1)


def _joined(rows: list[Tensor] | Tensor, columns: int) -> Array:
    """Joins rows of `_rows`, sorted by image, as float64."""
    rows = rows if isinstance(rows, Tensor) else torch.cat(rows) if rows else torch.zeros(0, columns)
    table = rows.cpu().double().numpy()
    return table[np.argsort(table[:, 0], kind="stable")]


def average_precision(found: Array, truth: Array, num_classes: int, most: int = 100) -> dict[str, Any]:
    """Computes COCO's metrics, see `DetectionMetric.compute`; without objects, only the arrays.

    Args:
        found: detections, N×7: image, xyxy, class, score.
        truth: objects, M×8: image, xyxy, class, 1 for objects to ignore, area.
        num_classes: number of classes K.
        most: maximum number of detections per image.
    """
    counted = truth[truth[:, 6] == 0]
    if not len(counted) or not len(found):
        per_class = np.full((num_classes, 2), np.nan)
        per_class[counted[:, 5].astype(int)] = 0
        nothing = dict.fromkeys(("ap", "ap50", "ap75", f"ar{most}"), 0.0) if len(counted) else {}
        return {**nothing, "per_class": per_class, "curves": np.zeros((num_classes, 101))}
    detections, objects = [], []
    for _, detected, true in _by_image(found, truth):
        rows, entries = torch.from_numpy(detected), torch.from_numpy(true)
        detections.append({"boxes": rows[:, 1:5], "labels": rows[:, 5].long(), "scores": rows[:, 6]})
        marks = {"iscrowd": entries[:, 6].long(), "area": entries[:, 7]}
        objects.append({"boxes": entries[:, 1:5], "labels": entries[:, 5].long(), **marks})
    counts = [1, min(10, most), most]
    measured: Any = mean_average_precision(
        detections,
        objects,
        **COCO,
        max_detection_thresholds=counts,
        extended_summary=True,
        warn_on_many_detections=False,
    )
    classes = measured["classes"].view(-1).numpy()
    precision = measured["precision"][..., -1].numpy()  # overlap, recall, class, area
    recall = measured["recall"][..., -1].numpy()  # overlap, class, area
    figures: dict[str, Any] = {
        "ap": _mean(precision[..., 0]),
        "ap50": _mean(precision[0, ..., 0]),
        "ap75": _mean(precision[5, ..., 0]),
        f"ar{most}": _mean(recall[..., 0]),
    }
    for i, area in enumerate(AREAS, 1):
        if (precision[..., i] > -1).any():
            figures[f"ap_{area}"] = _mean(precision[..., i])
    per_class, curves = np.full((num_classes, 2), np.nan), np.zeros((num_classes, precision.shape[1]))
    for k, values in zip(classes, precision[..., 0].transpose(2, 0, 1), strict=True):
        per_class[k], curves[k] = (_mean(values, np.nan), _mean(values[0], np.nan)), values[0].clip(0)
    return figures | {"per_class": per_class, "curves": curves}


def _mean(values: Array, nothing: float = 0.0) -> float:
    """Averages values without -1, which marks classes without objects."""
    values = values[values > -1]
    return float(values.mean()) if len(values) else nothing


def overlaps(boxes: Array, others: Array, crowd: NDArray[np.bool_] | bool = False) -> Array:
    """Computes the IoU of boxes as COCO does.

    Args:
        boxes: N×4, xyxy.
        others: M×4.
        crowd: M; whether a box is a crowd, for which the intersection is divided by the area of the detection.

    Returns:
        N×M in [0, 1]: the intersection over union, or, for a crowd, over the detection's area.

    >>> overlaps(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [1.0, 0, 3, 2]]), np.array([False, True])).tolist()
    [[0.3333333333333333, 0.5]]
    """
    one, other = (np.concatenate((b[:, :2], b[:, 2:] - b[:, :2]), 1) for b in (boxes, others))
    return np.asarray(rle.iou(one, other, np.broadcast_to(crowd, len(other)).astype(np.uint8)))


def match(found: Array, truth: Array, by_class: bool = True) -> NDArray[np.int64]:
    """Matches the detections of one image to its objects, in descending order of their scores.

    Args:
        found: N×7, see `average_precision`.
        truth: M×7.
        by_class: match only objects of the detection's class.

    Returns:
        N indices into ``truth``; -1 for a false positive, -2 for a detection in an object to ignore.

    >>> cat, dog = [0, 0, 0, 10, 10, 0, 0], [0, 20, 0, 30, 10, 1, 0]
    >>> match(np.array([[0, 0, 0, 10, 9, 0, 0.8], [0, 20, 0, 30, 10, 0, 0.9]]), np.array([cat, dog]))
    array([ 0, -1])
    """
    hits = np.full(len(found), -1)
    if not len(truth) or not len(found):
        return hits
    ignore = truth[:, 6] == 1
    overlap = overlaps(found[:, 1:5], truth[:, 1:5], ignore)
    fits = (overlap >= HIT) & ((found[:, None, 5] == truth[:, 5]) | (not by_class))
    free = np.where(fits & ~ignore, overlap, 0)
    for i in np.argsort(-found[:, 6], kind="stable"):
        if free[i].any():
            hits[i] = free[i].argmax()
            free[:, hits[i]] = 0
    hits[(hits == -1) & (fits & ignore).any(1)] = -2
    return hits


def _by_image(found: Array, truth: Array) -> list[tuple[NDArray[np.int64], Array, Array]]:
    """Returns for each image the indices of its detections in ``found``, its detections and its objects."""
    images = np.unique(np.concatenate((found[:, 0], truth[:, 0])))
    edges = [np.searchsorted(rows[:, 0], images, side) for rows in (found, truth) for side in ("left", "right")]
    return [(np.arange(a, b), found[a:b], truth[c:d]) for a, b, c, d in zip(*edges, strict=True)]


def best_threshold(found: Array, truth: Array) -> tuple[float | None, float]:
    """Finds the score threshold with the best F1 over all classes, and returns it with that F1; None and 0 without true
    positives.

    Args:
        found: N×7, sorted by image, see `average_precision`.
        truth: M×7, sorted by image.

    >>> found = np.array([[0, 0, 0, 10, 10, 0, 0.9], [0, 50, 50, 60, 60, 0, 0.2]])
    >>> best_threshold(found, np.array([[0, 0, 0, 10, 10, 0, 0.0]]))
    (0.9, 1.0)
    """
    hits = np.full(len(found), -1)
    for places, detected, objects in _by_image(found, truth):
        hits[places] = match(detected, objects)
    counts = hits > -2
    order = np.argsort(-found[counts, 6], kind="stable")
    scores, right = found[counts, 6][order], np.cumsum(hits[counts][order] >= 0)
    wanted = int((truth[:, 6] == 0).sum())
    if not wanted or not len(scores) or not right[-1]:
        return None, 0.0
    f1 = 2 * right / (np.arange(1, len(scores) + 1) + wanted)
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores share a threshold
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def confusion(found: Array, truth: Array, num_classes: int) -> NDArray[np.int64]:
    """Computes the confusion matrix, see `DetectionMetric.compute`; ``found`` are the confident detections.

    >>> found, truth = np.array([[0, 0, 0, 10, 10, 1, 0.9]]), np.array([[0, 0, 0, 10, 10, 0, 0.0]])
    >>> confusion(found, truth, 2).tolist()  # class 0, the row, is taken for class 1, the column
    [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    """
    counts = np.zeros((num_classes + 1, num_classes + 1), np.int64)
    for _, detected, objects in _by_image(found, truth):
        hits = match(detected, objects, by_class=False)
        for row, hit in zip(detected, hits, strict=True):
            if hit != -2:
                counts[num_classes if hit < 0 else int(objects[hit, 5]), int(row[5])] += 1
        missed = objects[(objects[:, 6] == 0) & ~np.isin(np.arange(len(objects)), hits)]
        np.add.at(counts[:, num_classes], missed[:, 5].astype(int), 1)
    return counts
