"""Pictures of what an autoencoder does."""

from collections.abc import Mapping, Sequence

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import ImageDraw
from torch import Tensor

from modules.pictures.charts import rasterize
from modules.pictures.sheets import Image, image_grid, typeface


def to_uint8(image: Tensor) -> Image:
    """float N×C×H×W in [0, 1] to uint8 N×C×H×W."""
    return (image.detach().float().clamp(0, 1) * 255).round().byte().cpu().numpy()


def named_rows(rows: Mapping[str, Image]) -> Image:
    """Rows of pictures, each with its name at the left.

    Args:
        rows: by name uint8 N×C×H×W, with N the same in all.
    """
    sheet = image_grid(np.concatenate(list(rows.values())), columns=len(next(iter(rows.values()))))
    font = typeface(14)
    margin = max(round(font.getlength(name)) for name in rows) + 12
    page = PIL.Image.new("RGB", (sheet.shape[1] + margin, sheet.shape[0]), "white")
    page.paste(PIL.Image.fromarray(sheet), (margin, 0))
    draw, height = ImageDraw.Draw(page), sheet.shape[0] / len(rows)
    for k, name in enumerate(rows):
        draw.text((6, (k + 0.5) * height), name, "black", font, anchor="lm")
    return np.asarray(page)


def signed_tiles(values: Tensor, columns: int = 8) -> Image:
    """Filters: grey is zero, each scaled by its largest value.

    Args:
        values: float N×C×H×W; of other than one or three channels the mean is shown.
        columns: in a row.
    """
    values = values.detach().float().cpu()
    values = values if values.shape[1] in (1, 3) else values.mean(1, keepdim=True)
    largest = values.abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-12)
    return image_grid(to_uint8(0.5 + 0.5 * values / largest), columns)


def plane(codes: NDArray[np.float32], labels: NDArray[np.int64] | None, label_names: Sequence[str]) -> Image:
    """The codes in two dimensions, coloured by class: as they are, or their first two principal components.

    Args:
        codes: N×D.
        labels: N, or None.
        label_names: names for the legend.
    """
    axes_names, points = ("code 1", "code 2"), codes
    if codes.shape[1] == 1:
        points = np.stack([codes[:, 0], np.zeros(len(codes), np.float32)], 1)
    elif codes.shape[1] > 2:
        centred = codes - codes.mean(0)
        _, strengths, directions = np.linalg.svd(centred, full_matrices=False)
        points, shares = centred @ directions[:2].T, strengths**2 / max((strengths**2).sum(), 1e-12)
        first, second = (f"principal component {k + 1} ({shares[k]:.0%} of the variance)" for k in range(2))
        axes_names = first, second
    figure = Figure((7.5, 6), dpi=80)
    axes = figure.add_axes((0.1, 0.1, 0.66, 0.86))
    if labels is None:
        axes.scatter(points[:, 0], points[:, 1], s=4)
    else:
        colours = colormaps["tab10" if len(label_names) <= 10 else "nipy_spectral"]
        for k, name in enumerate(label_names):
            shade = colours(k if len(label_names) <= 10 else k / len(label_names))
            x, y = points[labels == k, :2].T
            axes.scatter(x, y, s=4, color=shade, label=name)
        if len(label_names) <= 30:
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8, markerscale=3, frameon=False)
    axes.set_xlabel(axes_names[0])
    axes.set_ylabel(axes_names[1])
    return rasterize(figure)
