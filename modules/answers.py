"""Drawing predictions on images and converting them to files and annotations."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from torch import Tensor

from modules.pictures.sheets import as_rgb, enlarged, from_address, sheet

Image = NDArray[np.uint8]
Answer = dict[str, Any]  # prediction for one image, as plain data


class Answers:
    """Drawing and storage of a module's predictions. The base class keeps them as plain data only."""

    def draw(self, image: Image, answer: Answer) -> Image:
        """Draws a prediction on its image; by default, the image alone.

        >>> Answers().draw(np.zeros((4, 6, 1), np.uint8), {}).shape
        (4, 6, 3)

        Args:
            image: H×W×C as it was read, in a format that `as_rgb` takes; not modified.
            answer: a prediction of `VisionModule.predict`.

        Returns:
            uint8 H×W×3, not always of the image's size.
        """
        drawn = as_rgb(image)
        return drawn.copy() if np.shares_memory(drawn, image) else drawn

    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        """Returns the parts of a prediction that are images, for lossless storage; none by default.

        Returns:
            Images by the suffix of their file names, such as ``.mask.png``.
        """
        return {}

    def categories(self) -> dict[int, str]:
        """Returns category names of `annotations` by id; none by default."""
        return {}

    def annotations(self, answer: Answer) -> list[dict[str, Any]]:
        """Converts a prediction to annotations in COCO format, without ``id`` and ``image_id``; none by default."""
        return []


class HeadedAnswers(Answers):
    """Predictions shown as one line of text above the image.

    Args:
        heading: format string for the line; its fields are the prediction's keys, see `str.format`.
    """

    def __init__(self, heading: str = "") -> None:
        self.heading = heading

    def told(self, answer: Answer) -> str:
        """Returns the line."""
        return self.heading.format(**answer)

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; small images are enlarged."""
        return sheet([enlarged(super().draw(image, answer), 112)], heading=self.told(answer))


def likeliest(logits: Tensor, names: Sequence[str]) -> list[Answer]:
    """Returns ``label``, ``probability`` and the five most likely labels as ``top`` for each image, from logits, float
    B×K."""
    likely = logits.float().softmax(1).topk(min(5, len(names)), 1)
    rows = zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
    named = [{names[k]: round(p, 6) for p, k in zip(*row, strict=True)} for row in rows]
    return [{"label": next(iter(top)), "probability": next(iter(top.values())), "top": top} for top in named]


class PictureAnswers(Answers):
    """Predictions that are images, stored by name in ``pictures`` as ``data:`` URLs of PNG files.

    Args:
        side: minimum side length in a drawing, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; the input image next to the predicted images."""
        made = {name: from_address(text) for name, text in answer["pictures"].items()}
        return sheet([image, *made.values()], 1 + len(made), ["image", *made], side=self.side)

    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        """See `Answers.pictures`; every predicted image by its name."""
        made = {name.replace("/", "-"): from_address(text) for name, text in answer["pictures"].items()}
        return {
            f".{name}.png": PIL.Image.fromarray(each[..., 0] if each.shape[2] == 1 else each)
            for name, each in made.items()
        }


class MadeAnswers(PictureAnswers):
    """Predictions of image-to-image tasks: the first predicted image is drawn in place of the input."""

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; the predicted image alone."""
        return Answers.draw(self, from_address(next(iter(answer["pictures"].values()))), answer)
