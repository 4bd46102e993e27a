"""Drawing and storage of predicted class maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from modules.answers import Answer, Answers, Image
from modules.pictures.palette import palette, tint


class MapAnswers(Answers):
    """Predicted class maps, stored as a run-length code per class.

    Args:
        label_names: names of the classes; the first one is the background.
    """

    def __init__(self, label_names: Sequence[str]) -> None:
        self.label_names = list(label_names)

    def class_map(self, answer: Answer) -> NDArray[np.uint8]:
        """Decodes the class map of a prediction, uint8 H×W."""
        mask = np.zeros(answer["size"], np.uint8)
        for name, code in answer["masks"].items():
            k = self.label_names.index(name)
            if k:
                mask[rle.decode(code).astype(bool)] = k
        return mask

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; with the classes as an overlay."""
        return tint(super().draw(image, answer), self.class_map(answer))

    def pictures(self, answer: Answer) -> dict[str, PIL.Image.Image]:
        """See `Answers.pictures`: the class map as an indexed image, with the classes' colours as its palette."""
        mask = PIL.Image.fromarray(self.class_map(answer), "P")
        mask.putpalette(palette(len(self.label_names)).tobytes())
        return {".mask.png": mask}

    def categories(self) -> dict[int, str]:
        """See `Answers.categories`: all classes but the first, by index."""
        return dict(list(enumerate(self.label_names))[1:])

    def annotations(self, answer: Answer) -> list[dict[str, Any]]:
        """See `Answers.annotations`: one mask per class except the first."""
        names = self.label_names
        return [
            {"category_id": names.index(name), "segmentation": code,
             "area": int(rle.area(code)), "bbox": [float(v) for v in np.ravel(rle.toBbox(code))], "iscrowd": 0}
            for name, code in answer["masks"].items() if names.index(name)
        ]  # fmt: skip
