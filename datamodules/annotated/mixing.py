"""Augmentations that combine several samples: mosaic, mixup, copy-paste, with boxes, masks and class maps."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from datamodules.augmentations import DEEP_GREY, GREY
from datamodules.loading import Sample
from datamodules.options import NonNegativeInt, Probability, settle

VISIBLE = 0.4  # minimum fraction of an object that must remain
SIDE = 2  # minimum side of a box that remains, in pixels


@dataclass
class Mixing:
    """Probabilities of the augmentations that combine several samples.

    Args:
        mosaic: probability of four pictures around a random centre, in [0, 1].
        mixup: probability of blending in another picture, in [0, 1].
        copy_paste: probability of pasting objects of another picture, in [0, 1]; it needs masks.
        plain_epochs: number of final epochs without these augmentations, so that the training ends on unmixed images
            (Ge et al. 2021, arXiv:2107.08430).
    """

    mosaic: Probability = 0.0
    mixup: Probability = 0.0
    copy_paste: Probability = 0.0
    plain_epochs: NonNegativeInt = 0

    def __post_init__(self) -> None:
        settle(self, "--data.mixing")


def boxes_of(masks: Sequence[NDArray[np.uint8]] | NDArray[np.uint8]) -> NDArray[np.float32]:
    """Tight boxes around masks.

    Args:
        masks: N masks uint8 H×W, none of them empty.

    Returns:
        float32 N×4, xyxy in pixels; the right and bottom edges are one past the last pixel.
    """
    found = np.array([cv2.boundingRect(mask) for mask in masks], np.float32).reshape(-1, 4)
    found[:, 2:] += found[:, :2]
    return found


def resized_sample(sample: Sample, factor: float) -> Sample:
    """Scales a sample by a factor; masks by nearest neighbour."""
    height, width = (max(1, round(side * factor)) for side in sample["image"].shape[:2])
    if (height, width) == sample["image"].shape[:2]:
        return sample
    image = sample["image"]
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR
    result = {"image": cv2.resize(image, (width, height), interpolation=way).reshape(height, width, -1)}
    if "masks" in sample:
        masks = [cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST) for mask in sample["masks"]]
        result["masks"] = np.array(masks, np.uint8).reshape(-1, height, width)
        result["mask"] = cv2.resize(sample["mask"], (width, height), interpolation=cv2.INTER_NEAREST)
    scale = np.tile(np.divide((width, height), image.shape[1::-1]), 2)
    return sample | result | {"boxes": (sample["boxes"] * scale).astype(np.float32)}


def selected(sample: Sample, kept: NDArray[np.bool_]) -> Sample:
    """A sample with a subset of its objects; picture and class map are unchanged."""
    return sample | {key: sample[key][kept] for key in ("boxes", "labels", "ignore", "masks", "area") if key in sample}


def _cut(sample: Sample, window: tuple[int, int, int, int], place: tuple[int, int], size: tuple[int, int]) -> Sample:
    """Crops a window (x1, y1, x2, y2) and moves the remaining objects to where it is placed in a canvas."""
    x1, y1, x2, y2 = window
    shift = np.array([place[0] - x1, place[1] - y1] * 2, np.float32)
    boxes = np.clip(sample["boxes"], [x1, y1, x1, y1], [x2, y2, x2, y2])
    if "masks" in sample:
        part = np.ascontiguousarray(sample["masks"][:, y1:y2, x1:x2])
        before, after = (masks.sum((1, 2), dtype=np.int64) for masks in (sample["masks"], part))
        kept = (after >= VISIBLE * before) & (after > 0)
        masks = np.zeros((int(kept.sum()), *size), np.uint8)
        masks[:, place[1] : place[1] + y2 - y1, place[0] : place[0] + x2 - x1] = part[kept]
        return selected(sample, kept) | {"masks": masks, "boxes": boxes_of(masks)}
    before, after = ((b[:, 2:] - b[:, :2]).prod(1) for b in (sample["boxes"], boxes))
    kept = (after >= VISIBLE * before) & ((boxes[:, 2:] - boxes[:, :2]) >= SIDE).all(1)
    return selected(sample | {"boxes": (boxes + shift).astype(np.float32)}, kept)


def mosaic(samples: Sequence[Sample], size: tuple[int, int], generator: np.random.Generator) -> Sample:
    """Mosaic of four pictures around a random centre, each randomly scaled (Bochkovskiy et al. 2020, arXiv:2004.10934,
    3.4).

    Args:
        samples: four samples.
        size: height and width of the result, in pixels.
        generator: random generator of the centre, the sizes and the crops.
    """
    channels = samples[0]["image"].shape[2]
    kind = samples[0]["image"].dtype
    image = np.full((*size, channels), _grey(kind), kind)
    classes = np.zeros(size, np.uint8)
    cx, cy = (int(side * share) for side, share in zip(size[::-1], generator.uniform(0.3, 0.7, 2), strict=True))
    parts = []
    for k, sample in enumerate(samples):
        factor = min(np.divide(size, sample["image"].shape[:2])) * float(generator.uniform(0.5, 1.0))
        sample = resized_sample(sample, factor)
        height, width = sample["image"].shape[:2]
        left, right = ((0, cx), (cx, size[1]))[k % 2]
        top, bottom = ((0, cy), (cy, size[0]))[k // 2]
        w, h = min(width, right - left), min(height, bottom - top)
        x, y = int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1))
        to_x, to_y = (right - w if k % 2 == 0 else left), (bottom - h if k < 2 else top)
        place, window = (slice(to_y, to_y + h), slice(to_x, to_x + w)), (slice(y, y + h), slice(x, x + w))
        image[place] = sample["image"][window]
        if "mask" in sample:
            classes[place] = sample["mask"][window]
        parts.append(_cut(sample, (x, y, x + w, y + h), (to_x, to_y), size))
    return _joined(parts, image) | ({"mask": classes} if "mask" in samples[0] else {})


def _grey(kind: np.dtype[Any]) -> float:
    return GREY if kind == np.uint8 else DEEP_GREY


def _joined(parts: Sequence[Sample], image: NDArray[Any]) -> Sample:
    keys = [key for key in ("boxes", "labels", "ignore", "masks") if key in parts[0]]
    joined = {key: np.concatenate([part[key] for part in parts]) for key in keys}
    return joined | {"image": image, "size": np.array(image.shape[:2], np.int64)}


def _onto(sample: Sample, height: int, width: int) -> Sample:
    """Pads a sample, scaled to fit, with grey to the canvas; the picture is at the top left."""
    sample = resized_sample(sample, min(height / sample["image"].shape[0], width / sample["image"].shape[1]))
    h, w = sample["image"].shape[:2]
    spare = (0, max(0, height - h)), (0, max(0, width - w))
    image = sample["image"]
    result = {"image": np.pad(image, (*spare, (0, 0)), constant_values=_grey(image.dtype))}
    if "masks" in sample:
        result |= {"masks": np.pad(sample["masks"], ((0, 0), *spare)), "mask": np.pad(sample["mask"], spare)}
    return sample | result


def mixup(sample: Sample, other: Sample, generator: np.random.Generator) -> Sample:
    """Blend of two pictures with the objects of both (Zhang et al. 2018, arXiv:1710.09412; for boxes Zhang et al. 2019,
    arXiv:1902.04103, with weights from Beta(8, 8)).

    Args:
        sample: image that determines the size of the result; without masks.
        other: image to blend in.
        generator: random generator of the weight.
    """
    weight = float(generator.beta(8, 8))
    other = _onto(other, *sample["image"].shape[:2])
    image = cv2.addWeighted(sample["image"], weight, other["image"], 1 - weight, 0).reshape(sample["image"].shape)
    return _joined([sample, other], image)


def copy_paste(sample: Sample, other: Sample, generator: np.random.Generator) -> Sample:
    """Pastes some objects of another picture in front of this one (Ghiasi et al. 2021, arXiv:2012.07177).

    An object is skipped if it would hide more than 60 % of another one.

    Args:
        sample: image that objects are pasted into; with masks.
        other: image whose objects are pasted, each with probability ½.
        generator: random generator of the selection.
    """
    other = _onto(other, *sample["image"].shape[:2])
    image, masks, classes = sample["image"].copy(), sample["masks"].copy(), sample["mask"].copy()
    areas = masks.sum((1, 2), dtype=np.int64)
    taken = (generator.random(len(other["masks"])) < 0.5) & ~other["ignore"]
    for k in np.flatnonzero(taken):
        front = other["masks"][k].astype(bool)
        left = (masks * ~front).astype(np.uint8)
        if (left.sum((1, 2)) < VISIBLE * areas).any():
            taken[k] = False
            continue
        image[front], classes[front] = other["image"][front], other["labels"][k] + 1
        masks = np.concatenate([left, other["masks"][k : k + 1]])
        areas = np.append(areas, front.sum())
    new = selected(other, taken)
    joined = _joined([sample, new], image)
    return joined | {"masks": masks, "mask": classes, "boxes": boxes_of(masks), "size": sample["size"]}
