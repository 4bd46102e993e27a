"""How embeddings are measured: verification, retrieval, identification among distractors, clustering.

All distances are squared distances between embeddings of length one, in [0, 4]: small means alike.
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
PAIRS = 5_000_000  # of strangers at most, that are looked at
GRID = np.arange(0, 4.005, 0.01)  # thresholds that the ten-fold protocol tries


@dataclass
class Pairs:
    """Pairs of pictures.

    Args:
        first: position of a picture, M.
        second: position of the other, M.
        same: whether they are of one person, M.
        fold: which of the folds of a protocol a pair is in, M; -1 for none.
    """

    first: Integers
    second: Integers
    same: Booleans
    fold: Integers

    def distances(self, embedding: Floats) -> Floats:
        """Squared distance of each pair, M, of the embeddings N×D."""
        parts = [
            2 - 2 * np.einsum("nd,nd->n", embedding[one], embedding[other])
            for one, other in zip(_pieces(self.first), _pieces(self.second), strict=True)
        ]
        return np.concatenate(parts).clip(0, 4)


def _pieces(values: Integers, size: int = 100_000) -> list[Integers]:
    return np.split(values, range(size, len(values), size))


def all_pairs(identity: Integers) -> Pairs:
    """Every pair of one person, and every pair of strangers or, of more than five million, a fixed draw of as many."""
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
    """Draws as many pairs of one person as of strangers, always the same ones, in folds of equal size.

    With at least two people with two pictures a fold, no person is in two folds, as in the protocol of LFW; with fewer,
    the pairs are shared out regardless of who is in them.

    Args:
        identity: N.
        folds: number of folds.
        most: pairs of each kind in a fold.
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
    """The receiver operating characteristic of a verification, one point for each distance that occurs.

    Args:
        false: the share of strangers' pairs that is accepted, rising from 0 to 1.
        true: the share of one person's pairs that is accepted.
        threshold: the largest squared distance accepted.
    """

    false: NDArray[np.float64]
    true: NDArray[np.float64]
    threshold: NDArray[np.float64]

    @classmethod
    def of(cls, same: Booleans, distance: Floats) -> "Roc":
        """That of pairs, M, of which some are of one person and some are not."""
        false, true, scores = roc_curve(same, -distance, drop_intermediate=False)
        return cls(false, true, np.where(np.isfinite(scores), -scores, 0.0))

    @property
    def area(self) -> float:
        """The area under the curve."""
        return float(auc(self.false, self.true))

    @property
    def equal_error_rate(self) -> float:
        """The rate at which as many pairs of strangers are accepted as pairs of one person are refused."""
        gap = self.false + self.true - 1  # rises from -1 to 1
        i = int(np.argmax(gap >= 0))
        share = -gap[i - 1] / (gap[i] - gap[i - 1])  # where the line between two points meets it
        return float(self.false[i - 1] + share * (self.false[i] - self.false[i - 1]))

    def at(self, far: float) -> tuple[float, float, float]:
        """The last point at which no more than a share ``far`` of strangers' pairs is accepted.

        Returns:
            The share of one person's pairs that is accepted there (TAR, or VAL), the share of strangers' pairs, and the
            threshold.
        """
        i = int(np.searchsorted(self.false, far, side="right")) - 1
        return float(self.true[i]), float(self.false[i]), float(self.threshold[i])


@dataclass
class TenFold:
    """What the ten-fold protocol comes to.

    Args:
        accuracy: of each fold, at the threshold that is best on the others.
        threshold: that threshold, of each fold.
        accepted: of each fold, the share of pairs of one person that is accepted at the threshold at which the others
            reach the false accept rate.
        false: the share of pairs of strangers that is accepted then.
    """

    accuracy: NDArray[np.float64]
    threshold: NDArray[np.float64]
    accepted: NDArray[np.float64]
    false: NDArray[np.float64]

    @property
    def standard_error(self) -> float:
        """Of the mean accuracy: the folds' standard deviation by the root of their number, as LFW asks for."""
        return float(self.accuracy.std(ddof=1) / len(self.accuracy) ** 0.5)


def ten_fold(pairs: Pairs, distance: Floats, far: float = 1e-3) -> TenFold:
    """The protocol of Labeled Faces in the Wild: the threshold is chosen on nine folds, the tenth is measured.

    Thresholds are multiples of 0.01, of which the smallest of the best is taken. Source: Huang et al. 2007, UMass
    Amherst technical report 07-49, section 3; VAL at FAR as in Schroff et al. 2015, section 4.

    Args:
        pairs: with folds, M.
        distance: of the pairs, M.
        far: false accept rate.
    """
    rows = []
    accept = np.searchsorted(GRID, distance)  # the first threshold at which a pair counts as one person
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
    """PML's figures, and recall at five."""

    def calculate_recall_at_5(self, knn_labels, query_labels, not_lone_query_mask, **_):  # type: ignore
        found = (knn_labels[:, :5] == query_labels[:, None]).any(1)[not_lone_query_mask]
        return float(found.float().mean()) if len(found) else float("nan")

    def requires_knn(self) -> list[str]:
        return [*super().requires_knn(), "recall_at_5"]


def retrieval(embedding: Floats, identity: Integers) -> dict[str, float]:
    """Each picture as a query among all others.

    Returns:
        ``recall_at_1`` and ``recall_at_5``: the share of queries with a mate among the nearest; ``map_at_r``, the mean
        average precision at R, R being the number of mates (Musgrave et al. 2020, arXiv:2003.08505). Queries without a
        mate do not count.
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
    """Identification among distractors, as MegaFace asks it (Kemelmacher-Shlizerman et al. 2016, arXiv:1512.00596).

    Half of the people, always the same, give probes: each of their pictures looks for each of its mates among pictures
    of the other half, 10, 100, 1,000 … of them and at last all.

    Returns:
        By number of distractors, the share of searches in which the mate was nearer than every distractor.
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
    """Sorts pictures by person, without knowing how many there are.

    Args:
        embedding: N×D, of length one.
        threshold: squared distance up to which two pictures count as one person.
        method: ``agglomerative`` (average linkage, by distance) or ``dbscan`` (neighbours within the threshold).

    Returns:
        The number of each picture's cluster, N; -1 where DBSCAN leaves a picture alone.
    """
    radius = threshold**0.5
    if method == "dbscan":
        return DBSCAN(eps=max(radius, 1e-6), min_samples=2).fit_predict(embedding).astype(np.int64)
    if len(embedding) < 2:
        return np.zeros(len(embedding), np.int64)
    return AgglomerativeClustering(None, distance_threshold=radius, linkage="average").fit_predict(embedding)


def clustering_scores(identity: Integers, clusters: Integers) -> dict[str, float]:
    """How well clusters are people; a picture that was left alone counts as a cluster of its own.

    Returns:
        ``pair_f1``, F1 over pairs of pictures, and ``bcubed_f1``, the harmonic mean of BCubed precision and recall
        (Amigó et al. 2009, Information Retrieval 12).
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
    """A rate as it stands in the name of a figure: 1e-2, 1e-3."""
    mantissa, exponent = f"{rate:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass
class Verification:
    """The figures of a split, and what its pictures are drawn from.

    Args:
        figures: by name.
        pairs: all pairs that verification was measured on.
        distance: of these, M.
        roc: their curve, where there is one.
        threshold: at which the false accept rate that was asked for is reached here.
    """

    figures: dict[str, float]
    pairs: Pairs
    distance: Floats
    roc: Roc | None
    threshold: float


def report(
    embedding: Floats, identity: Integers, far: float, threshold: float | None, given: Pairs | None
) -> Verification:
    """Measures a split by all protocols.

    Args:
        embedding: N×D, of length one.
        identity: N.
        far: the false accept rate at which a threshold is chosen.
        threshold: at which pictures are clustered; None for the one that has that rate here.
        given: the pairs of a protocol, such as LFW's; else pairs are drawn from the people.

    Returns:
        The figures; without two people, one of whom has two pictures, all are NaN.
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
    few = slice(0, 5000)  # clustering compares every picture with every other
    for method in ("agglomerative", "dbscan"):
        scores = clustering_scores(identity[few], connected_people(embedding[few], threshold, method))
        figures |= {f"{method}_{key}": value for key, value in scores.items()}
    return Verification(figures, pairs, distance, roc, roc.at(far)[2])
