"""Evaluation of face embeddings: verification, retrieval, identification among distractors, clustering.

All distances are squared distances between unit embeddings, in [0, 4].
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN
from sklearn.cluster import DBSCAN, AgglomerativeClustering
from sklearn.metrics import auc, roc_curve
from sklearn.metrics.cluster import contingency_matrix, pair_confusion_matrix

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Booleans = NDArray[np.bool_]
PAIRS = 5_000_000  # maximum number of pairs of different people
GRID = np.arange(0, 4.005, 0.01)  # thresholds that the ten-fold protocol tries


@dataclass
class Pairs:
    """Pairs of images.

    Args:
        first: index of the first image, M.
        second: index of the second image, M.
        same: whether both are of the same person, M.
        fold: fold of the pair in a protocol, M; -1 for none.
    """

    first: Integers
    second: Integers
    same: Booleans
    fold: Integers

    def distances(self, embedding: Floats) -> Floats:
        """Computes the squared distance of each pair, M, from embeddings N×D."""
        parts = [
            2 - 2 * np.einsum("nd,nd->n", embedding[one], embedding[other])
            for one, other in zip(_pieces(self.first), _pieces(self.second), strict=True)
        ]
        return np.concatenate(parts).clip(0, 4)


def _pieces(values: Integers, size: int = 100_000) -> list[Integers]:
    return np.split(values, range(size, len(values), size))


def all_pairs(identity: Integers) -> Pairs:
    """Returns all pairs of the same person, and all pairs of different people or, from five million on, a fixed sample
    of as many."""
    order = np.argsort(identity, kind="stable")
    ends = np.flatnonzero(np.diff(identity[order])) + 1
    mates = [group[np.stack(np.triu_indices(len(group), 1))] for group in np.split(order, ends)]
    positive = np.concatenate(mates, 1)
    size = len(identity)
    if size * (size - 1) // 2 - positive.shape[1] <= PAIRS:
        first, second = np.triu_indices(size, 1)
    else:
        first, second = np.random.default_rng(0).integers(size, size=(2, PAIRS))
    strangers = identity[first] != identity[second]
    first, second = np.append(positive[0], first[strangers]), np.append(positive[1], second[strangers])
    same = np.arange(len(first)) < positive.shape[1]
    return Pairs(first, second, same, np.full(len(first), -1))


def drawn_pairs(identity: Integers, folds: int = 10, most: int = 300) -> Pairs:
    """Draws equal numbers of pairs of the same person and of different people, in folds of equal size; deterministic.

    With at least two people with two images per fold, folds do not share people, as in the protocol of LFW; with fewer,
    pairs are distributed over the folds regardless of the people.

    Args:
        identity: N.
        folds: number of folds.
        most: maximum number of pairs of each kind per fold.
    """
    generator = np.random.default_rng(0)
    people, counts = np.unique(identity, return_counts=True)
    several = generator.permutation(people[counts > 1])
    disjoint = len(several) >= 2 * folds
    parts: list[Pairs] = []
    for group in np.array_split(several, folds) if disjoint else [several]:
        members = np.flatnonzero(np.isin(identity, group))
        pairs = all_pairs(identity[members])
        limit = min(most if disjoint else most * folds, int(pairs.same.sum()), int((~pairs.same).sum()))
        for same in (True, False):
            chosen = generator.permutation(np.flatnonzero(pairs.same == same))[:limit]
            fold = np.full(limit, len(parts) // 2) if disjoint else np.arange(limit) % folds
            first, second = members[pairs.first[chosen]], members[pairs.second[chosen]]
            parts.append(Pairs(first, second, np.full(limit, same), fold))
    columns = ("first", "second", "same", "fold")
    return Pairs(*(np.concatenate([getattr(part, column) for part in parts]) for column in columns))


@dataclass
class Roc:
    """Receiver operating characteristic of verification, with one point for each distance that occurs.

    Args:
        false: false accept rate, rising from 0 to 1.
        true: true accept rate.
        threshold: largest accepted squared distance.
    """

    false: NDArray[np.float64]
    true: NDArray[np.float64]
    threshold: NDArray[np.float64]

    @classmethod
    def of(cls, same: Booleans, distance: Floats) -> "Roc":
        """Computes the curve of M pairs of both kinds."""
        false, true, scores = roc_curve(same, -distance, drop_intermediate=False)
        return cls(false, true, np.where(np.isfinite(scores), -scores, 0.0))

    @property
    def area(self) -> float:
        """Area under the curve."""
        return float(auc(self.false, self.true))

    @property
    def equal_error_rate(self) -> float:
        """Equal error rate, at which false accept rate and false reject rate are equal."""
        gap = self.false + self.true - 1  # rises from -1 to 1
        i = int(np.argmax(gap >= 0))
        share = -gap[i - 1] / (gap[i] - gap[i - 1])  # linear interpolation between two points
        return float(self.false[i - 1] + share * (self.false[i] - self.false[i - 1]))

    def at(self, far: float) -> tuple[float, float, float]:
        """Returns the last point whose false accept rate is at most ``far``.

        Returns:
            The true accept rate (TAR, or VAL), the false accept rate, and the threshold.
        """
        i = int(np.searchsorted(self.false, far, side="right")) - 1
        return float(self.true[i]), float(self.false[i]), float(self.threshold[i])


@dataclass
class TenFold:
    """Results of the ten-fold protocol.

    Args:
        accuracy: accuracy of each fold, at the best threshold of the other folds.
        threshold: that threshold of each fold.
        accepted: true accept rate of each fold, at the threshold at which the other folds reach the false accept rate.
        false: false accept rate of each fold at that threshold.
    """

    accuracy: NDArray[np.float64]
    threshold: NDArray[np.float64]
    accepted: NDArray[np.float64]
    false: NDArray[np.float64]

    @property
    def standard_error(self) -> float:
        """Standard error of the mean accuracy: the folds' standard deviation over the square root of their number, as
        in LFW."""
        return float(self.accuracy.std(ddof=1) / len(self.accuracy) ** 0.5)


def ten_fold(pairs: Pairs, distance: Floats, far: float = 1e-3) -> TenFold:
    """Evaluates verification with the protocol of Labelled Faces in the Wild: the threshold is chosen on nine folds and
    evaluated on the tenth.

    Thresholds are multiples of 0.01; of equally good ones, the smallest is used. Source: Huang et al. 2007, UMass
    Amherst technical report 07-49, section 3; VAL at FAR as in Schroff et al. 2015, section 4.

    Args:
        pairs: M pairs with folds.
        distance: squared distances of the pairs, M.
        far: false accept rate.
    """
    rows = []
    accept = np.searchsorted(GRID, distance)  # smallest threshold that accepts the pair
    for fold in np.unique(pairs.fold):
        inside = pairs.fold == fold
        counts = [np.bincount(accept[~inside & (pairs.same == s)], minlength=len(GRID) + 1)[:-1] for s in (True, False)]
        right = counts[0].cumsum() - counts[1].cumsum()
        threshold = GRID[int(np.argmax(right))]
        accuracy = ((distance[inside] <= threshold) == pairs.same[inside]).mean()
        strict = Roc.of(pairs.same[~inside], distance[~inside]).at(far)[2]
        taken = distance[inside] <= strict
        rows.append((accuracy, threshold, taken[pairs.same[inside]].mean(), taken[~pairs.same[inside]].mean()))
    return TenFold(*np.array(rows).T)


class _Retrieval(AccuracyCalculator):
    """The metrics of pytorch-metric-learning, and recall at 5."""

    def calculate_recall_at_5(self, knn_labels, query_labels, not_lone_query_mask, **_):  # type: ignore
        found = (knn_labels[:, :5] == query_labels[:, None]).any(1)[not_lone_query_mask]
        return float(found.float().mean()) if len(found) else float("nan")

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), "recall_at_5"]


def retrieval(embedding: Floats, identity: Integers) -> dict[str, float]:
    """Evaluates retrieval with each image as a query among all others.

    Returns:
        ``recall_at_1`` and ``recall_at_5``: fraction of queries with an image of the same person among the nearest;
        ``map_at_r``: mean average precision at R, the number of other images of the person (Musgrave et al. 2020,
        arXiv:2003.08505). People with a single image are not queried.
    """
    calculator = _Retrieval(
        ("precision_at_1", "recall_at_5", "mean_average_precision_at_r"),
        k=min(len(identity) - 1, max(5, int(np.bincount(identity).max()))),
        device=torch.device("cpu"),
        knn_func=CustomKNN(LpDistance(), batch_size=1024),
    )
    found = calculator.get_accuracy(torch.from_numpy(embedding), torch.from_numpy(identity))
    names = {"precision_at_1": "recall_at_1", "mean_average_precision_at_r": "map_at_r"}
    return {names.get(key, key): float(value) for key, value in found.items()}


def rank_one(embedding: Floats, identity: Integers) -> dict[int, float]:
    """Evaluates identification among distractors as in MegaFace (Kemelmacher-Shlizerman et al. 2016, arXiv:1512.00596).

    Half of the people, a fixed selection, are probes: each of their images searches for each of their other images
    among 10, 100, 1,000 … images of the other half, and finally all of them.

    Returns:
        By number of distractors, the fraction of searches in which the match was nearer than every distractor.
    """
    generator = np.random.default_rng(0)
    people = generator.permutation(np.unique(identity))
    probes = np.isin(identity, people[: len(people) // 2])
    pairs = all_pairs(identity[probes])
    distractors = generator.permutation(np.flatnonzero(~probes))
    mates = pairs.same
    if not mates.any() or not len(distractors):
        return {}
    one, other = np.append(pairs.first[mates], pairs.second[mates]), np.append(pairs.second[mates], pairs.first[mates])
    near = Pairs(one, other, np.ones(len(one), bool), one).distances(embedding[probes])
    counts = [10**n for n in range(1, 8) if 10**n < len(distractors)] + [len(distractors)]
    nearest = np.full((len(counts), int(probes.sum())), np.inf, np.float32)
    for start in range(0, nearest.shape[1], 256):
        rows = slice(start, start + 256)
        away = 2 - 2 * embedding[probes][rows] @ embedding[distractors].T
        for i, count in enumerate(counts):
            nearest[i, rows] = away[:, :count].min(1)
    return {count: float((near < row[one]).mean()) for count, row in zip(counts, nearest, strict=True)}


def connected_people(embedding: Floats, threshold: float, method: str = "agglomerative") -> Integers:
    """Clusters images by person, for an unknown number of people.

    Args:
        embedding: N×D, of unit length.
        threshold: largest squared distance at which two images count as the same person.
        method: ``agglomerative`` (average linkage, by distance) or ``dbscan`` (neighbours within the threshold).

    Returns:
        Cluster of each image, N; -1 for noise in DBSCAN.
    """
    radius = threshold**0.5
    if method == "dbscan":
        return DBSCAN(eps=max(radius, 1e-6), min_samples=2).fit_predict(embedding).astype(np.int64)
    if len(embedding) < 2:
        return np.zeros(len(embedding), np.int64)
    return AgglomerativeClustering(None, distance_threshold=radius, linkage="average").fit_predict(embedding)


def clustering_scores(identity: Integers, clusters: Integers) -> dict[str, float]:
    """Computes clustering metrics; a noise image counts as a cluster of its own.

    Returns:
        ``pair_f1``, F1 over pairs of images, and ``bcubed_f1``, the harmonic mean of BCubed precision and recall (Amigó
        et al. 2009, Information Retrieval 12).
    """
    clusters = clusters.copy()
    alone = clusters < 0
    clusters[alone] = clusters.max(initial=0) + 1 + np.arange(alone.sum())
    (_, false), (missed, true) = pair_confusion_matrix(identity, clusters).astype(float)
    table = contingency_matrix(identity, clusters).astype(float)
    precision = (table**2 / table.sum(0)).sum() / len(identity)
    recall = (table**2 / table.sum(1, keepdims=True)).sum() / len(identity)
    return {
        "pair_f1": float(2 * true / max(2 * true + false + missed, 1)),
        "bcubed_f1": float(2 * precision * recall / (precision + recall)),
    }


def key_of(rate: float) -> str:
    """Formats a rate for the name of a metric: 1e-2, 1e-3."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass
class Verification:
    """Metrics of a split, and the data that its charts are drawn from.

    Args:
        figures: metrics by name.
        pairs: all pairs that verification was evaluated on.
        distance: squared distances of the pairs, M.
        roc: ROC curve of the pairs, if defined.
        threshold: threshold with the requested false accept rate on this split.
    """

    figures: dict[str, float]
    pairs: Pairs
    distance: Floats
    roc: Roc | None
    threshold: float


def report(
    embedding: Floats, identity: Integers, far: float, threshold: float | None, given: Pairs | None
) -> Verification:
    """Evaluates a split with all protocols.

    Args:
        embedding: N×D, of unit length.
        identity: N.
        far: false accept rate at which the threshold is chosen.
        threshold: threshold for clustering; None for the one with that false accept rate on this split.
        given: pairs of a protocol, such as LFW's; None draws pairs.

    Returns:
        The metrics; NaN if no person has two images, or all images are of one person.
    """
    pairs = all_pairs(identity) if given is None else given
    distance = pairs.distances(embedding)
    if not (pairs.same.any() and (~pairs.same).any()):
        return Verification({"auc": float("nan"), "eer": float("nan")}, pairs, distance, None, float("nan"))
    roc = Roc.of(pairs.same, distance)
    figures = {"auc": roc.area, "eer": roc.equal_error_rate}
    for rate in sorted({1e-2, 1e-3, far}):
        figures[f"tar_at_far_{key_of(rate)}"], figures[f"far_reached_{key_of(rate)}"], _ = roc.at(rate)
    folded = drawn_pairs(identity) if given is None else given
    name = "10fold_drawn" if given is None else "10fold"
    if len(np.unique(folded.fold)) > 1:
        result = ten_fold(folded, folded.distances(embedding), 1e-2 if given is None else 1e-3)
        target = "1e-2" if given is None else "1e-3"
        figures |= {
            f"accuracy_{name}": float(result.accuracy.mean()),
            f"accuracy_{name}_se": result.standard_error,
            f"val_{name}_far_{target}": float(result.accepted.mean()),
            f"val_{name}_far_{target}_reached": float(result.false.mean()),
        }
    figures |= retrieval(embedding, identity)
    figures |= {f"rank1_among_{count}": value for count, value in rank_one(embedding, identity).items()}
    if threshold is None:
        threshold = roc.at(far)[2]
    few = slice(0, 5000)  # clustering compares all pairs of images
    for method in ("agglomerative", "dbscan"):
        scores = clustering_scores(identity[few], connected_people(embedding[few], threshold, method))
        figures |= {f"{method}_{key}": value for key, value in scores.items()}
    return Verification(figures, pairs, distance, roc, roc.at(far)[2])
