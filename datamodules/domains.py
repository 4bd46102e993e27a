"""Unpaired image domains for image-to-image translation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import albumentations as A
import cv2
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.digests import digest_of
from datamodules.labelled.balance import Sampling, Weighting
from datamodules.labelled.base import ClassificationDataModule
from datamodules.labelled.folders import ImageFolder
from datamodules.labelled.published import Digits
from datamodules.labelled.sources import LabelledSource
from datamodules.loading import KeyedDataset, Sample
from datamodules.options import ImageSize, Own

FINE = 4  # strokes are measured at four times the resolution
STROKES = {"thin": 1.6, "thick": 4.2}  # width in pixels of 28
COLOURS = {"red": (230, 60, 50), "green": (60, 190, 70), "blue": (70, 110, 235), "yellow": (225, 200, 50)}
GREY_WEIGHTS = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R 601-2


class DomainDataset(KeyedDataset):
    """Orders an epoch so that each batch holds equal parts of all domains; smaller domains are repeated."""

    source: LabelledSource

    def __init__(self, source: LabelledSource, transform: A.Compose | None, seed: int) -> None:
        super().__init__(source, transform, seed)
        counts = np.bincount(source.labels)
        self.domains, self.longest = np.flatnonzero(counts), int(counts.max())

    @property
    @override
    def epoch_size(self) -> int:
        return self.longest * len(self.domains)

    @override
    def order(self, generator: np.random.Generator) -> NDArray[np.int64]:
        # The domains alternate. Each of W processes takes every W-th index: so that each process gets all domains, the
        # rounds start with different ones, with the one whose index is the sum of the digits of the round's index.
        own = [np.flatnonzero(self.source.labels == domain) for domain in self.domains]
        rounds = -(-self.longest // min(map(len, own)))
        drawn = [np.concatenate([generator.permutation(mine) for _ in range(rounds)])[: self.longest] for mine in own]
        table = np.stack(drawn, 1)
        turns = np.arange(self.longest)
        count, shift = len(own), np.zeros_like(turns)
        while turns.any():
            shift, turns = shift + turns % count, turns // count
        places = (np.arange(count)[None] + shift[:, None]) % count
        return np.take_along_axis(table, places, 1).ravel()


@dataclass(kw_only=True, eq=False, repr=False)
class _Domains(ClassificationDataModule):
    """Base class of data whose classes are domains."""

    sampling: Sampling = field(default="balanced", init=False)
    class_weighting: Weighting = field(default="none", init=False)

    @override
    def dataset(self, split: str, augmented: bool) -> KeyedDataset:
        kind = DomainDataset if split == "train" else KeyedDataset
        return kind(self.sources[split], self.transform(augmented), self.seed)


@dataclass(eq=False, repr=False)
class DomainFolder(_Domains, ImageFolder):
    """A folder with one sub-folder of images for each domain, such as ``A`` and ``B``, either directly or below
    ``train``, ``val`` and ``test``. Missing splits are drawn as in `ImageFolder`; training batches hold equal parts of
    all domains.
    """


class DomainSource(LabelledSource):
    """Images in memory with a domain each, and the content that translation must preserve.

    Args:
        images: uint8 N×H×W×C.
        labels: domains, int64 N.
        contents: content of the images, int64 N.
    """

    def __init__(self, images: NDArray[np.uint8], labels: NDArray[np.int64], contents: NDArray[np.int64]) -> None:
        super().__init__(images, labels)
        self.contents = contents

    @override
    def __getitem__(self, index: int) -> Sample:
        return super().__getitem__(index) | {"content": self.contents[index]}

    @override
    def batch(self, indices: Sequence[int]) -> dict[str, NDArray[Any]]:
        return super().batch(indices) | {"content": self.contents[indices]}

    @override
    def subset(self, indices: NDArray[Any]) -> "DomainSource":
        return DomainSource(self.images[indices], self.labels[indices], self.contents[indices])

    @cached_property
    @override
    def digest(self) -> str:
        parts = (self.images, self.labels, self.contents)
        return digest_of(b"".join(part.tobytes() for part in parts))


@dataclass(kw_only=True, eq=False, repr=False)
class _DigitDomains(_Domains):
    """Base class of domains with known ground truth: each digit of `Digits` is drawn in one domain only."""

    image_size: Own[ImageSize] = 28
    flip: Own[bool] = False

    def _draw(self, digit: NDArray[np.uint8], domain: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Draws a digit, uint8 28×28, in a domain, as uint8 28×28×3."""
        raise NotImplementedError

    @override
    def load(self) -> dict[str, LabelledSource]:
        """See `VisionDataModule.load`: the splits of `Digits`; the digits of each class are divided evenly among the
        domains."""
        sources: dict[str, LabelledSource] = {}
        for number, (name, source) in enumerate(Digits().sources.items()):
            place = np.zeros_like(source.labels)  # among those of its class
            for digit in range(10):
                place[source.labels == digit] = np.arange((source.labels == digit).sum())
            domains = (place + source.labels) % len(self.label_names)
            pictures = [
                self._draw(image[..., 0], int(domain), np.random.Generator(np.random.PCG64([number, i])))
                for i, (image, domain) in enumerate(zip(source.images, domains, strict=True))
            ]
            sources[name] = DomainSource(np.stack(pictures), domains, source.labels)
        return sources


class DigitTextures(_DigitDomains):
    """Two domains with known ground truth: grey digits, and other digits in colour on textures. 28×28, no download.

    A texture is a grating of two dark colours; the digit in front is at least 90 grey levels lighter.

    Batches: ``image`` uint8 B×3×S×S, ``label`` int64 B (0 grey, 1 textured), ``content`` int64 B (which digit).
    """

    label_names: ClassVar[list[str]] = ["grey", "textured"]

    def _draw(self, digit: NDArray[np.uint8], domain: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        if domain == 0:
            return digit[..., None].repeat(3, 2)
        ground = _texture(digit.shape[0], rng)
        while True:
            tint = rng.integers(60, 256, 3).astype(np.float32)
            if tint @ GREY_WEIGHTS >= (ground @ GREY_WEIGHTS).max() + 90:
                break
        ink = digit[..., None].astype(np.float32) / 255
        return np.rint(ground + (tint - ground) * ink).astype(np.uint8)


def _texture(side: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A grating, float32 side×side×3 in [0, 255]."""
    colours = rng.integers(0, 120, (2, 3)).astype(np.float32)
    angle, phase = rng.uniform(0, np.pi), rng.uniform(0, 2 * np.pi)
    length = rng.uniform(4, 9) * side / 28  # of a wave
    y, x = np.mgrid[:side, :side].astype(np.float32)
    wave = 0.5 + 0.5 * np.sin((x * np.cos(angle) + y * np.sin(angle)) * (2 * np.pi / length) + phase)
    return (colours[0] + (colours[1] - colours[0]) * wave[..., None]).astype(np.float32)


class DigitAttributes(_DigitDomains):
    """Eight domains with known ground truth: each digit has one of four colours and thin or thick strokes. 28×28, no
    download.

    Batches: ``image`` uint8 B×3×S×S, ``label`` int64 B (colour · 2 + stroke), ``content`` int64 B (which digit).
    """

    attributes: ClassVar[dict[str, list[str]]] = {"colour": list(COLOURS), "stroke": list(STROKES)}
    label_names: ClassVar[list[str]] = [f"{colour} {stroke}" for colour in COLOURS for stroke in STROKES]

    def _draw(self, digit: NDArray[np.uint8], domain: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        colour, stroke = divmod(domain, len(STROKES))
        ink = with_stroke(digit, list(STROKES.values())[stroke]).astype(np.float32) / 255
        tint = np.array(list(COLOURS.values())[colour], np.float32) + rng.uniform(-20, 20, 3)
        return np.rint(ink[..., None] * tint.clip(0, 255)).astype(np.uint8)


def with_stroke(digit: NDArray[np.uint8], width: float) -> NDArray[np.uint8]:
    """Changes the stroke width of a character by erosion or dilation at a finer resolution (after Castro et al. 2019,
    arXiv:1809.10780, with the width in pixels instead of a share of the original).

    Args:
        digit: light on dark, uint8 H×W.
        width: width of the stroke, in pixels.

    Returns:
        uint8 H×W.
    """
    height, breadth = digit.shape
    large = cv2.resize(digit, (breadth * FINE, height * FINE), interpolation=cv2.INTER_CUBIC)
    solid = (large > 110).astype(np.uint8)
    inside = cv2.distanceTransform(solid, cv2.DIST_L2, 5)
    ridge = (inside >= cv2.dilate(inside, np.ones((3, 3), np.uint8)) - 0.3) & (inside > 1)
    half = float(inside[ridge].mean()) if ridge.any() else 1.0
    grown = width * FINE / 2 - half
    if grown > 0:
        drawn = cv2.distanceTransform(1 - solid, cv2.DIST_L2, 5) <= grown
    else:
        drawn = inside > -grown
        drawn |= ridge & (inside > 1.5)  # thin parts of a stroke are not broken
    return np.asarray(
        cv2.resize(drawn.astype(np.uint8) * 255, (breadth, height), interpolation=cv2.INTER_AREA), np.uint8
    )
