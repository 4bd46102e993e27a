"""Image files that one has oneself: a folder for each class, a folder without classes, tables of paths."""

import os
from dataclasses import KW_ONLY, dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.base import DataError, Source, listed
from datamodules.classification.base import ClassificationDataModule, FileSource, Images, split
from datamodules.images import (
    KINDS,
    check_images,
    composed,
    images_in,
    is_image,
    sub_folders,
    warn_of_cut,
    warn_of_left_out,
    warn_of_shared,
    warn_of_two_names,
)
from datamodules.options import Files
from datamodules.readers import paths_in
from datamodules.splits import SPLITS, split_folders, split_of
from datamodules.tables import by_split, check_table, read_table, spelled, warn_of_alike


@dataclass(kw_only=True, eq=False, repr=False)
class _Files(Files, ClassificationDataModule):
    """Shared by the modules that read image files: they are inspected once, before training."""

    one_size = False

    def _check(self, sources: dict[str, FileSource]) -> dict[str, Source]:
        """Applies the policy for bad files, and warns of images that are in two splits."""
        paths = np.concatenate([source.paths for source in sources.values()])
        table, self.bad_files = check_images(paths, self.on_bad_file)
        bad = (table["error"] != "").to_numpy()
        checked, start = {}, 0
        for name, source in sources.items():
            rows = slice(start, start + len(source))
            start += len(source)
            source.digests = table["digest"][rows].to_numpy(dtype=np.str_)
            checked[name] = source.subset(np.flatnonzero(~bad[rows]))
            counts = np.bincount(checked[name].labels, minlength=len(self.label_names))
            missing = [label for label, count in zip(self.label_names, counts, strict=True) if not count]
            if missing and name in ("train", "all"):
                raise DataError(
                    f"No image to train on in class {missing[0]!r} of {self.title} ({len(missing)} of "
                    f"{len(counts)} classes are empty): add images, or remove the class."
                )
        good = paths[~bad]
        if self.preprocessing.fit == "crop":
            warn_of_cut(good, table.loc[~bad, ["height", "width"]].to_numpy(np.int64))
        names = np.asarray(self.label_names)[np.concatenate([source.labels for source in sources.values()])[~bad]]
        warn_of_two_names(good, table["digest"][~bad].to_numpy(np.str_), names)
        warn_of_alike(self.label_names)
        return self._split(checked)

    def _split(self, sources: dict[str, FileSource]) -> dict[str, Source]:
        parts: dict[str, Images] = dict(sources)
        if "train" not in parts and "all" not in parts:  # a set that is only for the test
            return dict(parts)
        if "all" in parts and self.undivided:
            return {"test": parts["all"]}
        self.drawn = "all" in parts
        if "all" in parts:
            parts["train"], parts["test"] = split(parts.pop("all"), 0.15, self.label_names, "validation and test", 3)
        if "val" not in parts:
            parts["train"], parts["val"] = split(parts["train"], 0.15, self.label_names, "validation")
        files = {name: source for name, source in parts.items() if isinstance(source, FileSource)}
        warn_of_shared({name: (source.paths, source.digests) for name, source in files.items()})  # type: ignore[misc]
        return {name: parts[name] for name in SPLITS if name in parts}


@dataclass(eq=False, repr=False)
class ImageFolder(_Files):
    """Any folder with one sub-folder of images for each class, its name being the label.

    With ``train/`` and, optionally, ``val/`` and ``test/`` above the classes, in any usual spelling, these are the splits;
    without ``val/``, 15 % of the training images are drawn for validation. Without splits, 15 % of all are drawn for the
    test and 15 % of the rest for validation. What is drawn is stratified and always the same. A folder with ``test/``
    alone is for measuring only. Hidden files are left out, and so is what systems and archives leave behind.

    Args:
        root: the folder.
    """

    of_folders: ClassVar[bool] = True  # a split has a folder for each class

    root: str

    @property
    def title(self) -> str:
        """The folder's name."""
        return Path(self.root).resolve().name

    @cached_property
    def _folders(self) -> dict[str, Path]:
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"There is no folder {root.resolve()}: give the folder of your images with --data.root.")
        return split_folders(root, self.of_folders) or {"all": root}

    @cached_property
    def label_names(self) -> list[str]:
        """The names of the class folders, sorted.

        Raises:
            DataError: there are none, or another split has one that training lacks.
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
                    f"{self._folders[name]} has the class {unknown[0]!r}, which training does not have: "
                    f"the classes there are {listed(names)}."
                )
        return names

    @property
    def num_classes(self) -> int:
        """See `ClassificationDataModule.num_classes`."""
        for folder in self._folders.values():
            inner = (
                [part for own in sub_folders(folder) for part in sub_folders(own)] if len(self.label_names) == 1 else []
            )
            if len(inner) > 1:
                raise DataError(
                    f"{folder.resolve()} has one folder only, {self.label_names[0]}, which would be the one class. Are the "
                    f"classes {listed(f.name for f in inner)} in it? Then put these one level higher."
                )
        return super().num_classes

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        sources: dict[str, FileSource] = {}
        left_out: list[Path] = []
        for split_name, folder in self._folders.items():
            paths: list[str] = []
            labels: list[int] = []
            folders: dict[str, list[Path]] = {".": [folder]}  # of each class
            for entry in sub_folders(folder):
                folders.setdefault(composed(entry.name), []).append(entry)
            for label, name in enumerate(self.label_names):
                files = [os.fspath(file) for own in folders.get(name, ()) for file in images_in(own, left_out)]
                paths += files
                labels += [label] * len(files)
            if not paths:
                warn_of_left_out(left_out)
                raise DataError(f"{folder.resolve()} has no images; those read are {KINDS}.")
            sources[split_name] = FileSource(paths, np.asarray(labels, np.int64), self.in_chans)
            beside = [] if "." in self.label_names else [f for f in sorted(folder.iterdir()) if is_image(f)]
            if beside:
                rank_zero_warn(f"Left out: {len(beside)} images that are in no class's folder; the first: {beside[0]}.")
        warn_of_left_out(left_out)
        return self._check(sources)


class UnlabelledFolder(ImageFolder):
    """All images in a folder and in those below, without labels; or below ``train``, ``val`` and ``test`` in it.

    For tasks that need none, such as autoencoding. Batches are as those of `ImageFolder`, with label 0.
    """

    label_names: ClassVar[list[str]] = ["."]  # the one class is the folder itself
    of_folders = False


@dataclass(eq=False, repr=False)
class Manifest(_Files):
    """A CSV or Parquet table with a row for each image.

    Args:
        file: the table. A column ``split`` with train, val and test, where there is one, says which is which.
        path_column: column with the images' paths, relative to the table or absolute.
        label_column: column with the labels.
    """

    file: str
    _: KW_ONLY
    path_column: str = "path"
    label_column: str = "label"

    @property
    def title(self) -> str:
        """The table's name."""
        return Path(self.file).stem

    @cached_property
    def _table(self) -> pd.DataFrame:
        file = Path(self.file)
        table = read_table(file, "--data.file")
        table = table.rename(columns=spelled(table, [self.path_column, self.label_column, "split"]))
        columns = {self.path_column: "--data.path_column", self.label_column: "--data.label_column"}
        check_table(table, file, columns, list(columns), must_train=False)
        return table.assign(**{self.label_column: table[self.label_column].astype(str).map(composed)})

    @cached_property
    def label_names(self) -> list[str]:
        """The labels that occur in training, sorted."""
        table = self._table
        if "split" in table:
            learned = table["split"].map(split_of) == "train"
            table = table[learned] if learned.any() else table
        return sorted(table[self.label_column].unique())

    def load(self) -> dict[str, Source]:
        """See `VisionDataModule.load`."""
        table, names = self._table, self.label_names
        sources = {}
        for name, rows in by_split(table).items():
            if unknown := sorted(set(rows[self.label_column]) - set(names)):
                raise DataError(
                    f"{self.file}: the {name} split has the label {unknown[0]!r}, which training does not have: "
                    f"the labels there are {listed(names)}."
                )
            paths = paths_in(rows[self.path_column], Path(self.file))
            labels = rows[self.label_column].map(names.index).to_numpy(np.int64)
            sources[name] = FileSource(paths, labels, self.in_chans)
        return self._check(sources)
