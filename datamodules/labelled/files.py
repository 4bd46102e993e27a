"""Labelled image files in general: checked before a training, and divided into splits or folds."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.checking import digests_in, warn_of_cut, warn_of_shared, warn_of_two_names
from datamodules.decoded import ImageFiles
from datamodules.digests import digest_of_lines
from datamodules.errors import DataError, listed
from datamodules.files import Files
from datamodules.labelled.base import ClassificationDataModule, LabelledDataModule, S
from datamodules.labelled.rows import Objects, Rows
from datamodules.labelled.sources import LabelledSource
from datamodules.options import Check, NonNegativeInt
from datamodules.paths import Paths
from datamodules.splits import fold_of, stratified, stratified_by_group
from datamodules.tables import warn_of_alike

if TYPE_CHECKING:
    import pandas as pd

Indices = NDArray[np.intp]
DRAWN = 0.15  # fraction for testing, and of the rest for validation


def warn_of_shared_parts(parts: Mapping[str, LabelledSource]) -> None:
    """Warns of images that are in more than one split."""
    files = {name: part.images for name, part in parts.items()}
    warn_of_shared({name: (own.paths, own.digests) for name, own in files.items() if isinstance(own, ImageFiles)})


@dataclass(kw_only=True, eq=False, repr=False)
class LabelledFiles(Files, LabelledDataModule[S]):
    """Base class of modules that read labelled files.

    Args:
        folds: cross-validation: divide data without splits into this many folds of equal size; deterministic. Fold
            ``fold`` is the test split; validation is drawn from the others.
        fold: index of the fold, from 0.
        check: which files are decoded once before the training, to find broken files, duplicates in two splits and
            images under two names: ``all``; a fixed ``sample`` of a thousand; or ``none``. The others only have to
            exist. The result is cached, so that unchanged files are not decoded again.
    """

    folds: Annotated[int, Ge(2)] | None = None
    fold: NonNegativeInt | None = None
    check: Check = "all"

    one_size = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.folds is None) != (self.fold is None):
            given, lacking = ("fold", "folds") if self.folds is None else ("folds", "fold")
            raise DataError(
                f"--data.{given} {getattr(self, given)} needs --data.{lacking} too: --data.folds 5 --data.fold 0 is the first of "
                "five. All of them, one after the other, are trained by python -m pipelines.cross_validate."
            )
        if self.folds is not None and self.fold is not None and self.fold >= self.folds:
            raise DataError(
                f"--data.fold {self.fold} does not exist: {self.folds} folds are numbered 0 to {self.folds - 1}."
            )
        if self.check != "all" and self.cache != "none":
            raise DataError(
                f"--data.cache {self.cache} needs to know every image, and --data.check {self.check} does not look at all of "
                "them: leave one of the two out."
            )
        if self.check == "none" and self.bits == "auto":
            raise DataError(
                "--data.bits auto takes as many bits as the images need, and --data.check none looks at none of them: give "
                "their number, such as --data.bits 16, or --data.check sample."
            )

    def check_folds(self, splits: Iterable[str]) -> None:
        """Checks that data to be divided into folds have no splits.

        Raises:
            DataError: they have.
        """
        if self.folds is not None and (found := sorted(set(splits) - {"all"})):
            raise DataError(
                f"--data.folds {self.folds} divides data without splits, and {self.title} has {listed(found)}: leave --data.folds "
                "out, or give all images as one."
            )

    def inspected(
        self, rows: Rows, groups: NDArray[np.str_] | None = None
    ) -> tuple[ImageFiles, Objects, Objects, NDArray[np.bool_]]:
        """Inspects image files before the training, and warns of anomalies.

        Args:
            rows: the files.
            groups: group of each file, such as a patient; see `shared_out`.

        Returns:
            The files, the names and the splits of the rows, and whether they are usable.
        """
        paths, names, splits = rows
        table = self.checked_files(paths)
        digests, good = digests_in(table), (table["error"] == "").to_numpy()
        sizes = table[["height", "width"]].to_numpy(np.int64)
        columns = [names] if groups is None else [names, groups]
        lines = zip(digests.tolist(), *columns, strict=True)
        self.content = digest_of_lines(
            b" ".join([first, *map(str.encode, rest)]) for first, *rest in lines
        )  # however divided
        del table
        if self.preprocessing.fit == "crop":
            warn_of_cut(paths[good], sizes[good], self.size)
        warn_of_two_names(paths[good], digests[good], names[good])
        warn_of_alike(sorted(set(names)))
        return self.opened(paths, digests, sizes), names, splits, good

    def checked_files(self, paths: Paths) -> "pd.DataFrame":
        """Inspects the files; see `Files.looked_at`."""
        return self.looked_at(paths, self.check)

    def opened(self, paths: Paths, digests: NDArray[np.bytes_], sizes: NDArray[np.int64]) -> ImageFiles:
        """Returns the files as an array of images."""
        return ImageFiles(paths, digests, sizes, self.reading, self.cache, self.check == "all")

    def shared_out(
        self,
        whole: S,
        splits: Objects,
        good: NDArray[np.bool_],
        strata: Callable[[NDArray[Any]], tuple[NDArray[np.int64], Sequence[str]]],
        groups: NDArray[np.str_] | None = None,
    ) -> dict[str, S]:
        """Divides files into splits, and draws missing ones.

        Args:
            whole: all files.
            splits: split of each file, or ``all``.
            good: whether each file is usable.
            strata: returns the strata of labels, int64 N, and their names: classes or other groups that all splits
                should have in equal proportions.
            groups: group of each file, such as a patient; no group is in two splits.
        """
        parts = {split: np.flatnonzero(good & (splits == split)) for split in dict.fromkeys(splits.tolist())}
        self.check_folds(parts)
        if groups is not None:
            self._check_groups(parts, groups)

        def drawn(own: Indices, purpose: str, least: int) -> tuple[Indices, Indices]:
            labels, names = strata(whole.labels[own])
            if groups is None:
                rest, part = stratified(labels, DRAWN, names, purpose, least)
            else:
                rest, part = stratified_by_group(labels, groups[own], DRAWN, names, purpose)
            return own[rest], own[part]

        def test(own: Indices) -> tuple[Indices, Indices]:
            if self.folds is None or self.fold is None:
                return drawn(own, "validation and test", 3)
            labels, names = strata(whole.labels[own])
            rest, part = fold_of(labels, self.folds, self.fold, names, None if groups is None else groups[own])
            return own[rest], own[part]

        indices = self.divide(parts, test, lambda own: drawn(own, "validation", 2))
        divided = {name: whole.subset(own) for name, own in indices.items()}
        warn_of_shared_parts(divided)
        return divided

    def _check_groups(self, parts: Mapping[str, Indices], groups: NDArray[np.str_]) -> None:
        owners: dict[str, str] = {}
        for split, own in parts.items():
            for group in np.unique(groups[own]).tolist():
                if owners.setdefault(group, split) != split:
                    raise DataError(
                        f"{self.title}: images of {group!r} are in the splits {owners[group]} and {split}. With --data.group_column "
                        "a group is in one split only: give all its images to one, or leave the column `split` out."
                    )


@dataclass(kw_only=True, eq=False, repr=False)
class ClassFiles(LabelledFiles[LabelledSource], ClassificationDataModule):
    """Base class of modules that read files of classes."""

    def source(self, files: ImageFiles, labels: NDArray[np.int64]) -> LabelledSource:
        """Returns the samples of all rows."""
        return LabelledSource(files, labels)

    def _read(self, rows: Rows, groups: NDArray[np.str_] | None = None) -> dict[str, LabelledSource]:
        """Inspects the files, and divides them into splits."""
        files, names, splits, good = self.inspected(rows, groups)
        numbers = {name: k for k, name in enumerate(self.label_names)}
        whole = self.source(files, np.array([numbers[name] for name in names.tolist()]))
        learned = whole.labels[good & np.isin(splits, ("train", "all"))]
        empty = sorted(set(numbers.values()) - set(learned.tolist())) if {"train", "all"} & set(splits) else []
        if empty:
            output = (
                "" if empty[0] in whole.labels else " If it is the folder of --output, choose one outside of the data."
            )
            raise DataError(
                f"No image to train on in class {self.label_names[empty[0]]!r} of {self.title} ({len(empty)} of "
                f"{len(numbers)} classes are empty): add images, or remove the class.{output}"
            )
        return self.shared_out(whole, splits, good, lambda labels: (labels, self.label_names), groups)
