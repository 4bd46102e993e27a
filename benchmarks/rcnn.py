"""R-CNN and Fast R-CNN stage by stage, to see what each later idea saved: proposals, features, SVMs, box regression.

Both judge regions that something else proposes. R-CNN runs the network on each region; Fast R-CNN runs it once and takes
each region's part of the map; Faster R-CNN (`FasterRCNN`) lets the network propose; `YOLO` does without proposals.
"""

from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor
from torchvision.ops import batched_nms, box_iou, nms, remove_small_boxes, roi_align

from modules.base import VisionModule
from modules.detection.detector import Detections

Array = NDArray[np.float64]
CELLS = 3  # a region is described by the features of so many by so many cells
OBJECT, BACKGROUND = 0.5, 0.3  # overlaps with an object from which, and up to which, a region is an example
PENALTY = 1000.0  # of the box regression (R-CNN, appendix C)


def propose(image: NDArray[np.uint8], count: int = 200) -> Tensor:
    """Proposes regions without learning anything: windows that enclose many edges, and whose rim cuts few.

    Windows of seven sizes and three shapes slide over the image; the edges inside, less those on the rim, divided by a
    power of the circumference, rank them, as in Zitnick & Dollár 2014 (Edge Boxes, equation 3), though there whole
    contours are followed.

    Args:
        image: uint8 H×W×C.
        count: regions wanted.

    Returns:
        float32 N×4, xyxy in pixels, the best first; N is ``count`` at most.
    """
    pixels = image.astype(np.float32)
    across, down = cv2.Sobel(pixels, cv2.CV_32F, 1, 0), cv2.Sobel(pixels, cv2.CV_32F, 0, 1)
    edges = np.hypot(across, down).reshape(*image.shape[:2], -1).max(2)
    sums = cv2.integral(np.maximum(edges - 2 * np.median(edges), 0))  # less the noise
    height, width = image.shape[:2]
    boxes = []
    for size in np.geomspace(0.1, 0.6, 7) * max(height, width):
        for shape in (0.5, 1.0, 1.6):  # width by height
            w, h = (
                min(limit, max(4, round(size * factor)))
                for limit, factor in ((width, shape**0.5), (height, shape**-0.5))
            )
            step = max(1, round(min(w, h) / 6))
            y, x = np.mgrid[0 : height - h + 1 : step, 0 : width - w + 1 : step].reshape(2, -1)
            boxes.append(np.stack((x, y, x + w, y + h), 1))
    windows = np.concatenate(boxes)

    def inside(b: NDArray[np.int64]) -> NDArray[np.float64]:
        return sums[b[:, 3], b[:, 2]] - sums[b[:, 1], b[:, 2]] - sums[b[:, 3], b[:, 0]] + sums[b[:, 1], b[:, 0]]

    inner = windows + np.array([1, 1, -1, -1])
    outer = np.clip(windows + np.array([-1, -1, 1, 1]), 0, [width, height, width, height])
    sides = (windows[:, 2:] - windows[:, :2]).sum(1)
    score = (inside(windows) - 3 * (inside(outer) - inside(inner))) / sides**1.5
    order = np.argsort(-score, kind="stable")[: 20 * count]
    found, ranks = torch.from_numpy(windows[order]).float(), torch.from_numpy(score[order])
    return found[nms(found, ranks.float(), 0.75)[:count]]


class RegionClassifier:
    """Classifies proposed regions by linear SVMs on a network's features, and corrects their boxes by regression.

    With ``shared=False`` it is R-CNN (Girshick et al. 2014, arXiv:1311.2524): each region is cut out, warped to the
    network's input and goes through it. With ``shared=True`` it takes the regions as Fast R-CNN does (Girshick 2015,
    arXiv:1504.08083): the image goes through the network once, and each region's part of the map is pooled; SVMs and
    regression stay as in R-CNN, so that nothing else differs.

    Args:
        module: has the backbone, made with ``features_only``, and its normalisation.
        num_classes: number of classes, without a background.
        shared: one map for all regions.
        crop: side to which R-CNN warps a region, in pixels.
        stride: stride of the map that Fast R-CNN pools from.
        count: proposals for an image.
    """

    max_detections = 100

    def __init__(
        self, module: VisionModule, num_classes: int, shared: bool, crop: int = 64, stride: int = 8, count: int = 200
    ) -> None:
        self.module, self.num_classes, self.shared = module.eval(), num_classes, shared
        self.crop, self.stride, self.count = crop, stride, count
        self.level = module.backbone.feature_info.reduction().index(stride)

    @torch.inference_mode()
    def features(self, image: NDArray[np.uint8], boxes: Tensor) -> Array:
        """What describes regions, N×F.

        Args:
            image: uint8 H×W×C.
            boxes: N×4, xyxy in pixels.
        """
        pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
        if self.shared:
            maps = self.module.backbone(self.module.normalize(pixels))[self.level]
            parts = roi_align(maps, [boxes], CELLS, 1 / self.stride, 2, aligned=True)
        else:
            crops = roi_align(pixels.float(), [boxes], self.crop, 1.0, 2, aligned=True).round().byte()
            outputs = [self.module.backbone(self.module.normalize(part))[self.level] for part in crops.split(64)]
            parts = F.adaptive_avg_pool2d(torch.cat(outputs), CELLS)
        return parts.flatten(1).double().numpy()

    def fit(self, images: Sequence[NDArray[np.uint8]], truth: Sequence[dict[str, Any]]) -> "RegionClassifier":
        """Learns SVMs and regression from images; the network stays as it is.

        Args:
            images: uint8 H×W×C each.
            truth: for each ``boxes`` float N×4 and ``labels`` int64 N.
        """
        features, labels, shifts = [], [], []
        for image, objects in zip(images, truth, strict=True):
            boxes = torch.as_tensor(objects["boxes"]).float()
            kinds = torch.as_tensor(objects["labels"])
            regions = torch.cat((boxes, propose(image, self.count)))
            overlap, which = box_iou(regions, boxes).max(1) if len(boxes) else (torch.zeros(len(regions)),) * 2
            use = (overlap >= OBJECT) | (overlap <= BACKGROUND)
            hit = overlap[use] >= OBJECT
            which = which[use].long()
            label = torch.full((len(hit),), self.num_classes)
            label[hit] = kinds[which[hit]]
            features.append(self.features(image, regions[use]))
            labels.append(label.numpy())
            near = boxes[which] if len(boxes) else regions[use]
            shifts.append(_shift(regions[use], near).numpy())
        x, y, t = (np.concatenate(rows) for rows in (features, labels, shifts))
        self.scaler = StandardScaler().fit(x)
        x = self.scaler.transform(x)
        self.svm = LinearSVC(C=1e-3, class_weight="balanced", dual=False, tol=1e-3).fit(x, y)
        real = y < self.num_classes
        self.regression = Ridge(PENALTY).fit(x[real], t[real])
        return self

    def detect(self, image: NDArray[np.uint8]) -> Detections:
        """The objects in an image: ``boxes``, ``labels`` and ``scores``, in pixels of it."""
        regions = propose(image, self.count)
        x = self.scaler.transform(self.features(image, regions))
        margins = torch.from_numpy(self.svm.decision_function(x)).float()
        known = torch.from_numpy(self.svm.classes_)
        margins = margins[:, known < self.num_classes]
        best, column = margins.max(1)
        labels = known[known < self.num_classes][column]
        boxes = _shifted(regions, torch.from_numpy(self.regression.predict(x)).float())
        boxes = boxes.clamp(min=0).minimum(torch.tensor([image.shape[1], image.shape[0]] * 2))
        left = remove_small_boxes(boxes, 1)  # the correction may move a box out of the image
        boxes, labels, best = boxes[left], labels[left], best[left]
        scores = best.sigmoid()
        keep = batched_nms(boxes, scores, labels, 0.3)
        keep = keep[best[keep] > -1][: self.max_detections]
        return {"boxes": boxes[keep], "labels": labels[keep], "scores": scores[keep]}


def _parts(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)


def _shift(boxes: Tensor, others: Tensor) -> Tensor:
    """What turns boxes into others, N×4: how far the middle moves, in sizes, and the logarithm of how the size grows."""
    (middle, size), (goal, grown) = _parts(boxes), _parts(others)
    return torch.cat(((goal - middle) / size, (grown / size).log()), 1)


def _shifted(boxes: Tensor, shift: Tensor) -> Tensor:
    """Boxes changed as `_shift` says."""
    middle, size = _parts(boxes)
    middle, size = middle + shift[:, :2] * size, size * shift[:, 2:].clamp(-2, 2).exp()
    return torch.cat((middle - size / 2, middle + size / 2), 1)
