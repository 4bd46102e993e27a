"""Training, validation and test splits: recognising their names, and drawing missing ones."""

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from datamodules.errors import DataError, listed
from datamodules.images import names_in, sub_folders

SPLITS = ("train", "val", "test")
SPELLINGS = {
    "train": ("train", "training", "trn", "tr", "trainval"),
    "val": ("val", "valid", "validation", "validate", "validating", "vld", "dev", "develop", "development", "eval",
            "evaluation"),
    "test": ("test", "testing", "tst", "holdout", "heldout"),
}  # fmt: skip
# Other words in names of splits, as in training_set, train_images, instances_val2017.
FILLERS = {"set", "data", "dataset", "split", "subset", "image", "images", "img", "imgs", "picture", "pictures", "photo",
           "photos", "sample", "samples", "annotation", "annotations", "instances", "coco", "s"}  # fmt: skip
KNOWN = {spelling: split for split, spellings in SPELLINGS.items() for spelling in spellings}
KNOWN |= {f"{spelling}{filler}": split for spelling, split in KNOWN.items() for filler in FILLERS}
KNOWN |= {f"hold{join}out": "test" for join in ("_", "-", " ")} | {f"held{join}out": "test" for join in ("_", "-", " ")}


def _words(name: str) -> list[str]:
    """Words of a name without fillers and years: trainImages, TRAIN_2017 and ``instances-train`` become ``train``."""
    camel = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    words = re.findall(r"[^\W\d_]+|\d+", camel.casefold())
    return [word for word in words if word not in FILLERS and not re.fullmatch(r"(19|20)\d\d", word)]


def split_of(name: str) -> str | None:
    """Returns the split that a name stands for, in any common spelling: ``Training``, ``train_set``, ``valid``,
    ``val2017``, ``dev``, …

    Returns:
        ``train``, ``val`` or ``test``; None for other names.

    >>> split_of("valid"), split_of("images")
    ('val', None)
    """
    plain = str(name).strip().casefold()
    words = _words(str(name).strip())
    return KNOWN.get(plain) or (KNOWN.get(words[0]) if len(words) == 1 else None)


def _hints(name: str) -> set[str]:
    """Splits that a longer name mentions: ``seg_train`` mentions ``train``."""
    return {KNOWN[word] for word in _words(name) if len(word) > 2 and word in KNOWN}


def hinted(file: str) -> str | None:
    """Which split a file is of by its name, such as that of ``train-00000-of-00005.parquet`` or ``imagenet-val-000001.tar``, or by
    its folder's; None where neither speaks of one, or of several."""
    path = PurePosixPath(file.replace("\\", "/"))
    if len(found := _hints(path.stem)) == 1:
        return found.pop()
    return None if found else split_of(path.parent.name)


def by_split_name(paths: Iterable[Path]) -> dict[str, Path]:
    """Assigns folders or files to splits by their names; others are left out.

    Returns:
        At most ``train``, ``val`` and ``test``, in this order.

    Raises:
        DataError: two are of the same split. ``trainval`` beside ``train`` is not: it is left out.
    """
    found: dict[str, Path] = {}
    given = sorted(paths)
    for path in given:
        name = path.stem if path.is_file() else path.name
        split = split_of(name)
        if split is None or ("trainval" in _words(name) and any(_words(p.stem) == ["train"] for p in given)):
            continue
        if split in found:
            raise DataError(
                f"{found[split]} and {path} are both names of the {split} split: put the images of one into the "
                "other, or "
                f"rename one; the names are {', '.join(SPLITS)}."
            )
        found[split] = path
    return {split: found[split] for split in SPLITS if split in found}


def split_folders(root: Path, of_folders: bool = True) -> dict[str, Path]:
    """Assigns a folder's sub-folders to splits; see `by_split_name`.

    Args:
        root: the folder.
        of_folders: whether splits have sub-folders, for classes or people. A folder without any is then a class that is
            called train, or valid, unless all folders have names of splits.

    Returns:
        At most ``train``, ``val`` and ``test``; empty if the folder has no splits. ``train`` may be missing, in a set
        for testing only.

    Raises:
        DataError: also if folders look like splits, such as ``seg_train`` and ``seg_test``, or a split is next to other
            folders, and the training set is ambiguous.
    """
    folders = sub_folders(root)
    named = [folder for folder in folders if split_of(folder.name)]
    if of_folders and len(named) < len(folders):
        folders = [folder for folder in folders if folder not in named or sub_folders(folder)]
    found = by_split_name(folders)
    unclear = [folder for folder in folders if split_of(folder.name) is None and _hints(folder.name)]
    meant = set(found).union(*(_hints(folder.name) for folder in unclear))
    names = f"{', '.join(SPLITS)} (Training, train_set, valid, dev and such are understood too)"
    if unclear and len(meant) > 1 and "train" in meant:  # a single train_station is a class
        raise DataError(
            f"Is {unclear[0].name} in {root.resolve()} a split? It is named like one beside "
            f"{listed(f.name for f in folders if f != unclear[0])}, but not as splits are. Name the folders of "
            f"splits {names}, and other folders without these words; or give one folder of classes with --data.root."
        )
    others = {folder.name: len(names_in(folder)) for folder in folders if folder not in found.values()} if found else {}
    if beside := [name for name, count in others.items() if count]:
        if "train" not in found:
            raise DataError(
                f"Is {', '.join(f.name for f in found.values())} in {root.resolve()} a split? It is named like one, but lies "
                f"beside {listed(beside)}. If it is, put the training images into a folder train; otherwise give it "
                "another name. "
                f"The names of splits are {names}."
            )
        rank_zero_warn(
            f"Left out: {sum(others.values())} images in {listed(beside)}, beside the splits "
            f"{listed(f.name for f in found.values())} of {root.resolve()}."
        )
    return found


def called(name: str, label_names: Sequence[str]) -> str:
    """Returns what a message calls a class; where it is the only one, the data set has no classes."""
    return f"Class {name!r}" if len(label_names) > 1 else "The data set"


def stratified(
    labels: NDArray[np.int64], share: float, label_names: Sequence[str], purpose: str, least: int = 2
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Stratified random split with a fixed seed, so that every run has the same parts. Every class is in both parts,
    however rare.

    Args:
        labels: labels of all samples.
        share: fraction of the second part, in (0, 1).
        label_names: names for the message.
        purpose: what the second part is for, for the message.
        least: minimum number of images per class.

    Returns:
        The indices of the rest and of the part, ascending.

    Raises:
        DataError: a class has too few images to be in both.
    """
    from sklearn.model_selection import train_test_split

    counts = np.bincount(labels, minlength=len(label_names))
    for name, count in zip(label_names, counts, strict=True):
        if count < least:
            raise DataError(
                f"{called(name, label_names)} has {count} image{'' if count == 1 else 's'}, too few to spare one for {purpose}: "
                f"at least {least} are needed. Add images{', leave the class out,' * (len(counts) > 1)} or provide your own splits."
            )
    size = max(round(share * len(labels)), len(label_names))
    rest, part = train_test_split(np.arange(len(labels)), test_size=size, stratify=labels, random_state=0)
    for label in np.setdiff1d(labels, labels[part]):
        moved = rest[labels[rest] == label][0]
        rest, part = rest[rest != moved], np.append(part, moved)
    return np.sort(rest), np.sort(part)


def fold_of(
    labels: NDArray[np.int64],
    folds: int,
    fold: int,
    label_names: Sequence[str],
    groups: NDArray[Any] | None = None,
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """One of k equal, stratified folds, always the same; together they contain all samples.

    Args:
        labels: labels of all samples.
        folds: number of folds.
        fold: index of the fold, from 0.
        label_names: names for the message.
        groups: group of each sample, such as a patient; no group is in two folds.

    Returns:
        The indices of the rest and of the fold, ascending.

    Raises:
        DataError: a class has fewer images, or images of fewer groups, than there are folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    for label, name in enumerate(label_names):
        own = labels == label
        count = int(own.sum()) if groups is None else len(np.unique(groups[own]))
        if count < folds:
            of = f"image{'s' * (count != 1)}" if groups is None else f"group{'s' * (count != 1)} with images"
            raise DataError(
                f"{called(name, label_names)} has {count} {of}, fewer than --data.folds {folds}, so a fold would have none: give "
                f"fewer folds, or add images{', or leave the class out' * (len(label_names) > 1)}."
            )
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    parts = kind(folds, shuffle=True, random_state=0).split(labels, labels, groups)
    return next(itertools.islice(parts, fold, None))


def stratified_by_group(
    labels: NDArray[np.int64], groups: NDArray[Any], share: float, label_names: Sequence[str], purpose: str
) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Like `stratified`, but no group is in both parts; the share is met as closely as the groups allow.

    Args:
        labels: of all samples.
        groups: group of each sample.
        share: see `stratified`.
        label_names: names for the message.
        purpose: what the second part is for, for the message.

    Raises:
        DataError: there are too few groups for every class to be in both.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    count = min(round(1 / share), len(np.unique(groups)))
    if count > 1:
        for rest, part in StratifiedGroupKFold(count, shuffle=True, random_state=0).split(labels, labels, groups):
            if len(np.unique(labels[rest])) == len(label_names):
                return rest, part
    raise DataError(
        f"Every class needs images from two groups or more, to spare one for {purpose}: add groups, leave out the "
        f"classes that occur in only one group, or provide your own splits ({len(np.unique(groups))} groups, "
        f"{len(label_names)} classes)."
    )
