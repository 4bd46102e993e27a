"""Test-time augmentation: a network sees an image as it is and mirrored, and its answers are put together."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Views = Literal["none", "flip", "flips"]
Axes = tuple[int, ...]  # that are mirrored: -1 left and right, -2 top and bottom
AXES: Mapping[Views, Sequence[Axes]] = {"none": [()], "flip": [(), (-1,)], "flips": [(), (-1,), (-2,), (-2, -1)]}


def mirrored(maps: Tensor, axes: Axes) -> Tensor:
    """Images or maps, …×H×W, mirrored; doing it twice undoes it."""
    return maps.flip(axes) if axes else maps


def mean_of_classes(logits: Tensor) -> Tensor:
    """Logits of the mean probabilities of classes that exclude each other.

    >>> mean_of_classes(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()).exp()
    tensor([[0.7000, 0.3000]])

    Args:
        logits: of V views, float V×B×K×….

    Returns:
        float B×K×….
    """
    return logits.float().log_softmax(2).logsumexp(0) - torch.tensor(float(len(logits))).log()


def mean_of_labels(logits: Tensor) -> Tensor:
    """Logits of the mean probabilities of labels each for itself: float V×B×K, of V views, to float B×K.

    >>> mean_of_labels(torch.tensor([[[0.9]], [[0.5]]]).logit()).sigmoid()
    tensor([[0.7000]])
    """
    return F.logsigmoid(logits.float()).logsumexp(0) - F.logsigmoid(-logits.float()).logsumexp(0)


def mean_of_values(values: Tensor) -> Tensor:
    """The mean of quantities: float V×B×K, of V views, to float B×K."""
    return values.mean(0)


def mirrored_boxes(boxes: Tensor, axes: Axes, size: tuple[int, int]) -> Tensor:
    """Boxes float N×4 (xyxy, pixels) in an image of a size (height, width) that is mirrored."""
    for axis in axes:
        low, high = (0, 2) if axis == -1 else (1, 3)
        boxes = boxes.clone()
        boxes[:, [low, high]] = size[axis] - boxes[:, [high, low]]
    return boxes
