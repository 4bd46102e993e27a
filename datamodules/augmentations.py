"""Albumentations pipelines. Images stay uint8, or float32 in [0, 1]: the network normalises them on its device."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

Strength = Literal["none", "light", "standard", "strong"]
Step: TypeAlias = A.BasicTransform | A.BaseCompose
Numbers = Mapping[str, float]  # of a strength
Strengths = Mapping[str, Numbers]
Fit = Literal["crop", "pad", "extend", "stretch", "native"]
GREY = 114  # colour of padding
DEEP_GREY = GREY / 255  # colour of padding for images in [0, 1]
SPARE = 1.25  # minimum ratio of an image that is decoded at reduced size to the size needed


def sides(size: int | str) -> tuple[int, int]:
    """Returns height and width for an image size.

    >>> sides(224), sides("240x320")
    ((224, 224), (240, 320))

    Args:
        size: the side of a square in pixels, or ``HEIGHTxWIDTH``.

    Raises:
        ValueError: it has another format.
    """
    height, times, width = str(size).lower().partition("x")
    found = int(height), int(width if times else height)
    if min(found) < 1:
        raise ValueError(f"{size} is no size of an image")
    return found


class RandomResizedCrop(A.RandomResizedCrop):
    """Albumentations' own, but images are reduced with torch's antialiased bilinear filter.

    The results are those of Pillow, as in torchvision's reference, in a quarter of the time of OpenCV's area filter.
    """

    def apply(self, img: NDArray[Any], crop_coords: tuple[int, int, int, int], **params: Any) -> NDArray[Any]:
        """Crops and resizes an image."""
        x1, y1, x2, y2 = crop_coords
        if y2 - y1 <= self.size[0] and x2 - x1 <= self.size[1]:
            return super().apply(np.require(img, requirements="W"), crop_coords, **params)
        part = torch.from_numpy(img[None, y1:y2, x1:x2].copy()).permute(0, 3, 1, 2)
        return interpolate(part, self.size, mode="bilinear", antialias=True).permute(0, 2, 3, 1).numpy()[0]


def normalized_keypoints(points: NDArray[Any]) -> NDArray[np.float32]:
    """Normalises keypoints for position and scale: subtracts their mean and divides by their root mean squared distance from it
    (centroid size, Dryden & Mardia 2016, Statistical Shape Analysis, 2.2). Rotation is kept.

    Args:
        points: …×K×2; the K points of a sample must not coincide.

    Returns:
        float32 …×K×2.
    """
    centred = points - points.mean(-2, keepdims=True)
    size = np.sqrt(np.square(centred).sum((-2, -1), keepdims=True) / points.shape[-2])
    return (centred / size).astype(np.float32)


class KeypointCompose(A.Compose):
    """An albumentations pipeline that transforms keypoints with their image, and returns `normalized_keypoints` in ``tabular``, x and y
    of each keypoint in turn, followed by what ``tabular`` had before.

    If the image is mirrored, keypoints with ``left`` in their name are swapped with those with ``right``.

    Args:
        transforms: the transforms.
        names: names of the keypoints. Samples have them as ``keypoints``, float32 K×2, in pixels; samples without are
            transformed as by `A.Compose`.
        more: further arguments of `A.Compose`.
    """

    def __init__(self, transforms: Sequence[Step], names: Sequence[str], **more: Any) -> None:
        super().__init__(transforms, keypoint_params=A.KeypointParams("xy", remove_invisible=False), **more)
        other = [_swapped(name) for name in names]
        self.partners = [
            names.index(theirs if theirs in names else own) for own, theirs in zip(names, other, strict=True)
        ]

    def __call__(self, *args: Any, **sample: Any) -> dict[str, Any]:
        """See albumentations."""
        if "keypoints" not in sample:
            return super().__call__(*args, **sample)
        frame = np.array([[0, 0], [1, 0], [0, 1]], np.float32)  # its orientation tells whether the image is mirrored
        made = super().__call__(*args, **sample | {"keypoints": np.concatenate([sample["keypoints"], frame])})
        moved = made.pop("keypoints")
        if len(moved) != len(self.partners) + len(frame):
            raise ValueError("--data.augmentation has a transform that loses points of an image: leave it out.")
        points, (corner, right, down) = moved[:-3], moved[-3:]
        if np.linalg.det([right - corner, down - corner]) < 0:
            points = points[self.partners]
        rest = [sample["tabular"]] if "tabular" in sample else []
        return made | {"tabular": np.concatenate([normalized_keypoints(points).ravel(), *rest])}


def _swapped(name: str) -> str:
    """Swaps left and right in a name."""
    return re.sub("left|right", lambda found: "right" if found[0] == "left" else "left", name)


def reduction(transform: A.Compose | None, height: int, width: int) -> int:
    """Returns the factor by which an image may be decoded smaller because the first transform reduces it anyway.

    The decoded image is at least `SPARE` times as large as the transform's result, whatever crop is drawn: nothing is
    enlarged, and the following resize compensates most of the difference between the two ways of reduction.

    Args:
        transform: the pipeline; None for no transform.
        height: height of the image, in pixels.
        width: width of the image; the result is the same for the transposed size.

    Returns:
        1, 2, 4 or 8. For pipelines without cropping, a divisor of both sides, so that boxes stay exact.
    """
    first = transform.transforms[0] if transform is not None and transform.transforms else None
    short, long, divisor = min(height, width), max(height, width), 8
    if isinstance(first, RandomResizedCrop):
        (least, _), (narrow, wide) = first.scale, first.ratio
        spare = min(short, math.sqrt(short * long * least * min(narrow, 1 / wide))) / max(first.size)
    elif isinstance(first, A.SmallestMaxSize):
        spare = short / max(first.max_size_hw)
    elif isinstance(first, A.LongestMaxSize):
        spare, divisor = long / max(first.max_size_hw), math.gcd(height, width)
    elif isinstance(first, A.Resize):
        spare, divisor = short / max(first.height, first.width), math.gcd(height, width)
    else:
        return 1
    return next((factor for factor in (8, 4, 2) if spare >= SPARE * factor and divisor % factor == 0), 1)


def evaluation(
    image_size: int | str,
    crop_pct: float = 0.875,
    fit: Fit = "crop",
    boxes: A.BboxParams | None = None,
    deep: bool = False,
    points: Sequence[str] | None = None,
    multiple: int | None = None,
) -> A.Compose:
    """Creates the evaluation pipeline, which converts any image to the network's input size in one of five ways.

    Args:
        image_size: size of the result; see `sides`.
        crop_pct: fraction of the shorter side that is kept, in (0, 1].
        fit: ``crop`` resizes the image to cover ``image_size / crop_pct``, and takes the centre crop. ``pad`` resizes
            it to fit into ``image_size``, and pads with grey at the right and at the bottom, so that nothing is lost
            and coordinates are scaled by one factor. ``extend`` is ``crop`` after padding both ends with the colours of
            the border, so that nothing is lost either. ``stretch`` resizes height and width independently. ``native``
            keeps the image as it is, of any size.
        boxes: format of boxes, if there are any.
        deep: whether values are in [0, 1].
        points: names of keypoints that are transformed too, see `KeypointCompose`.
        multiple: pad only to the next multiples of this number, if ``fit`` is ``pad``.
    """
    steps = _fitting(image_size, crop_pct, fit, deep, multiple)
    return KeypointCompose(steps, points, bbox_params=boxes) if points else A.Compose(steps, bbox_params=boxes)


def _fitting(image_size: int | str, crop_pct: float, fit: Fit, deep: bool, multiple: int | None) -> list[Step]:
    """Returns the transforms of `evaluation`."""
    if fit == "native":
        return []
    height, width = sides(image_size)
    if fit == "pad":
        longest = A.LongestMaxSize(max_size_hw=(height, width), area_for_downscale="image", p=1)
        least = (height, width) if multiple is None else (None, None)
        rest = A.PadIfNeeded(*least, multiple, multiple, position="top_left", fill=DEEP_GREY if deep else GREY, p=1)
        return [longest, rest]
    if fit == "stretch":
        return [A.Resize(height, width, area_for_downscale="image", p=1)]
    rows, columns = (round(side / crop_pct) for side in (height, width))
    options: dict[str, Any] = {
        "max_size_hw": (rows, columns), "interpolation": cv2.INTER_CUBIC, "area_for_downscale": "image", "p": 1
    }  # fmt: skip
    resize: list[Step] = [A.SmallestMaxSize(**options)]
    if fit == "extend":
        resize = [A.LongestMaxSize(**options), A.PadIfNeeded(rows, columns, border_mode=cv2.BORDER_REPLICATE, p=1)]
    return [*resize, A.CenterCrop(height, width)]


BOUNDS = {  # ranges of numbers; others are in [0, 1]
    "crop": (0.01, 1),
    "scale": (0, 0.9),
    "rotate": (0, 180),
    "shear": (0, 80),
    "hue": (0, 180),
    "saturation": (0, 255),
    "operations": (1, 14),
}
LABELLED: Strengths = {
    "light": {"crop": 0.7},
    "standard": {
        "crop": 0.5, "shift": 0.1, "scale": 0.1, "rotate": 12, "brightness": 0.2, "contrast": 0.2, "noise": 0.05,
    },
    "strong": {
        "crop": 0.35, "operations": 2, "shift": 0.2, "scale": 0.3, "rotate": 30, "shear": 17, "brightness": 0.4,
        "contrast": 0.4, "noise": 0.1, "erase": 0.25,
    },
}  # fmt: skip
BOXED: Strengths = {
    "light": {"shift": 0.05, "scale": 0.1},
    "standard": {
        "shift": 0.1, "scale": 0.25, "brightness": 0.2, "contrast": 0.2, "noise": 0.05, "hue": 10, "saturation": 30,
    },
    "strong": {
        "shift": 0.15, "scale": 0.5, "rotate": 8, "shear": 4, "brightness": 0.3, "contrast": 0.3, "noise": 0.08, "hue": 15,
        "saturation": 60, "erase": 0.25,
    },
}  # fmt: skip
MASKED: Strengths = {
    "light": BOXED["light"],
    "standard": {**BOXED["standard"], "rotate": 10},
    "strong": {**BOXED["strong"], "rotate": 20, "shear": 5},
}
VIEWED: Strengths = {
    "light": {"jitter": 0.4},
    "standard": {"jitter": 0.8, "grey": 0.2, "blur": 0.5, "solarize": 0.1},
    "strong": {"jitter": 1, "grey": 0.3, "blur": 0.5, "solarize": 0.2},
}


def viewing(
    numbers: Numbers, size: tuple[int, int], scale: Sequence[float], flip: bool = True, colour: bool = True
) -> list[Step]:
    """Returns the transforms of a view for self-supervised learning: a crop with changed colours, so that neither
    position nor colour identifies the content (Chen et al. 2020, arXiv:2002.05709; the same for all views, unlike Caron
    et al. 2021, arXiv:2104.14294).

    Args:
        numbers: a strength of `VIEWED`: the probabilities of changing brightness, contrast, saturation and hue
            (``jitter``), of converting to grey, of blurring (only above 64 pixels), and of inverting bright parts
            (``solarize``).
        size: height and width of the result, in pixels.
        scale: minimum and maximum fraction of the image's area that is cropped.
        flip: mirror left and right.
        colour: whether images have three channels.
    """
    n, ratio = numbers, (0.75 * size[1] / size[0], 4 / 3 * size[1] / size[0])
    low, high = scale
    steps: list[Step] = [
        RandomResizedCrop(size, scale=(low, high), ratio=ratio, area_for_downscale="image", p=1),
        *([A.HorizontalFlip()] if flip else []),
    ]
    if not colour:
        steps.append(A.RandomBrightnessContrast(0.4, 0.4, p=n["jitter"]))
    else:
        light = _around(0.4, 1)
        steps.append(A.ColorJitter(light, light, _around(0.2, 1), _around(0.1), p=n["jitter"]))
        steps += [A.ToGray(p=n["grey"])] if "grey" in n else []
    steps += [A.GaussianBlur((0, 0), (0.1, 2), p=n["blur"])] if "blur" in n and min(size) > 64 else []
    return [*steps, *([A.Solarize((0.5, 0.5), p=n["solarize"])] if "solarize" in n else [])]


def training(numbers: Numbers, size: tuple[int, int], flip: bool = True, equalize: bool = True) -> list[Step]:
    """Returns random transforms that preserve the label; the first crops an image of any size.

    Args:
        numbers: a strength of `LABELLED`: ``light`` crops and flips; ``standard`` adds shift, scale, rotation, contrast
            and Gaussian noise; ``strong`` draws two of fourteen operations as in RandAugment (Cubuk et al. 2019,
            arXiv:1909.13719) and erases a patch (Zhong et al. 2017, arXiv:1708.04896).
        size: height and width of the result, in pixels.
        flip: mirror left and right; off if that changes the label, as with digits and letters.
        equalize: allow histogram equalisation, which albumentations supports for one or three channels.
    """
    n, ratio = numbers, (0.85 * size[1] / size[0], 1.18 * size[1] / size[0])
    steps: list[Step] = [
        RandomResizedCrop(size, scale=(n["crop"], 1), ratio=ratio, area_for_downscale="image", p=1),
        *([A.HorizontalFlip()] if flip else []),
    ]
    border = {"border_mode": cv2.BORDER_CONSTANT}
    if "operations" in n:
        operations = [
            A.Affine(rotate=_around(n["rotate"]), p=1, **border),
            A.Affine(shear={"x": _around(n["shear"])}, p=1, **border),
            A.Affine(shear={"y": _around(n["shear"])}, p=1, **border),
            A.Affine(translate_percent={"x": _around(n["shift"])}, p=1, **border),
            A.Affine(translate_percent={"y": _around(n["shift"])}, p=1, **border),
            A.Affine(scale=_around(n["scale"], 1), p=1, **border),
            A.RandomBrightnessContrast(n["brightness"], 0, p=1),
            A.RandomBrightnessContrast(0, n["contrast"], p=1),
            A.GaussNoise(std_range=(min(0.02, n["noise"]), n["noise"]), p=1),
            A.Sharpen(p=1),
            A.Posterize(4, p=1),
            A.Solarize((0.5, 1), p=1),
            *([A.Equalize(p=1)] if equalize else []),
            A.AutoContrast(p=1),
        ]
        erase = A.CoarseDropout(
            num_holes_range=(1, 1),
            hole_height_range=(0.1, 0.4),
            hole_width_range=(0.1, 0.4),
            fill="random",
            p=n["erase"],
        )
        steps += [A.SomeOf(operations, int(n["operations"]), p=1), erase]
    elif "rotate" in n:
        moves = {"scale": _around(n["scale"], 1), "rotate": _around(n["rotate"])}
        steps += [
            A.Affine(translate_percent=_around(n["shift"]), p=0.7, **moves, **border),
            A.RandomBrightnessContrast(n["brightness"], n["contrast"], p=0.3),
            A.GaussNoise(std_range=(min(0.01, n["noise"]), n["noise"]), p=0.1),
        ]
    return steps


def _around(spread: float, middle: float = 0) -> tuple[float, float]:
    return middle - spread, middle + spread


def training_with_boxes(numbers: Numbers, flip: bool = True, colour: bool = True, deep: bool = False) -> list[Step]:
    """Returns random transforms that keep boxes tight: shift, scale and mirroring move them exactly.

    Only ``strong`` rotates and shears a little; a box is then that of its inscribed ellipse, which is closer to most
    objects than its corners are. With masks, boxes are computed from these.

    Args:
        numbers: a strength of `BOXED`: ``light`` mirrors, shifts and scales a little; ``standard`` does more of it,
            changes brightness, contrast and colour, and adds noise; ``strong`` scales from a half to one and a half,
            and also rotates, shears, blurs, greys and erases.
        flip: mirror left and right; off if that changes the class, as with digits.
        colour: whether images are RGB.
        deep: whether values are in [0, 1].
    """
    moves: dict[str, Any] = {
        "scale": _around(numbers["scale"], 1),
        "translate_percent": _around(numbers["shift"]),
        "keep_ratio": True,
        "fill": DEEP_GREY if deep else GREY,
        "rotate_method": "ellipse",
        "p": 1,
    }
    moves |= {name: _around(numbers[name]) for name in ("rotate", "shear") if name in numbers}
    return [*([A.HorizontalFlip()] if flip else []), A.Affine(**moves), *_lighting(numbers, colour)]


def _lighting(n: Numbers, colour: bool) -> list[Step]:
    """Returns transforms that move nothing."""
    steps: list[Step] = []
    strong = "erase" in n
    if strong:
        noise = A.GaussNoise(std_range=(min(0.02, n["noise"]), n["noise"]), p=1)
        steps += [
            A.RandomBrightnessContrast(n["brightness"], n["contrast"], p=0.7),
            A.OneOf([noise, A.GaussianBlur((3, 5), p=1)], p=0.3),
            A.CoarseDropout((1, 3), (0.05, 0.15), (0.05, 0.15), fill="random", p=n["erase"]),
        ]
    elif "noise" in n:
        steps += [
            A.RandomBrightnessContrast(n["brightness"], n["contrast"], p=0.5),
            A.GaussNoise(std_range=(min(0.01, n["noise"]), n["noise"]), noise_scale_factor=0.5, p=0.1),
        ]
    if colour and "hue" in n:
        steps.append(A.HueSaturationValue(n["hue"], n["saturation"], 0, p=0.5 if strong else 0.3))
        steps += [A.ToGray(p=0.1)] if strong else []
    return steps


def padding(height: int, width: int, deep: bool = False) -> A.PadIfNeeded:
    """Pads smaller images to this size with grey at the right and at the bottom, which is ignored in the mask."""
    fill = DEEP_GREY if deep else GREY
    return A.PadIfNeeded(height, width, position="top_left", fill=fill, fill_mask=255, p=1)


def training_with_masks(
    numbers: Numbers, flip: bool = True, turn: bool = False, colour: bool = True, deep: bool = False
) -> list[Step]:
    """Returns random transforms of windows and their class maps, which are never interpolated; pixels from outside of a
    window are ignored (255).

    Args:
        numbers: a strength of `MASKED`: ``light`` mirrors, shifts and scales a little; ``standard`` does more of it,
            rotates a little, changes brightness, contrast and colour, and adds noise; ``strong`` scales from a half to
            one and a half, and also shears, blurs, greys and erases.
        flip: mirror left and right; off if that changes the class, as with digits.
        turn: all eight orientations of the square, for images without an upright orientation, as from the air or a
            microscope.
        colour: whether images are RGB.
        deep: whether values are in [0, 1].
    """
    moves = A.Affine(
        scale=_around(numbers["scale"], 1),
        translate_percent=_around(numbers["shift"]),
        rotate=_around(numbers.get("rotate", 0)),
        shear=_around(numbers.get("shear", 0)),
        keep_ratio=True,
        fill=DEEP_GREY if deep else GREY,
        fill_mask=255,
        mask_interpolation=cv2.INTER_NEAREST,
        p=0.8,
    )
    mirror: list[Step] = [A.D4(p=1)] if turn else [A.HorizontalFlip()] if flip else []
    return [*mirror, moves, *_lighting(numbers, colour)]
