"""Test-time augmentation: a network sees an image as it is and mirrored, and its answers are put together."""

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.networks import BackboneError

Mirroring = Literal["none", "flip", "flips"]
Axes = tuple[int, ...]  # that are mirrored: -1 left and right, -2 top and bottom
AXES: Mapping[Mirroring, Sequence[Axes]] = {"none": [()], "flip": [(), (-1,)], "flips": [(), (-1,), (-2,), (-2, -1)]}


def mirrored(maps: Tensor, axes: Axes) -> Tensor:
    """Images or maps, …×H×W, mirrored; doing it twice undoes it."""
    return maps.flip(axes) if axes else maps


class Views:
    """The ways in which a network looks at images in validation, test and prediction.

    >>> views = Views("a classifier", possible=True)
    >>> views.choose("flip")
    >>> views.mean(lambda image: image[..., 0], torch.arange(2.0).view(1, 2), mean_of_values)
    tensor([0.5000])

    Args:
        task: whose they are, for messages.
        possible: whether its answers for mirrored images can be put together.
    """

    def __init__(self, task: str, possible: bool) -> None:
        self.task, self.possible = task, possible
        self.axes: Sequence[Axes] = AXES["none"]

    def choose(self, views: Mirroring) -> None:
        """Sets them.

        Args:
            views: ``none``, as images are; ``flip``, also mirrored left to right; ``flips``, both also upside down.

        Raises:
            BackboneError: answers of this task cannot be put together, or there are no such views.
        """
        if views not in AXES:
            raise BackboneError(f"--tta must be one of {', '.join(AXES)}, not {views}.")
        if views != "none" and not self.possible:
            raise BackboneError(
                f"--tta {views} puts the answers for an image and its mirror images together, which a {self.task} cannot: "
                "leave it out. Classification, several labels, regression, segmentation and detection can."
            )
        self.axes = AXES[views]

    def mean(self, network: Callable[[Tensor], Tensor], image: Tensor, mean: Callable[[Tensor], Tensor]) -> Tensor:
        """What a network says of images, over all of them.

        Args:
            network: takes images, and gives B×K, or maps B×K×H×W, which are turned back.
            image: uint8 B×C×H×W.
            mean: puts together what is said of V views, V×B×K or V×B×K×H×W.

        Returns:
            As the network: B×K, or B×K×H×W.
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
