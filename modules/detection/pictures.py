"""Images that object detection logs."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modules.detection.detector import Detections
from modules.detection.metrics import Array, match
from modules.pictures.boxes import draw_boxes
from modules.pictures.charts import precision_recall
from modules.pictures.sheets import Image, as_rgb, sheet


@dataclass
class BoxExample:
    """An image with its predicted and true boxes, in the pixels of the original image.

    Args:
        image: uint8 C×S×S, the network's input.
        found: predicted boxes, labels, scores.
        truth: true boxes, labels, ignore.
        factors: pixels of the original image per pixel of ``image``, vertically and horizontally.
    """

    image: Tensor
    found: Detections
    truth: Detections
    factors: tuple[float, float]

    def cpu(self) -> "BoxExample":
        """Copies the example to the CPU, without references to the batch."""
        found, truth = ({k: v.cpu() for k, v in part.items()} for part in (self.found, self.truth))
        return BoxExample(self.image.cpu().clone(), found, truth, self.factors)

    def _table(self, part: Detections, last: str) -> Array:
        columns = (
            torch.zeros(len(part["boxes"]), 1),
            part["boxes"].cpu(),
            part["labels"].cpu()[:, None],
            part[last].cpu()[:, None],
        )
        return torch.cat(columns, 1).double().numpy()

    def errors(self) -> int:
        """Returns the number of missed objects and false positives."""
        truth = self._table(self.truth, "ignore")
        hits = match(self._table(self.found, "scores"), truth)
        return int((hits == -1).sum() + (truth[:, 6] == 0).sum() - (hits >= 0).sum())

    def draw(self, label_names: Sequence[str], side: int = 256) -> list[Image]:
        """Draws the ground truth, in white, and the detections, in the colours of their classes."""
        image = as_rgb(self.image)
        factors = np.array([*self.factors[::-1]] * 2, np.float32)
        true, boxes = (part["boxes"].numpy() / factors for part in (self.truth, self.found))
        named = zip(self.truth["labels"], self.truth["ignore"], strict=True)
        captions = [label_names[k] + " ?" * int(ignored) for k, ignored in named]
        labels, scores = self.found["labels"].tolist(), self.found["scores"].tolist()
        sure = [f"{label_names[k]}  {score:.2f}" for k, score in zip(labels, scores, strict=True)]
        return [draw_boxes(image, true, captions, None, side), draw_boxes(image, boxes, sure, labels, side)]


def pairs(examples: Sequence[BoxExample], label_names: Sequence[str]) -> Image:
    """Draws ground truth and detections side by side, two examples per row."""
    tiles = [tile for example in examples for tile in example.draw(label_names)]
    return sheet(tiles, 4, ["truth", "found"] * len(examples))


def curves(precision: Array, per_class: NDArray[np.float64], label_names: Sequence[str]) -> Image:
    """Draws precision-recall curves at an IoU of 0.5.

    Args:
        precision: K×101, at recall 0, 0.01 … 1.
        per_class: K×2, AP and AP50; NaN for a class without objects.
        label_names: K names.
    """
    there = np.flatnonzero(~np.isnan(per_class[:, 1])).tolist()
    recall = np.linspace(0, 1, precision.shape[1])
    named = {f"{label_names[k]}  {per_class[k, 1]:.3f}": (recall, precision[k]) for k in there}
    mean = f"all  {np.nanmean(per_class[:, 1]):.3f}" if there else ""
    return precision_recall(named, "AP50", (mean, (recall, precision[there].mean(0))) if there else None)
