"""Folders of images: one for each class, or without classes."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from datamodules.errors import DataError, listed
from datamodules.files import Folder
from datamodules.images import KINDS, composed, is_image, names_in, sub_folders, warn_of_left_out
from datamodules.labelled.files import ClassFiles
from datamodules.labelled.rows import Named, Rows, named_files
from datamodules.labelled.sources import LabelledSource
from datamodules.paths import Paths
from datamodules.splits import split_folders


@dataclass(eq=False, repr=False)
class ImageFolder(Folder, ClassFiles):
    """A folder with one sub-folder of images per class, whose name is the label.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the classes, in any common spelling, these are the
    splits; without ``val/``, 15 % of the training images are drawn for validation. Without splits, 15 % of all images
    are drawn for testing and 15 % of the rest for validation. Drawn splits are stratified and deterministic. A folder
    with only ``test/`` is for evaluation. Hidden files and files that systems and archives leave behind are skipped.
    """

    of_folders: ClassVar[bool] = True  # whether splits have a folder per class

    @cached_property
    def _folders(self) -> dict[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        return split_folders(root, self.of_folders) or {"all": root}

    @cached_property
    def label_names(self) -> list[str]:
        """Names of the class folders, sorted.

        Raises:
            DataError: there are none, or another split has one that training does not have.
        """
        found = {
            split: sorted({composed(entry.name) for entry in sub_folders(folder)})
            for split, folder in self._folders.items()
        }
        learned = next(split for split in ("all", "train", "test", "val") if split in found)
        names = found[learned]
        if not names:
            raise DataError(
                f"{self._folders[learned].resolve()} has no sub-folders: make one for each class, with its images."
            )
        for name, given in found.items():
            if unknown := sorted(set(given) - set(names)):
                raise DataError(
                    f"{self._folders[name]} has the class {unknown[0]!r}, and {self._folders[learned]} has no images of it to train on: the "
                    f"classes there are {listed(names)}. Add some, or remove the class."
                )
        return names

    @property
    @override
    def num_classes(self) -> int:
        for folder in self._folders.values():
            inner = (
                [part for own in sub_folders(folder) for part in sub_folders(own)] if len(self.label_names) == 1 else []
            )
            if len(inner) > 1:
                raise DataError(
                    f"{folder.resolve()} has only one sub-folder, {self.label_names[0]}, which would be the only "
                    f"class. Are the classes {listed(f.name for f in inner)} in it? Then move these one level up."
                )
        return super().num_classes

    @override
    def load(self) -> dict[str, LabelledSource]:
        parts: list[Rows] = []
        left_out: list[Path] = []
        for split, folder in self._folders.items():
            found = self._files(folder, left_out)
            if not len(found.paths):
                warn_of_left_out(left_out)
                raise DataError(f"{folder.resolve()} has no images in a supported format: {KINDS}.")
            parts.append(Rows(*found, np.full(len(found.paths), split, object)))
        warn_of_left_out(left_out)
        paths, names, splits = zip(*parts, strict=True)
        return self._read(Rows(Paths.joined(paths), np.concatenate(names), np.concatenate(splits)))

    def _files(self, folder: Path, left_out: list[Path]) -> Named:
        """Returns the images of a split with their classes, class by class."""
        if beside := [file for file in sorted(folder.iterdir()) if is_image(file)]:
            rank_zero_warn(
                f"Left out: {len(beside)} images that are not in the folder of a class; the first: {beside[0]}."
            )
        return named_files(folder, left_out)


class UnlabelledFolder(ImageFolder):
    """All images below a folder, without labels; or below ``train``, ``val`` and ``test`` in it.

    For tasks without labels, such as autoencoding. Batches are as those of `ImageFolder`, with label 0.
    """

    label_names: ClassVar[list[str]] = ["."]  # the only class is the folder itself
    of_folders = False

    @override
    def _files(self, folder: Path, left_out: list[Path]) -> Named:
        paths = names_in(folder, left_out)
        return Named(paths, np.full(len(paths), ".", object))
