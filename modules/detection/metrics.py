"""How good detections are: COCO's average precision, precision against recall, the best threshold, confusions."""

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

HIT = 0.5  # overlap (IoU) from which a detection counts as that of an object, where one overlap is looked at
UNSURE = 0.3  # score from which detections are believed where none is known to be better
AREAS = ("small", "medium", "large")  # up to 32², up to 96², and more pixels
Array = NDArray[np.float64]
# What COCO measures at. The library's own thresholds are rounded to float32, which makes figures differ in the third place.
COCO: dict[str, Any] = {
    "iou_thresholds": np.linspace(0.5, 0.95, 10).tolist(),
    "rec_thresholds": np.linspace(0, 1, 101).tolist(),
    "backend": "faster_coco_eval",
}


class DetectionMetric(Metric):
    """Collects detections and truth of all images and processes, and measures them together.

    Boxes are measured in the pixels of the images as they were read. Objects to be ignored (crowds, difficult ones) are
    neither hits nor misses, and what lies in them is no false alarm, as COCO counts a crowd.

    Args:
        num_classes: number of classes.
        most: detections of an image that count, the most certain ones. COCO's figures are those of 100.
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
            detections: for each image boxes, labels and scores.
            truth: for each image ``boxes`` float N×4, ``labels`` int64 N, ``ignore`` bool N, and perhaps ``area`` float N,
                by which objects are small, medium or large; it is else that of the boxes.
        """
        for found, true in zip(detections, truth, strict=True):
            # The images of a process are every world_size-th of all, so this is the image's own number.
            key = int(self.images) * self.world_size + self.rank
            self.images = self.images + 1
            self.detections.append(_rows(key, found["boxes"], found["labels"], found["scores"]))
            boxes = true["boxes"]
            area = true.get("area", (boxes[:, 2:] - boxes[:, :2]).prod(1))
            self.truth.append(_rows(key, boxes, true["labels"], true["ignore"], area))

    def compute(self) -> dict[str, Any]:
        """All figures.

        Returns:
            ``ap`` (mean over ten overlaps from 0.5 to 0.95, and classes), ``ap50``, ``ap75``, ``ap_small`` … for those
            sizes that there are, ``ar100`` (or as many as count), ``f1``, all floats, and none of them where there is no object to be found; the
            ``threshold`` of that F1, where anything was found rightly; ``per_class`` K×2 (AP, AP50; NaN for a class without
            objects); ``curves`` K×101, precision at recall 0, 0.01 … 1; ``confusion`` at the threshold, or else at
            `UNSURE`, int64 (K+1)×(K+1), true classes in rows, detected ones in columns, the last of both for the background.
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
    """What `_rows` made, sorted by image, as float64."""
    rows = rows if isinstance(rows, Tensor) else torch.cat(rows) if rows else torch.zeros(0, columns)
    table = rows.cpu().double().numpy()
    return table[np.argsort(table[:, 0], kind="stable")]


def average_precision(found: Array, truth: Array, num_classes: int, most: int = 100) -> dict[str, Any]:
    """COCO's figures, see `DetectionMetric.compute`; without any object to be found, just the arrays.

    Args:
        found: detections, N×7: image, xyxy, class, score.
        truth: objects, M×8: image, xyxy, class, 1 for one to be ignored, area.
        num_classes: number of classes K.
        most: detections of an image that count.
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
    """The mean without the -1 that stand for classes without objects."""
    values = values[values > -1]
    return float(values.mean()) if len(values) else nothing


def overlaps(boxes: Array, others: Array, crowd: NDArray[np.bool_] | bool = False) -> Array:
    """How far boxes cover each other, as COCO counts it.

    Args:
        boxes: N×4, xyxy.
        others: M×4.
        crowd: M; of a crowd a box may be any part.

    Returns:
        N×M in [0, 1]: the intersection over the union, or, with a crowd, over the box.

    >>> overlaps(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2], [1.0, 0, 3, 2]]), np.array([False, True])).tolist()
    [[0.3333333333333333, 0.5]]
    """
    one, other = (np.concatenate((b[:, :2], b[:, 2:] - b[:, :2]), 1) for b in (boxes, others))
    return np.asarray(rle.iou(one, other, np.broadcast_to(crowd, len(other)).astype(np.uint8)))


def match(found: Array, truth: Array, by_class: bool = True) -> NDArray[np.int64]:
    """Which object each detection of one image hits, the most certain detection choosing first.

    Args:
        found: N×7, see `average_precision`.
        truth: M×7.
        by_class: only objects of the detection's class can be hit.

    Returns:
        N indices into ``truth``; -1 for a false alarm, -2 for what lies in an object to be ignored.

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
    """The detections and objects of each image, and where the detections stand in ``found``."""
    images = np.unique(np.concatenate((found[:, 0], truth[:, 0])))
    edges = [np.searchsorted(rows[:, 0], images, side) for rows in (found, truth) for side in ("left", "right")]
    return [(np.arange(a, b), found[a:b], truth[c:d]) for a, b, c, d in zip(*edges, strict=True)]


def best_threshold(found: Array, truth: Array) -> tuple[float | None, float]:
    """The score from which on detections are to be believed, so that F1 over all classes is best, and that F1; None and 0
    where no detection is right.

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
    f1[:-1][scores[:-1] == scores[1:]] = 0  # equal scores go together
    best = int(f1.argmax())
    return float(scores[best]), float(f1[best])


def confusion(found: Array, truth: Array, num_classes: int) -> NDArray[np.int64]:
    """What objects are taken for, see `DetectionMetric.compute`. ``found`` are the confident detections.

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
