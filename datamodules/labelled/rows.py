"""Labelled image files as columns: their paths, their names and their splits."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from datamodules.images import EXTENSIONS, composed, names_in, sub_folders
from datamodules.paths import Paths

if TYPE_CHECKING:
    import pandas as pd

Row = tuple[str, str, str]  # path; name of the class or person; split, or ``all``
Objects = NDArray[np.object_]  # of few texts, many times


class Named(NamedTuple):
    """Files and their names.

    Attributes:
        paths: N.
        names: of the class or the person of each, N.
    """

    paths: Paths
    names: Objects


class Rows(NamedTuple):
    """Files, their names and their splits.

    Attributes:
        paths: N.
        names: of the class or the person of each, N.
        splits: of each, or ``all``.
    """

    paths: Paths
    names: Objects
    splits: Objects

    @classmethod
    def of(cls, rows: Iterable[Row]) -> "Rows":
        """Returns these rows as columns."""
        paths, names, splits = zip(*rows, strict=True)
        return cls(Paths.of(paths), np.array(names, object), np.array(splits, object))


def named_files(root: Path, left_out: list[Path], extensions: tuple[str, ...] = EXTENSIONS) -> Named:
    """Returns the images in a folder with a sub-folder per class or person, with the sub-folders' names, sorted by these;
    see `names_in`."""
    folders = sorted(sub_folders(root), key=lambda folder: composed(folder.name))
    found = [names_in(folder, left_out, extensions) for folder in folders]
    names = np.array([composed(folder.name) for folder in folders], object)
    return Named(Paths.joined(found), np.repeat(names, [len(own) for own in found]))


def objects(column: "pd.Series[Any]", change: Callable[[str], str] = str) -> Objects:
    """Returns a column of repeated strings as an array of shared objects."""
    import pandas as pd

    numbers, texts = pd.factorize(column)
    return np.array([change(text) for text in texts], object)[numbers]
