"""Albumentations recipes. Images stay uint8: the network normalises them on the device."""

import math
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

Strength = Literal["none", "light", "standard", "strong"]
Fit = Literal["crop", "pad", "extend", "native"]
GREY = 114  # what is laid around a picture
SPARE = 1.25  # how many times larger than needed a picture that was decoded smaller is still


class RandomResizedCrop(A.RandomResizedCrop):
    """Albumentations' own, but uint8 images are made smaller by torch's antialiased bilinear filter.

    Its results are Pillow's, as in torchvision's reference, and it takes a quarter of the time of OpenCV's area filter.
    """

    def apply(self, img: NDArray[Any], crop_coords: tuple[int, int, int, int], **params: Any) -> NDArray[Any]:
        """Cuts out and resizes an image."""
        x1, y1, x2, y2 = crop_coords
        if img.dtype != np.uint8 or (y2 - y1 <= self.size[0] and x2 - x1 <= self.size[1]):
            return super().apply(img, crop_coords, **params)
        part = torch.from_numpy(img[y1:y2, x1:x2])[None].permute(0, 3, 1, 2)
        return interpolate(part, self.size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()


def reduction(transform: A.Compose | None, height: int, width: int) -> int:
    """How many times smaller a picture may be decoded, if the first thing that is done to it makes it smaller anyway.

    What is left is larger by `SPARE` or more than what that makes of it, whatever part of it is drawn: nothing is enlarged,
    and the resize that follows evens out most of what two ways of making a picture smaller differ in.

    Args:
        transform: what is done; None does nothing.
        height: of the picture, in pixels.
        width: of the picture; the answer is the same for one on its side.

    Returns:
        1, 2, 4 or 8. Where a picture is seen whole, a divisor of both sides, so that boxes stay exact.
    """
    first = transform.transforms[0] if transform is not None and transform.transforms else None
    short, long, divisor = min(height, width), max(height, width), 8
    if isinstance(first, RandomResizedCrop):
        (least, _), (narrow, wide) = first.scale, first.ratio
        spare = min(short, math.sqrt(short * long * least * min(narrow, 1 / wide))) / max(first.size)
    elif isinstance(first, A.SmallestMaxSize):
        spare = short / first.max_size
    elif isinstance(first, A.LongestMaxSize):
        spare, divisor = long / first.max_size, math.gcd(height, width)
    else:
        return 1
    return next((factor for factor in (8, 4, 2) if spare >= SPARE * factor and divisor % factor == 0), 1)


def evaluation(
    image_size: int, crop_pct: float = 0.875, fit: Fit = "crop", boxes: A.BboxParams | None = None
) -> A.Compose:
    """Makes any picture what a network takes, in one of four ways.

    Args:
        image_size: side of the square result, in pixels.
        crop_pct: share of the shorter side that is kept, in (0, 1].
        fit: ``crop`` resizes the shorter side to ``image_size / crop_pct`` and cuts out the centre. ``pad`` resizes the
            longer side to ``image_size`` and lays grey at the right and at the bottom, so that nothing is lost and a
            coordinate of the result times longer side / ``image_size`` is one of the picture. ``extend`` is ``crop`` after
            the shorter side was extended on both ends by the colours of its border, so that nothing is lost either.
            ``native`` leaves it as it is, of any size.
        boxes: how boxes, if there are any, come and go.
    """
    if fit == "native":
        return A.Compose([])
    if fit == "pad":
        longest = A.LongestMaxSize(image_size, area_for_downscale="image", p=1)
        rest = A.PadIfNeeded(image_size, image_size, position="top_left", fill=GREY, p=1)
        return A.Compose([longest, rest], bbox_params=boxes)
    side = round(image_size / crop_pct)
    options: dict[str, Any] = {"interpolation": cv2.INTER_CUBIC, "area_for_downscale": "image", "p": 1}
    resize = _extended(side, options) if fit == "extend" else [A.SmallestMaxSize(side, **options)]
    return A.Compose([*resize, A.CenterCrop(image_size, image_size)])


def _extended(side: int, options: dict[str, Any]) -> list[A.BasicTransform]:
    return [A.LongestMaxSize(side, **options), A.PadIfNeeded(side, side, border_mode=cv2.BORDER_REPLICATE, p=1)]


def training(
    strength: Strength, image_size: int, crop_pct: float = 0.875, flip: bool = True, fit: Fit = "crop"
) -> A.Compose:
    """Random changes that leave the label as it is.

    Args:
        strength: ``none`` is `evaluation`; ``light`` crops and flips; ``standard`` adds shift, scale, rotation,
            contrast and Gaussian noise; ``strong`` draws two of fourteen operations as RandAugment does
            (Cubuk et al. 2019, arXiv:1909.13719) and erases a patch (Zhong et al. 2017, arXiv:1708.04896).
        image_size: side of the square result, in pixels.
        crop_pct: as in `evaluation`.
        flip: mirror left and right; off where that changes the label, as with digits and letters.
        fit: ``extend`` extends pictures as `evaluation` does, before a part is cut out at random.
    """
    if strength == "none":
        return evaluation(image_size, crop_pct, fit)
    mirror: list[A.BasicTransform] = [A.HorizontalFlip()] if flip else []
    # Small pictures are nearly all object: a hard crop would cut it off.
    least = {"light": 0.7, "standard": 0.5, "strong": 0.35}[strength] if image_size > 64 else 0.75
    crop = RandomResizedCrop(
        (image_size, image_size), scale=(least, 1), ratio=(0.85, 1.18), area_for_downscale="image", p=1
    )
    steps = [crop, *mirror]
    border = {"border_mode": cv2.BORDER_CONSTANT}
    if strength == "standard":
        steps += [
            A.Affine(translate_percent=(-0.1, 0.1), scale=(0.9, 1.1), rotate=(-12, 12), p=0.7, **border),
            A.RandomBrightnessContrast(0.2, 0.2, p=0.3),
            A.GaussNoise(std_range=(0.01, 0.05), p=0.1),
        ]
    elif strength == "strong":
        operations = [
            A.Affine(rotate=(-30, 30), p=1, **border),
            A.Affine(shear={"x": (-17, 17)}, p=1, **border),
            A.Affine(shear={"y": (-17, 17)}, p=1, **border),
            A.Affine(translate_percent={"x": (-0.2, 0.2)}, p=1, **border),
            A.Affine(translate_percent={"y": (-0.2, 0.2)}, p=1, **border),
            A.Affine(scale=(0.7, 1.3), p=1, **border),
            A.RandomBrightnessContrast(0.4, 0, p=1),
            A.RandomBrightnessContrast(0, 0.4, p=1),
            A.GaussNoise(std_range=(0.02, 0.1), p=1),
            A.Sharpen(p=1),
            A.Posterize(4, p=1),
            A.Solarize((0.5, 1), p=1),
            A.Equalize(p=1),
            A.AutoContrast(p=1),
        ]
        erase = A.CoarseDropout(
            num_holes_range=(1, 1), hole_height_range=(0.1, 0.4), hole_width_range=(0.1, 0.4), fill="random", p=0.25
        )
        steps += [A.SomeOf(operations, 2, p=1), erase]
    extend = _extended(image_size, {"area_for_downscale": "image", "p": 1}) if fit == "extend" else []
    return A.Compose([*extend, *steps])


def training_with_boxes(
    strength: Strength, image_size: int, boxes: A.BboxParams, flip: bool = True, colour: bool = True
) -> A.Compose:
    """Random changes under which boxes stay tight: shift, scale and mirroring move them exactly.

    Only ``strong`` turns and shears a little; a box then encloses the ellipse in it, which is nearer to most objects than
    its corners are. Where there are masks, boxes are taken from them anyway.

    Args:
        strength: ``none`` is `evaluation`; ``light`` mirrors, shifts and scales a little; ``standard`` does more of it, and
            changes brightness, contrast and colour, and adds noise; ``strong`` scales from a half to one and a half,
            also turns, shears, blurs, greys and erases.
        image_size: side of the square result, in pixels.
        boxes: how boxes come and go.
        flip: mirror left and right; off where that changes the class, as with digits.
        colour: whether images have three channels.
    """
    steps: list[A.BasicTransform | A.BaseCompose] = [*evaluation(image_size, fit="pad").transforms]
    if strength == "none":
        return A.Compose(steps, bbox_params=boxes)
    scale, shift = {"light": (0.1, 0.05), "standard": (0.25, 0.1), "strong": (0.5, 0.15)}[strength]
    moves: dict[str, Any] = {
        "scale": (1 - scale, 1 + scale),
        "translate_percent": (-shift, shift),
        "keep_ratio": True,
        "fill": GREY,
        "rotate_method": "ellipse",
        "p": 1,
    }
    if strength == "strong":
        moves |= {"rotate": (-8, 8), "shear": (-4, 4)}
    steps += [A.HorizontalFlip()] if flip else []
    steps += [A.Affine(**moves)]
    return A.Compose([*steps, *_lighting(strength, colour)], bbox_params=boxes)


def _lighting(strength: Strength, colour: bool) -> list[A.BasicTransform | A.BaseCompose]:
    """Changes that leave everything in its place."""
    steps: list[A.BasicTransform | A.BaseCompose] = []
    hues: dict[Strength, list[A.BasicTransform]] = {
        "standard": [A.HueSaturationValue(10, 30, 0, p=0.3)],
        "strong": [A.HueSaturationValue(15, 60, 0, p=0.5), A.ToGray(p=0.1)],
    }
    if strength == "standard":
        steps += [
            A.RandomBrightnessContrast(0.2, 0.2, p=0.5),
            A.GaussNoise(std_range=(0.01, 0.05), noise_scale_factor=0.5, p=0.1),
        ]
    elif strength == "strong":
        steps += [
            A.RandomBrightnessContrast(0.3, 0.3, p=0.7),
            A.OneOf([A.GaussNoise(std_range=(0.02, 0.08), p=1), A.GaussianBlur((3, 5), p=1)], p=0.3),
            A.CoarseDropout((1, 3), (0.05, 0.15), (0.05, 0.15), fill="random", p=0.25),
        ]
    return steps + (hues.get(strength, []) if colour else [])


def padding(image_size: int) -> A.PadIfNeeded:
    """Lays grey, which does not count in the mask, at the right and at the bottom of what is smaller than a square."""
    return A.PadIfNeeded(image_size, image_size, position="top_left", fill=GREY, fill_mask=255, p=1)


def training_with_masks(
    strength: Strength, image_size: int, flip: bool = True, turn: bool = False, colour: bool = True
) -> A.Compose:
    """Random changes of windows and their class maps, which are never interpolated; what comes from outside of a window
    does not count (255).

    Args:
        strength: ``none`` only fills up; ``light`` mirrors and shifts and scales a little; ``standard`` does more of it,
            turns a little, and changes brightness, contrast and colour, and adds noise; ``strong`` scales from a half to
            one and a half, also shears, blurs, greys and erases.
        image_size: side of the square result, in pixels.
        flip: mirror left and right; off where that changes the class, as with digits.
        turn: all eight positions of the square, for pictures without an upper side, from the air or a microscope.
        colour: whether images have three channels.
    """
    steps: list[A.BasicTransform | A.BaseCompose] = [padding(image_size)]
    if strength == "none":
        return A.Compose(steps)
    scale, shift, angle = {"light": (0.1, 0.05, 0), "standard": (0.25, 0.1, 10), "strong": (0.5, 0.15, 20)}[strength]
    steps += [A.D4(p=1)] if turn else [A.HorizontalFlip()] if flip else []
    steps += [
        A.Affine(
            scale=(1 - scale, 1 + scale),
            translate_percent=(-shift, shift),
            rotate=(-angle, angle),
            shear=(-5, 5) if strength == "strong" else (0, 0),
            keep_ratio=True,
            fill=GREY,
            fill_mask=255,
            mask_interpolation=cv2.INTER_NEAREST,
            p=0.8,
        )
    ]
    return A.Compose([*steps, *_lighting(strength, colour)])
