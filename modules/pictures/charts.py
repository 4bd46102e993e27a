"""Charts as images: confusion matrices, precision-recall curves, scatter plots, overlays, heat maps."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from modules.pictures.sheets import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int = 80, **options: Any) -> "Figure":
    """Returns an empty figure of that many inches; matplotlib is only imported then."""
    from matplotlib.figure import Figure

    return Figure((width, height), dpi=dpi, **options)


def rasterize(figure: "Figure") -> Image:
    """Renders a matplotlib figure, as uint8 H×W×3."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def confusion_matrix(counts: NDArray[np.int64], label_names: Sequence[str]) -> Image:
    """Draws a confusion matrix, normalised over the true classes.

    Args:
        counts: K×K, true classes in rows, predicted classes in columns.
        label_names: K names.

    >>> confusion_matrix(np.array([[8, 2], [1, 9]]), ["cat", "dog"]).ndim
    3
    """
    classes = len(label_names)
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = min(3 + 0.4 * classes, 14)
    figure = new_figure(side, side)
    margin = min(0.3, (0.4 + 0.09 * max(map(len, label_names))) / side) if classes <= 40 else 0.05
    axes = figure.add_axes((margin, margin, 0.98 - margin, 0.98 - margin))
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if classes <= 40:
        axes.set_xticks(range(classes), label_names, rotation=90, fontsize=8)
        axes.set_yticks(range(classes), label_names, fontsize=8)
    if classes <= 15:
        for i, j in np.ndindex(classes, classes):
            if counts[i, j]:
                shade = "white" if shares[i, j] > 0.5 else "black"
                axes.text(j, i, str(counts[i, j]), ha="center", va="center", color=shade, fontsize=7)
    return rasterize(figure)


Points = tuple[NDArray[np.float64], NDArray[np.float64]]  # recall and precision, N each


def precision_recall(curves: Mapping[str, Points], title: str, mean: tuple[str, Points] | None = None) -> Image:
    """Draws precision-recall curves by name.

    Args:
        curves: curves; from 13 on, their names are left out.
        title: title of the legend.
        mean: name and points of a further curve, drawn in black; None for none.
    """
    figure = new_figure(6, 4.5)
    axes = figure.add_subplot()
    few = len(curves) <= 12
    for name, points in curves.items():
        axes.plot(*points, linewidth=0.8 if few else 0.4, label=name if few else None)
    if mean is not None:
        axes.plot(*mean[1], "black", linewidth=2, label=mean[0])
    if mean is not None or (few and curves):
        axes.legend(title=title, fontsize=7, title_fontsize=8, loc="lower left")
    axes.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    figure.tight_layout()
    return rasterize(figure)


def heat(values: NDArray[np.float32], colours: str = "viridis") -> Image:
    """Draws a heat map of H×W values with a matplotlib colourmap, scaled to their range: uint8 H×W×3.

    >>> heat(np.array([[0.0, 1.0]], np.float32), "grey").tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    from matplotlib import colormaps

    low, high = float(values.min()), float(values.max())
    return (colormaps[colours]((values - low) / max(high - low, 1e-12))[..., :3] * 255).round().astype(np.uint8)


def overlays(
    image: Image, title: str, maps: Sequence[tuple[str, NDArray[np.float32], str]], side: float = 3.4
) -> Image:
    """Draws an image, and next to it the greyscale image overlaid with each map, with a colour bar.

    Args:
        image: uint8 S×S×C.
        title: title above the image.
        maps: title, values h×w that cover the whole image, and name of a matplotlib colourmap. If some values are
            negative, the scale is symmetric about zero.
        side: side of an image, in inches.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    wide = side * (1 + 1.25 * len(maps))
    figure = new_figure(wide, side + 0.35, 100)
    grey, edge = image.mean(2), (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    for i, (heading, values, colours) in enumerate([(title, None, "grey"), *maps]):
        left = side * (1.25 * i - (0.2 if i else 0)) / wide
        axes = figure.add_axes((left, 0.01, 0.97 * side / wide, 0.97 * side / (side + 0.35)))
        axes.set_title(heading, fontsize=11, pad=4)
        axes.set_axis_off()
        if values is None:
            axes.imshow(image, cmap="grey", interpolation="nearest")
            continue
        most = max(float(np.abs(values).max()), 1e-12)
        axes.imshow(grey, cmap="grey", vmin=-64, vmax=319, interpolation="nearest")
        norm = Normalize(-most if values.min() < 0 else 0, most)
        paint = ScalarMappable(norm, colours)
        axes.imshow(values, cmap=colours, norm=norm, alpha=0.55, extent=edge, interpolation="bilinear")
        place = (left + 0.98 * side / wide, 0.03, 0.04 * side / wide, 0.84)
        figure.colorbar(paint, cax=figure.add_axes(place)).ax.tick_params(labelsize=8)
    return rasterize(figure)


def project(
    features: NDArray[np.float32], method: Literal["pca", "tsne"] = "pca", perplexity: float = 30
) -> NDArray[np.float32]:
    """Projects features to the plane by PCA, or by t-SNE (van der Maaten & Hinton 2008), which preserves
    neighbourhoods.

    Args:
        features: N×K.
        method: ``pca`` or ``tsne``.
        perplexity: perplexity of t-SNE, limited to a third of the number of points.

    Returns:
        N×2.

    >>> project(np.eye(3, dtype=np.float32)).shape
    (3, 2)
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if method == "tsne" and len(features) > 3:
        layout = TSNE(perplexity=min(perplexity, (len(features) - 1) / 3), init="pca", random_state=0)
        return layout.fit_transform(features)
    flat = PCA(min(2, *features.shape), random_state=0).fit_transform(features)
    return np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))


def scatter(
    points: NDArray[np.float32],
    labels: NDArray[np.int64] | None,
    names: Sequence[str],
    title: str = "",
    axes: tuple[str, str] | None = None,
    diagonal: bool = False,
) -> Image:
    """Draws points in the plane, coloured by class.

    Args:
        points: N×2.
        labels: class indices of the points, N; None for a single colour.
        names: class names.
        title: title above the chart.
        axes: labels of the axes; None if only distances are meaningful, not coordinates.
        diagonal: draw the line on which both coordinates are equal.
    """
    from matplotlib import colormaps

    present = [] if labels is None else np.unique(labels).tolist()
    wide = -(-min(len(present), 60) // 20)  # columns of the legend
    figure = new_figure(6.5 + 1.6 * wide, 6.3, 100, layout="constrained")
    plot = figure.add_subplot()
    plot.set_title(title, fontsize=12)
    if axes is None:
        plot.set(xticks=[], yticks=[])
    else:
        plot.set(xlabel=axes[0], ylabel=axes[1])
    if diagonal:
        plot.axline((float(points[:, 0].mean()),) * 2, slope=1, color="0.6", linewidth=1, zorder=0)
    if labels is None:
        plot.scatter(points[:, 0], points[:, 1], s=14)
        return rasterize(figure)
    colours = colormaps["tab10" if len(present) <= 10 else "tab20" if len(present) <= 20 else "gist_rainbow"]
    for i, label in enumerate(present):
        colour = colours(i if len(present) <= 20 else i / len(present))
        name = names[label] if i < 60 else None
        x, y = points[labels == label].T
        plot.scatter(x, y, 14, color=colour, label=name, linewidths=0)
    figure.legend(loc="outside right upper", ncols=wide, markerscale=2, fontsize=10, frameon=False)
    return rasterize(figure)


def nested_squares(image: Image, squares: Sequence[tuple[str, int | None]], title: str) -> Image:
    """Draws concentric squares around the centre of an image.

    Args:
        image: uint8 H×W×C.
        squares: label and side in pixels of each square; None for the whole image.
        title: title above the image.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle

    height, width = image.shape[:2]
    side = max(height, width)
    figure = new_figure(7.2, 4.4, 100, layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(image, cmap="grey", interpolation="nearest", alpha=0.75)
    # Squares beyond the image are cut off at a margin around it.
    rim = 0.06 * side
    axes.set_xlim(-0.5 - rim, width - 0.5 + rim)
    axes.set_ylim(height - 0.5 + rim, -0.5 - rim)
    for i, (name, size) in enumerate(squares):
        drawn = side if size is None else min(size, side + rim)
        colour = colormaps["plasma"](0.9 * i / max(1, len(squares) - 1))
        corner = width / 2 - 0.5 - drawn / 2, height / 2 - 0.5 - drawn / 2
        axes.add_patch(Rectangle(corner, drawn, drawn, fill=False, edgecolor=colour, linewidth=2.5, label=name))
    axes.set_axis_off()
    axes.set_title(title, fontsize=12)
    figure.legend(loc="outside right upper", fontsize=10, frameon=False)
    return rasterize(figure)
