"""Images that autoencoders log."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from modules.pictures.charts import scatter
from modules.pictures.sheets import Image, sheet, signed, stacked


def rows_of(images: Mapping[str, Tensor]) -> Image:
    """Draws rows of images, each below its name.

    Args:
        images: uint8 N×C×H×W by name.
    """
    return stacked(sheet(row, len(row), heading=name) for name, row in images.items())


def filter_tiles(values: Tensor) -> Image:
    """Draws filters, float N×C×H×W, as in `signed`; for other than one or three channels, their mean."""
    return sheet(signed(values if values.shape[1] in (1, 3) else values.mean(1, keepdim=True)))


def plane(codes: NDArray[np.float32], labels: NDArray[np.int64] | None, label_names: Sequence[str]) -> Image:
    """Draws codes in two dimensions, coloured by class: as they are, or their first two principal components.

    Args:
        codes: N×D.
        labels: N, or None.
        label_names: names of the classes.
    """
    if codes.shape[1] == 1:
        return scatter(np.pad(codes, ((0, 0), (0, 1))), labels, label_names, axes=("code 1", ""))
    if codes.shape[1] == 2:
        return scatter(codes, labels, label_names, axes=("code 1", "code 2"))
    from sklearn.decomposition import PCA

    fitted = PCA(2, random_state=0).fit(codes)
    names = [
        f"principal component {k} ({share:.0%} of the variance)"
        for k, share in enumerate(fitted.explained_variance_ratio_, 1)
    ]
    return scatter(fitted.transform(codes), labels, label_names, axes=(names[0], names[1]))
