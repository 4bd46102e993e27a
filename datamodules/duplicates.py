"""Duplicate and near-duplicate pictures, and outliers among files."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pandas as pd

SIDE, CORE = 24, 20  # of a thumbnail, and of its middle, in pixels
NEIGHBOURS = 5
FLAT = 8  # levels of 256 that a picture of one colour spans at most
# How far an unusual size is from the median: by this factor at least, and by this many median deviations.
FACTOR, SPREADS = 2.0, 5.0


def thumbnail(image: NDArray[Any]) -> NDArray[np.uint8]:
    """Thumbnail of a picture (uint8 H×W×C or float32 in [0, 1]) as uint8 24×24×C; more than three bands are averaged to
    one."""
    image = image if image.shape[2] in (1, 3) else image.mean(2, dtype=np.float32).astype(image.dtype)
    small = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA).reshape(SIDE, SIDE, -1)
    return small.astype(np.uint8, copy=False) if image.dtype == np.uint8 else (small * 255).round().astype(np.uint8)


def likeness(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
    """Similarity of two thumbnails in [-1, 1]: the highest correlation of the centre of one with any position in the
    other, mirrored or not. Insensitive to brightness, contrast, and small shifts or crops.

    Args:
        one: uint8 24×24×C.
        other: uint8 24×24×C.
    """
    edge = (SIDE - CORE) // 2
    found = []
    for part, whole in ((one, other), (other, one)):
        middle = np.ascontiguousarray(part[edge:-edge, edge:-edge])
        for place in (whole, np.ascontiguousarray(whole[:, ::-1])):
            found.append(float(cv2.matchTemplate(place, middle, cv2.TM_CCOEFF_NORMED).max()))
    return max(found)


def is_flat(thumbnails: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which thumbnails, uint8 N×24×24×C, have a single colour."""
    return (thumbnails.max((1, 2)).astype(int) - thumbnails.min((1, 2)) <= FLAT).all(1)


def near_pairs(
    features: NDArray[np.float32], thumbnails: NDArray[np.uint8], least: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Pairs of near-duplicates: nearest neighbours by a network's features whose thumbnails are also similar.

    Args:
        features: float32 N×D.
        thumbnails: uint8 N×24×24×C; those of one colour have no pair.
        least: `likeness` from which on they are.

    Returns:
        Their places, int64 M×2, and their likeness, float64 M.
    """
    import faiss

    places = np.flatnonzero(~is_flat(thumbnails))
    if len(places) < 2:
        return np.zeros((0, 2), np.int64), np.zeros(0)
    centred = features[places] - features[places].mean(0)
    centred /= np.linalg.norm(centred, axis=1, keepdims=True) + 1e-12
    index = faiss.IndexFlatIP(centred.shape[1])
    index.add(centred)
    nearest = index.search(centred, min(NEIGHBOURS + 1, len(places)))[1]
    found = np.stack([np.repeat(np.arange(len(places)), nearest.shape[1]), nearest.ravel()], 1)
    pairs = places[np.unique(np.sort(found[found[:, 0] != found[:, 1]], 1), axis=0)]
    alike = np.array([likeness(thumbnails[a], thumbnails[b]) for a, b in pairs])
    return pairs[alike >= least], alike[alike >= least]


def grouped(pairs: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Connected components: the group number of each of ``count`` items, int64, given their pairs, int64 M×2."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), (count, count))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def oddities(table: "pd.DataFrame", thumbnails: NDArray[np.uint8]) -> list[str]:
    """Describes what is unusual about each of several readable files; empty if nothing is.

    Args:
        table: what `inspect_images` found of them, N rows.
        thumbnails: uint8 N×24×24×C.
    """
    height, width = (table[key].to_numpy(np.float64) for key in ("height", "width"))
    bits = table["bits"].to_numpy()
    sizes = [f"{w:.0f}×{h:.0f}" for w, h in zip(width, height, strict=True)]
    usual = f"the usual is {np.median(width):.0f}×{np.median(height):.0f}"
    checks: list[tuple[NDArray[np.bool_], Callable[[int], str]]] = [
        (is_flat(thumbnails), lambda _: "one colour"),
        (_unusual(np.sqrt(height * width)), lambda i: f"unusual size: {sizes[i]}, {usual}"),
        (_unusual(width / height), lambda i: f"unusual shape: {sizes[i]}, {usual}"),
        (table["frames"].to_numpy() > 1, lambda i: f"{table['frames'].iloc[i]} frames or pages"),
        ((bits > 8) != (np.median(bits) > 8), lambda i: f"{table['bits'].iloc[i]} bits"),
    ]
    return ["; ".join(tell(i) for odd, tell in checks if odd[i]) for i in range(len(table))]


def _unusual(values: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which of several positive numbers are outliers relative to their median."""
    away = np.abs(np.log(values) - np.log(np.median(values)))
    return away >= max(np.log(FACTOR), SPREADS * float(np.median(away)))
