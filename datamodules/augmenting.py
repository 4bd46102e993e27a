"""Augmentation settings, a strength or a list of transforms, built and tested before training."""

import inspect
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any

import albumentations as A
import numpy as np
from albumentations.augmentations.geometric.distortion import BaseDistortion
from pydantic import ValidationError

from datamodules.augmentations import BOUNDS, KeypointCompose, Numbers, Step, Strength, Strengths
from datamodules.errors import DataError
from datamodules.loading import Sample

Augmentation = Strength | list[Any]  # of names, and of {name: settings}
OPTION = "--data.augmentation"
EXAMPLE = "[standard, {RandomGamma: {p: 0.5}}]"
DRAWS = 6  # random tests of a list, half of them with every transform applied


@dataclass(frozen=True)
class Augmenter:
    """Builds the albumentations pipeline for training images.

    Args:
        size: height and width of the results, in pixels.
        channels: number of image channels.
        fit: transforms that resize an image of any size; skipped if the first transform does so itself.
        strengths: built-in strengths by name, with the numbers that can be set.
        build: creates the transforms of a strength from its numbers.
        boxes: format of boxes, if there are any.
        masks: keys of masks that are transformed with the image: ``mask``, ``masks``.
        keep: always apply ``fit`` first.
        deep: whether images are float32 in [0, 1] instead of uint8.
        points: names of keypoints that are transformed too, see `augmentations.KeypointCompose`.
    """

    size: tuple[int, int]
    channels: int
    fit: Sequence[Step]
    strengths: Strengths
    build: Callable[[Numbers], list[Step]]
    boxes: A.BboxParams | None = None
    masks: Sequence[str] = ()
    keep: bool = False
    deep: bool = False
    points: Sequence[str] = ()

    def compose(self, augmentation: Augmentation) -> A.Compose:
        """Builds the pipeline; images keep their type.

        Args:
            augmentation: a strength, or a list whose entries are a name or {name: settings}: of a transform of
                albumentations, with its arguments; of a class by its path; or of a strength, with its numbers.

        Raises:
            DataError: there is no such transform or argument, it does not support boxes or masks, its randomness is not
                controlled by the pipeline, or its output has another size or type.
        """
        entries = [augmentation] if isinstance(augmentation, str) else augmentation
        steps = self._steps(entries)
        fit = [] if steps and not self.keep and self._sizes(steps[0]) else list(self.fit)
        if not isinstance(augmentation, str):
            for draw in range(DRAWS):
                certain = draw % 2 == 0
                self._try(self._composed(fit), self._steps(entries, certain), draw)
        if self.points:
            return KeypointCompose([*fit, *steps], self.points, bbox_params=self.boxes)
        return A.Compose([*fit, *steps], bbox_params=self.boxes, is_check_shapes=bool(self.masks))

    def _composed(self, steps: Sequence[Step]) -> A.Compose:
        # The NoOp prevents a warning about boxes that no transform moves.
        return A.Compose([*steps, A.NoOp(p=0)], bbox_params=self.boxes)

    def _steps(self, entries: Any, certain: bool = False) -> list[Step]:
        """Builds the transforms of a list; with ``certain``, all are applied with probability 1, to test them."""
        if not isinstance(entries, list):
            raise DataError(f"{OPTION} must be a list of transforms, such as {EXAMPLE}, not {entries!r}.")
        steps: list[Step] = []
        for entry in entries:
            name, settings = next(iter(entry.items())) if isinstance(entry, dict) and len(entry) == 1 else (entry, {})
            settings = {} if settings is None else settings
            if not isinstance(name, str) or not isinstance(settings, dict):
                raise DataError(
                    f"{OPTION}: {entry!r} is no transform with its settings: write NAME or {{NAME: {{SETTING: VALUE}}}}, as in "
                    f"{EXAMPLE}."
                )
            if name in self.strengths:
                steps += self._strength(name, settings)
            elif name != "none":
                steps.append(self._transform(name, settings, certain))
        return steps

    def _strength(self, name: str, given: dict[str, Any]) -> list[Step]:
        """Transforms of a strength, with the given settings."""
        known = self.strengths[name]
        for key, value in given.items():
            if key not in known:
                raise DataError(
                    f"{OPTION}: {name} has no number {key}, but {', '.join(known)}.{_near(key, known)} What it has not can be "
                    "added as a transform of albumentations."
                )
            least, most = BOUNDS.get(key, (0, 1))
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
                raise DataError(f"{OPTION}: {key} of {name} must be a number from {least} to {most}, not {value!r}.")
        return self.build({**known, **given})

    def _transform(self, name: str, settings: dict[str, Any], certain: bool) -> Step:
        """Builds a transform of albumentations by its name, or any other by its class path."""
        kind = self._kind(name)
        parameters = inspect.signature(kind).parameters
        takes = [key for key in parameters if key not in ("seed", "strict")]
        if all(each.kind is not each.VAR_KEYWORD for each in parameters.values()):
            for key in settings:
                if key not in takes:
                    raise DataError(
                        f"{OPTION}: {name} has no setting {key}, but {', '.join(takes)}.{_near(key, takes)}"
                    )
        settings = dict(settings)
        if "mask" in self.masks and not self.boxes and getattr(parameters.get("fill_mask"), "default", None) == 0:
            settings.setdefault("fill_mask", 255)  # pixels from outside are ignored
        if issubclass(kind, A.BaseCompose):
            settings["transforms"] = self._steps(settings.get("transforms", []), certain)
        if certain and "p" in parameters:
            settings["p"] = 1
        try:
            step: Step = kind(**settings)
        except Exception as error:  # it may be a custom transform
            raise DataError(f"{OPTION}: {name} cannot be made: {_told(error)}.") from error
        if isinstance(step, A.DualTransform):
            self._check_targets(name, step)
        return step

    def _kind(self, name: str) -> Any:
        """Class of a transform."""
        place, _, last = name.rpartition(".")
        known = [key for key, value in vars(A).items() if _is_transform(value)]
        if name == "RandomResizedCrop":
            place = "datamodules.augmentations"  # the same, but faster
        try:
            found = getattr(import_module(place or "albumentations"), last, None)
        except (ImportError, ValueError):
            found = None
        if found is None:
            raise DataError(
                f"{OPTION}: there is no transform {name}.{_near(last, [*known, *self.strengths])} Give one of albumentations by "
                f"its name, one of your own by its class path, or {', '.join(self.strengths)}."
            )
        if not _is_transform(found):
            raise DataError(
                f"{OPTION}: {name} is no transform of albumentations: one of your own is derived from "
                "A.ImageOnlyTransform, or from A.DualTransform where it moves boxes or masks too."
            )
        return found

    def _check_targets(self, name: str, step: A.DualTransform) -> None:
        targets = getattr(step, "_targets", ())
        carried = {target.value.lower() for target in (targets if isinstance(targets, tuple) else (targets,))}
        needed = {"boxes": "bboxes"} if self.boxes else {}
        needed |= {"masks": "mask"} if self.masks else {}
        needed |= {"keypoints": "keypoints"} if self.points else {}
        if isinstance(step, BaseDistortion):
            carried.discard("keypoints")  # it rounds them to integers, and drops some
        if lacking := [word for word, target in needed.items() if target not in carried]:
            raise DataError(
                f"{OPTION}: {name} moves images, but not their {' and '.join(lacking)}, which would then be wrong: leave it out."
            )

    def _sizes(self, step: Step) -> bool:
        """Whether a transform produces the final size from a picture of any size."""
        if step.p < 1:
            return False
        height, width = self.size
        for shape in ((2 * height + 13, 3 * width + 7), (height // 2 + 1, width // 2 + 1)):
            try:
                made = self._composed([step])(**self._sample(shape))["image"]
            except Exception:  # e.g. a crop larger than the image
                return False
            if made.shape[:2] != self.size:
                return False
        return True

    def _sample(self, shape: tuple[int, int], seed: int = 0) -> Sample:
        """A random image with two boxes and masks, as far as the samples have them."""
        height, width = shape
        generator = np.random.default_rng(seed)
        masks = np.zeros((2, height, width), np.uint8)
        masks[0, height // 5 : height // 2 + 1, width // 5 : width // 2 + 1] = 1
        masks[1, height // 3 :, width // 3 :] = 1
        image = generator.integers(0, 256, (height, width, self.channels), np.uint8)
        sample: Sample = {"image": image.astype(np.float32) / 255 if self.deep else image}
        if self.boxes:
            boxes = [
                [width // 5, height // 5, width // 2 + 1, height // 2 + 1],
                [width // 3, height // 3, width, height],
            ]
            sample |= {"bboxes": np.array(boxes, np.float32), "index": np.arange(2)}
        found = {"masks": masks, "mask": masks[0] * 100 + masks[1] * 50}
        return sample | {key: found[key] for key in self.masks}

    def _try(self, fit: A.Compose, steps: Sequence[Step], seed: int) -> None:
        """Runs a random sample through the pipeline twice.

        Raises:
            DataError: see `compose`; it names the transform.
        """
        height, width = self.size
        sample, resized = fit(**self._sample((3 * height // 4 + 1, 2 * width // 3 + 1), seed)), ""
        for step in steps:
            name, before = type(step).__name__, sample
            try:
                sample, again = (self._applied(step, before, seed) for _ in range(2))
            except Exception as error:
                if isinstance(error, NotImplementedError):
                    what = f"cannot carry {'boxes' if self.boxes else 'masks'} along: leave it out"
                else:
                    shape = "×".join(map(str, before["image"].shape))
                    what = f"fails on an image of {shape} ({before['image'].dtype}): {_told(error)}"
                raise DataError(f"{OPTION}: {name} {what}.") from error
            image = sample["image"]
            if not isinstance(image, np.ndarray) or image.dtype != before["image"].dtype:
                raise DataError(
                    f"{OPTION}: {name} makes {getattr(image, 'dtype', type(image).__name__)} of {before['image'].dtype} images. Leave it out: the "
                    "network normalises its images itself."
                )
            if image.ndim != 3 or image.shape[2] != self.channels:
                raise DataError(
                    f"{OPTION}: {name} makes images of shape {image.shape} of those with {self.channels} channels: leave it out."
                )
            for key in self.masks:
                if not set(np.unique(sample[key])) <= {*np.unique(before[key]), 0, 255}:
                    raise DataError(
                        f"{OPTION}: {name} mixes the values of masks, which are classes: let it take the nearest pixel "
                        "(mask_interpolation: 0), or leave it out."
                    )
            if any(not np.array_equal(sample[key], again[key]) for key in ("image", *self.masks)):
                raise DataError(
                    f"{OPTION}: {name} makes two images of one with the same seed, so that no training could be repeated or go "
                    "on exactly: let it draw from self.random_generator or self.py_random."
                )
            resized = name if image.shape[:2] != before["image"].shape[:2] else resized
        if sample["image"].shape[:2] != self.size:
            got, wanted = ("×".join(map(str, shape)) for shape in (sample["image"].shape[:2], self.size))
            raise DataError(
                f"{OPTION}: {resized} leaves images of {got} pixels, where the network takes {wanted}: let the last transform "
                "that changes the size give that one."
            )

    def _applied(self, step: Step, sample: Sample, seed: int) -> Sample:
        whole = self._composed([step])
        whole.set_random_state(np.random.default_rng(seed), random.Random(seed))
        return whole(**{key: value.copy() for key, value in sample.items()})


def _is_transform(found: object) -> bool:
    return inspect.isclass(found) and issubclass(found, A.BasicTransform | A.BaseCompose)


def _near(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, list(known), 1)
    return f" Did you mean {near[0]}?" if near else ""


def _told(error: Exception) -> str:
    """Error message on one line; for pydantic, the first error and the setting."""
    cause = error.__cause__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        setting, given = first["loc"][0] if first["loc"] else "", first.get("input")
        if first["type"] == "missing":
            return f"it needs the setting {setting}"
        return f"{setting} {given!r}: {first['msg'][:1].lower()}{first['msg'][1:]}"
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
