"""Test-time augmentation by mirroring."""

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.networks import BackboneError
from modules.ranges import Mirroring

Axes = tuple[int, ...]  # mirrored axes: -1 left-right, -2 up-down
AXES: Mapping[Mirroring, Sequence[Axes]] = {"none": [()], "flip": [(), (-1,)], "flips": [(), (-1,), (-2,), (-2, -1)]}


def mirrored(maps: Tensor, axes: Axes) -> Tensor:
    """Mirrors images or maps, …×H×W; applying it twice restores the input."""
    return maps.flip(axes) if axes else maps


class Views:
    """Mirrored views of an image that a network averages over in validation, test and prediction.

    >>> views = Views("a classifier", possible=True)
    >>> views.choose("flip")
    >>> views.mean(lambda image: image[..., 0], torch.arange(2.0).view(1, 2), mean_of_values)
    tensor([0.5000])

    Args:
        task: name of the task, for messages.
        possible: whether the task's predictions for mirrored images can be averaged.
    """

    def __init__(self, task: str, possible: bool) -> None:
        self.task, self.possible = task, possible
        self.axes: Sequence[Axes] = AXES["none"]

    def choose(self, views: Mirroring) -> None:
        """Selects the views.

        Args:
            views: ``none``, the image as it is; ``flip``, also mirrored left to right; ``flips``, both also upside
                down.

        Raises:
            BackboneError: the task does not support mirrored views, or the name is unknown.
        """
        if views not in AXES:
            raise BackboneError(f"--tta must be one of {', '.join(AXES)}, not {views}.")
        if views != "none" and not self.possible:
            raise BackboneError(
                f"--tta {views} averages the predictions for an image and its mirror images, which {self.task} does not "
                "support: leave it out. Classification, several labels, regression, segmentation and detection do."
            )
        self.axes = AXES[views]

    def mean(self, network: Callable[[Tensor], Tensor], image: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """Applies a network to all views of images and averages its outputs.

        Args:
            network: maps images to B×K, or to maps B×K×H×W, which are mirrored back.
            image: uint8 B×C×H×W.
            mean: averages the outputs of V views, V×B×K or V×B×K×H×W, over V.

        Returns:
            Shape of the network's output: B×K, or B×K×H×W.
        """
        said = [network(mirrored(image, axes)) for axes in self.axes]
        if len(said) == 1:
            return said[0]
        return mean(
            torch.stack(
                [mirrored(one, axes) if one.ndim == 4 else one for axes, one in zip(self.axes, said, strict=True)]
            )
        )


def mean_of_classes(logits: Tensor) -> Tensor:
    """Averages the probabilities of mutually exclusive classes, and returns the logits of the mean.

    >>> mean_of_classes(torch.tensor([[[0.9, 0.1]], [[0.5, 0.5]]]).log()).exp()
    tensor([[0.7000, 0.3000]])

    Args:
        logits: of V views, float V×B×K×….

    Returns:
        float B×K×….
    """
    return logits.float().log_softmax(2).logsumexp(0) - torch.tensor(float(len(logits))).log()


def mean_of_labels(logits: Tensor) -> Tensor:
    """Averages the probabilities of independent labels, and returns the logits of the mean: float V×B×K, of V views, to
    B×K.

    >>> mean_of_labels(torch.tensor([[[0.9]], [[0.5]]]).logit()).sigmoid()
    tensor([[0.7000]])
    """
    return F.logsigmoid(logits.float()).logsumexp(0) - F.logsigmoid(-logits.float()).logsumexp(0)


def mean_of_values(values: Tensor) -> Tensor:
    """Averages quantities over V views: float V×B×K to float B×K."""
    return values.mean(0)


def mirrored_boxes(boxes: Tensor, axes: Axes, size: tuple[int, int]) -> Tensor:
    """Mirrors boxes, float N×4 (xyxy, pixels), in an image of a given size (height, width)."""
    for axis in axes:
        low, high = (0, 2) if axis == -1 else (1, 3)
        boxes = boxes.clone()
        boxes[:, [low, high]] = size[axis] - boxes[:, [high, low]]
    return boxes
