"""Base class of data with boxes: mixing, augmentation and batches."""

import random
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import albumentations as A
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from typing_extensions import TypeVar, override

from datamodules.annotated.mixing import VISIBLE, Mixing, boxes_of, copy_paste, mixup, mosaic
from datamodules.annotated.rectangular import RectangularLoader, padded_shapes
from datamodules.annotated.writers import WRITERS, FileFormat
from datamodules.augmentations import BOXED, evaluation, training_with_boxes
from datamodules.augmenting import Augmentation, Augmenter
from datamodules.base import VisionDataModule
from datamodules.errors import DataError
from datamodules.loading import Key, KeyedDataset, KeyedLoader, Sample, Source, randomness
from datamodules.options import OWN, BatchSize, ImageSize, Own, PositiveInt, Preprocessing
from datamodules.writing import new_folder


class Boxes(Source, Protocol):
    """Interface of a split whose samples have ``boxes``, ``labels``, ``ignore`` and ``size``; see `SceneSource`."""

    @property
    def labels(self) -> NDArray[np.int64] | None:
        """Class of each box, if known without reading samples."""

    @property
    def shapes(self) -> NDArray[np.int64]:
        """Height and width of the samples, int64 N×2."""


S = TypeVar("S", bound=Boxes, default=Boxes)


class DetectionDataset(KeyedDataset):
    """Samples with boxes: boxes outside of the image are dropped, and several samples may be mixed.

    Args:
        source: the samples.
        transform: albumentations pipeline whose boxes are xyxy with the label field ``index``, or None.
        seed: seed of the run.
        size: height and width of mixed images.
        mixing: how samples are mixed; None in evaluation, where ``area`` is that of the file.
        epochs: number of epochs of the training, to detect the final ones; None or -1 if unknown.
        masks: return masks; sources may have them for mixing only.
    """

    def __init__(
        self,
        source: Source,
        transform: A.Compose | None,
        seed: int,
        size: tuple[int, int] = (0, 0),
        mixing: Mixing | None = None,
        epochs: int | None = None,
        masks: bool = False,
    ) -> None:
        super().__init__(source, transform, seed)
        self.size, self.mixing, self.masks = size, mixing or Mixing(), masks
        self.measured = mixing is None
        unknown = epochs is None or epochs < 0
        self.mixed_epochs = float("inf") if unknown else (epochs or 0) - self.mixing.plain_epochs

    @override
    def __getitem__(self, key: Key) -> Sample:
        index, epoch = key
        sample, generator = self.source[index], randomness(self.seed, epoch, index)
        has_area = "area" in sample
        if epoch < self.mixed_epochs:
            sample = self._mixed(sample, generator)
        if self.transform is not None:
            sample = self.augment(sample, generator)
        if not self.measured:  # the file's area is invalid after mixing and augmentation
            sample["area"] = (sample["boxes"][:, 2:] - sample["boxes"][:, :2]).prod(1)
        stacked = ["image", "size", *["mask"] * self.masks]
        listed = ["boxes", "labels", "ignore", *["area"] * has_area, *["masks"] * self.masks]
        return {key: sample[key] for key in stacked} | {key: torch.from_numpy(sample[key]) for key in listed}

    def _mixed(self, sample: Sample, generator: np.random.Generator) -> Sample:
        def another() -> Sample:
            return self.source[int(generator.integers(len(self.source)))]

        plan = self.mixing
        if plan.mosaic and generator.random() < plan.mosaic:
            sample = mosaic([sample, another(), another(), another()], self.size, generator)
        if plan.copy_paste and generator.random() < plan.copy_paste:
            sample = copy_paste(sample, another(), generator)
        if plan.mixup and generator.random() < plan.mixup:
            sample = mixup(sample, another(), generator)
        return sample

    @override
    def augment(self, sample: Sample, generator: np.random.Generator) -> Sample:
        assert self.transform is not None
        self.transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))
        moved: Sample = {key: sample[key] for key in ("image", "mask") if key in sample}
        if len(sample.get("masks", ())):
            moved["masks"] = sample["masks"]
        moved = self.transform(**moved, bboxes=sample["boxes"], index=np.arange(len(sample["boxes"])))
        boxes = np.asarray(moved.pop("bboxes"), np.float32).reshape(-1, 4)
        kept = np.asarray(moved.pop("index"), np.int64).reshape(-1)
        if "masks" in sample:  # masks are exact
            kept = np.unique(kept)  # a reflected border returns boxes twice
            masks = np.asarray(moved.get("masks", sample["masks"]), np.uint8)
            masks = masks[kept] if len(kept) else np.zeros((0, *moved["image"].shape[:2]), np.uint8)
            seen = masks.any((1, 2))
            kept, moved["masks"] = kept[seen], masks[seen]
            boxes = boxes_of(moved["masks"])
        rest = {key: sample[key][kept] for key in ("labels", "ignore", "area") if key in sample}
        return moved | rest | {"boxes": boxes, "size": sample["size"]}


@dataclass(kw_only=True, eq=False, repr=False)
class DetectionDataModule(VisionDataModule[S]):
    """Images with bounding boxes.

    Batches: ``image`` uint8 B×C×H×W of ``image_size``; ``boxes`` B tensors float32 N×4, xyxy in pixels of it;
    ``labels`` B tensors int64 N, from 0; ``ignore`` B tensors bool N (crowds and difficult objects, which are
    ignored in the loss and in metrics); ``size`` int64 B×2, height and width of the original images. With masks
    also ``masks``, B tensors uint8 N×H×W of 0 and 1, and ``mask`` uint8 B×H×W: label + 1, 0 for the background, 255
    for ignored pixels.

    The whole image is resized, see ``fit``.

    Args:
        augmentation: strength of the augmentation of training images: none, light, standard or strong; or a list of
            albumentations' transforms with their settings, such as ``[light, {RandomGamma: {p: 0.5}}]``.
        mixing: probabilities of combining several training images.
        image_size: size of the network's input: the side of a square in pixels, or ``HEIGHTxWIDTH`` such as
            ``480x640``.
        fit: ``pad`` resizes the whole image to fit and adds grey padding at the right or at the bottom; ``stretch``
            resizes height and width independently.
        flip: mirror training images at random; for classes that do not change by mirroring.
        pad_multiple: in validation and test, pad each image only to the next multiples of this number instead of to ``image_size``;
            batches then hold images of equal shape. The strides of the detector must divide it. Only with ``fit: pad``.
    """

    augmentation: Augmentation = "standard"
    mixing: Own[Mixing] = OWN
    image_size: Own[ImageSize] = 640
    fit: Literal["pad", "stretch"] = "pad"
    flip: Own[bool] = True
    batch_size: BatchSize = 16
    pad_multiple: PositiveInt | None = None
    masks = False
    dataset_class: ClassVar[type[DetectionDataset]] = DetectionDataset

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.mixing, Mixing):  # None, or plain data of a registered model
            self.mixing = Mixing(**(self.mixing or {}))
        if self.mixing.mixup and self.masks:
            raise DataError(
                "--data.mixing.mixup cannot blend masks, because a pixel would belong to two objects: set it to 0."
            )
        if self.pad_multiple is not None and self.fit != "pad":
            raise DataError(
                f"--data.pad_multiple {self.pad_multiple} sets the padding, but --data.fit {self.fit} does not pad: leave one of "
                "them out."
            )

    @property
    def label_names(self) -> list[str]:
        """Class names, by index."""
        raise NotImplementedError

    @property
    def targets(self) -> dict[str, list[str]]:
        """The tasks that images have targets for, with the class names of each."""
        if self.pad_multiple is not None:
            raise DataError(
                f"--data.pad_multiple {self.pad_multiple} makes images of different shapes, which only detection supports: leave it out."
            )
        names = list(self.label_names)
        return {"detection": names} | ({"segmentation": ["background", *names]} if self.masks else {})

    @property
    def num_classes(self) -> int:
        """Number of classes without the background."""
        return len(self.label_names)

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return self.fitted(self.fit)

    @override
    def transform(self, training_split: bool) -> A.Compose | None:
        if training_split and self.augmentation != "none":
            boxes = A.BboxParams("pascal_voc", ["index"], clip=True, min_visibility=VISIBLE, min_width=2, min_height=2)
            colour, deep = self.reading.colour, self.reading.deep
            fit = evaluation(self.image_size, fit=self.fit, deep=deep).transforms
            build = partial(training_with_boxes, flip=self.flip, colour=colour, deep=deep)
            masks = ("mask", "masks") if self.masks else ()
            augmenter = Augmenter(self.size, self.in_chans, fit, BOXED, build, boxes, masks, deep=deep)
            return augmenter.compose(self.augmentation)
        return self._fitting()

    def _fitting(self, multiple: int | None = None) -> A.Compose:
        boxes = A.BboxParams("pascal_voc", ["index"], clip=True)
        return evaluation(self.image_size, fit=self.fit, boxes=boxes, deep=self.reading.deep, multiple=multiple)

    @override
    def dataset(self, split: str, augmented: bool) -> DetectionDataset:
        mixing = self.mixing if augmented else None
        epochs = self.trainer.max_epochs if self.trainer else None
        transform = self.transform(augmented)
        return self.dataset_class(self.sources[split], transform, self.seed, self.size, mixing, epochs, self.masks)

    @override
    def val_dataloader(self) -> KeyedLoader:
        return self._measured("val")

    @override
    def test_dataloader(self) -> KeyedLoader:
        return self._measured("test")

    def _measured(self, split: str) -> KeyedLoader:
        """Returns the loader of a split for evaluation, in any order."""
        loader = self.loader(split)
        if self.pad_multiple is None:
            return loader
        dataset = self.dataset(split, False)
        dataset.transform = self._fitting(self.pad_multiple)
        shapes = padded_shapes(self.sources[split].shapes, self.size, self.pad_multiple)
        return RectangularLoader(
            dataset, shapes, loader.batch_size, self.seed, loader.rank, loader.world_size, self.num_workers
        )

    def identity(self) -> dict[str, Any]:
        """Returns name, label names, and for each split the size, the boxes of each class and the content digest."""
        identity = super().identity() | {"label_names": list(self.label_names)}
        for name, source in self.sources.items():
            if source.labels is not None:
                counts = np.bincount(source.labels, minlength=len(self.label_names))
                identity["splits"][name]["boxes"] = dict(zip(self.label_names, counts.tolist(), strict=True))
        return identity

    def write(self, folder: str, form: FileFormat = "coco") -> None:
        """Writes all splits to a folder in a format that other tools read.

        Args:
            folder: output folder, which must not exist yet.
            form: ``coco``, ``voc``, ``yolo`` or ``csv``; masks are kept by ``coco`` and ``yolo``, crowds by all except
                ``yolo``.

        Raises:
            DataError: the folder exists.
        """
        with new_folder(folder) as part:
            writer = WRITERS[form](part, self.label_names)
            for name, source in self.sources.items():
                writer.write(name, source)
        if lost := ", ".join(f"{number} {what}" for what, number in writer.left_out.items() if number):
            rank_zero_warn(f"Left out, since the format {form} has no place for them: {lost}.")
