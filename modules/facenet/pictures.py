"""Charts of face verification, as uint8 H×W×3."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from modules.facenet.metrics import Floats, Integers, Roc, Verification
from modules.pictures.charts import new_figure, project, rasterize
from modules.pictures.sheets import Image, as_rgb, sheet

Picture = Callable[[int], NDArray[np.uint8]]  # returns the image at an index of the split, uint8 H×W×C


def roc_curve(roc: Roc, figures: dict[str, float]) -> Image:
    """Draws the ROC curve over false accept rates on a logarithmic scale."""
    figure = new_figure(5, 4.5, layout="constrained")
    axes = figure.subplots()
    axes.semilogx(roc.false, roc.true)
    axes.axvline(figures["eer"], color="grey", linestyle=":")
    axes.set(xlabel="false accept rate", ylabel="true accept rate", ylim=(0, 1.02), xlim=(1e-4, 1))
    axes.set_title(f"AUC {figures['auc']:.4f}, EER {figures['eer']:.4f} (dotted)", fontsize=10)
    axes.grid(alpha=0.3)
    return rasterize(figure)


def distance_histogram(report: Verification, threshold: float | None) -> Image:
    """Draws histograms of squared distances between images of the same identity and of different identities."""
    figure = new_figure(5, 4, layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, max(0.1, float(report.distance.max())), 61)
    for same, name in ((True, "one person"), (False, "strangers")):
        axes.hist(report.distance[report.pairs.same == same], bins.tolist(), density=True, alpha=0.6, label=name)
    if threshold is not None:
        axes.axvline(threshold, color="black", linestyle="--", label=f"threshold {threshold:.3f}")
    axes.set(xlabel="squared distance", ylabel="density")
    axes.legend()
    return rasterize(figure)


def most_wrong(report: Verification, threshold: float, most: int = 9) -> list[int]:
    """Returns indices of the pairs furthest beyond the threshold: false accepts, then false rejects."""
    chosen: list[int] = []
    for same in (False, True):
        beyond = (report.distance - threshold) * (1 if same else -1)
        wrong = np.flatnonzero((report.pairs.same == same) & (beyond > 0 if same else beyond >= 0))
        chosen += wrong[np.argsort(-beyond[wrong], kind="stable")][:most].tolist()
    return chosen


def pair_sheet(report: Verification, chosen: list[int], picture: Picture) -> Image:
    """Draws wrongly verified pairs, the two images of each side by side."""
    images, captions = [], []
    for pair in chosen:
        images += [picture(int(places[pair])) for places in (report.pairs.first, report.pairs.second)]
        are, seen = ("one person", "strangers") if report.pairs.same[pair] else ("strangers", "one person")
        captions += [f"{are}\nat {report.distance[pair]:.2f}", f"seen as\n{seen}"]
    return sheet(images, 6, captions, side=112)


def embedding_map(embedding: Floats, identity: Integers, picture: Picture, neighbours: bool, most: int = 200) -> Image:
    """Draws embeddings in two dimensions as thumbnails, framed in the colour of their identity.

    Args:
        embedding: N×D.
        identity: N.
        picture: returns the image at an index.
        neighbours: use t-SNE, which preserves neighbourhoods and takes longer, instead of PCA.
        most: maximum number of images, from the start.
    """
    from matplotlib import colormaps
    from matplotlib.offsetbox import AnnotationBbox, OffsetImage

    embedding, identity = embedding[:most], identity[:most]
    places = project(embedding, "tsne" if neighbours else "pca", perplexity=15)
    figure = new_figure(9, 9, layout="constrained")
    axes = figure.subplots()
    axes.scatter(places[:, 0], places[:, 1], s=0)
    people = np.unique(identity)
    colours = [colormaps["hsv"](k / len(people)) for k in range(len(people))]
    for i, place in enumerate(places):
        pixels = as_rgb(picture(i))
        step = max(1, len(pixels) // 48)
        thumbnail = OffsetImage(pixels[::step, ::step], zoom=28 / len(pixels[::step]))
        frame = {"edgecolor": colours[np.searchsorted(people, identity[i])], "linewidth": 2}
        axes.add_artist(AnnotationBbox(thumbnail, place, pad=0.05, bboxprops=frame))
    axes.set_title(
        f"{len(embedding)} pictures of {len(people)} people, {'t-SNE' if neighbours else 'PCA'}", fontsize=10
    )
    axes.set(xticks=[], yticks=[])
    return rasterize(figure)
