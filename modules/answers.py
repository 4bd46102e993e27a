"""What is drawn and written of what a module tells of a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from torch import Tensor

from modules.pictures.sheets import as_rgb, enlarged, from_address, sheet

Image = NDArray[np.uint8]
Answer = dict[str, Any]  # what a module tells of one picture, plain data


class Answers:
    """How a module's answers are shown and kept. By itself, they are plain data and no more."""

    def draw(self, image: Image, answer: Answer) -> Image:
        """Draws what an answer says of a picture; by itself, the picture alone.

        >>> Answers().draw(np.zeros((4, 6, 1), np.uint8), {}).shape
        (4, 6, 3)

        Args:
            image: H×W×C as it was read, as `as_rgb` takes it; it is left as it is.
            answer: one of `VisionModule.predict`.

        Returns:
            uint8 H×W×3, not always of the picture's size.
        """
        drawn = as_rgb(image)
        return drawn.copy() if np.shares_memory(drawn, image) else drawn

    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        """What of an answer is a picture of its own, to be kept without losses; by itself, nothing.

        Returns:
            Pictures by what the names of their files end with, such as ``.mask.png``.
        """
        return {}

    def categories(self) -> dict[int, str]:
        """Names of the categories of `annotations` by their ids; by itself, none."""
        return {}

    def annotations(self, answer: Answer) -> list[dict[str, Any]]:
        """An answer as annotations in COCO's format, without ``id`` and ``image_id``; by itself, none."""
        return []


class HeadedAnswers(Answers):
    """Answers of a line, which stands above the picture.

    Args:
        heading: the line, with the answer's keys as fields of `str.format`.
    """

    def __init__(self, heading: str) -> None:
        self.heading = heading

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; a small picture is enlarged."""
        return sheet([enlarged(super().draw(image, answer), 112)], heading=self.heading.format(**answer))


def likeliest(logits: Tensor, names: Sequence[str]) -> list[Answer]:
    """For each image of logits, float B×K, ``label``, ``probability`` and the five likeliest labels as ``top``."""
    likely = logits.float().softmax(1).topk(min(5, len(names)), 1)
    rows = zip(likely.values.tolist(), likely.indices.tolist(), strict=True)
    named = [{names[k]: round(p, 6) for p, k in zip(*row, strict=True)} for row in rows]
    return [{"label": next(iter(top)), "probability": next(iter(top.values())), "top": top} for top in named]


class PictureAnswers(Answers):
    """Answers that are ``pictures`` by name, as ``data:`` addresses of PNGs.

    Args:
        side: least side in a drawing, in pixels.
    """

    def __init__(self, side: int) -> None:
        self.side = side

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; the picture, and beside it those of the answer."""
        made = {name: from_address(text) for name, text in answer["pictures"].items()}
        return sheet([image, *made.values()], 1 + len(made), ["image", *made], side=self.side)

    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        """See `Answers.pictures`: each by its name."""
        made = {name.replace("/", "-"): from_address(text) for name, text in answer["pictures"].items()}
        return {
            f".{name}.png": PIL.Image.fromarray(each[..., 0] if each.shape[2] == 1 else each)
            for name, each in made.items()
        }


class MadeAnswers(PictureAnswers):
    """Pictures made of pictures: an answer's first one stands for the picture itself."""

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; the made picture alone."""
        return Answers.draw(self, from_address(next(iter(answer["pictures"].values()))), answer)
