"""Drawing and conversion of predicted boxes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from faster_coco_eval.core import mask as rle
from typing_extensions import override

from modules.answers import Answer, Answers, Image
from modules.pictures.boxes import draw_boxes


class BoxAnswers(Answers):
    """Predicted boxes with labels and scores.

    Args:
        label_names: names of the classes.
    """

    def __init__(self, label_names: Sequence[str]) -> None:
        self.label_names = list(label_names)

    def draw(self, image: Image, answer: Answer) -> Image:
        """See `Answers.draw`; with the boxes."""
        captions = [f"{label}  {score:.2f}" for label, score in zip(answer["labels"], answer["scores"], strict=True)]
        colours = [self.label_names.index(label) for label in answer["labels"]]
        if "ids" in answer:  # tracked in a video: an object keeps its id and colour
            captions = [
                f"#{k}: {text}" if k is not None else text for k, text in zip(answer["ids"], captions, strict=True)
            ]
            colours = [k if k is not None else 0 for k in answer["ids"]]
        boxes = np.asarray(answer["boxes"], np.float32).reshape(-1, 4)
        return draw_boxes(super().draw(image, answer), boxes, captions, colours, 256)

    @override
    def categories(self) -> dict[int, str]:
        return dict(enumerate(self.label_names, 1))

    def annotations(self, answer: Answer) -> list[dict[str, Any]]:
        """See `Answers.annotations`: one per object, with its score, and its mask if there are masks."""
        found = []
        masks = answer.get("masks") or [None] * len(answer["boxes"])
        for (x1, y1, x2, y2), label, score, code in zip(
            *(answer[key] for key in ("boxes", "labels", "scores")), masks, strict=True
        ):
            width, height = round(x2 - x1, 2), round(y2 - y1, 2)
            entry = {"category_id": self.label_names.index(label) + 1, "bbox": [x1, y1, width, height],
                     "area": round(width * height, 2), "iscrowd": 0, "score": score}  # fmt: skip
            found.append(entry if code is None else entry | {"segmentation": code, "area": int(rle.area(code))})
        return found
