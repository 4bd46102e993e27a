"""Label errors: confident learning."""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from sklearn.pipeline import make_pipeline

from modules.callbacks.support_vectors import Scaler

FOLDS = 5
PENALTIES = (0.01, 0.1, 1.0)  # values of C of the logistic regression that are tried


def held_out_probabilities(
    features: NDArray[np.float32], labels: NDArray[np.int64], groups: NDArray[np.int64], num_classes: int
) -> NDArray[np.float64]:
    """Computes out-of-sample class probabilities by logistic regression on fixed features in five-fold
    cross-validation, with the penalty that has the best held-out likelihood.

    Args:
        features: float32 N×D.
        labels: int64 N, in [0, K).
        groups: int64 N; images of one group, such as duplicates, are in the same fold.
        num_classes: K.

    Returns:
        Probabilities, float64 N×K. If the other folds have no image of a class, its label gets probability 1.

    Raises:
        ValueError: all images are of one class, or there are fewer than two groups.
    """
    folds = min(FOLDS, len(np.unique(groups)))
    if folds < 2 or len(np.unique(labels)) < 2:
        raise ValueError("Labels can only be judged where there are images of two classes or more.")
    splitting = StratifiedGroupKFold(folds, shuffle=True, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        warnings.filterwarnings("ignore", "The least populated class")
        parts = list(splitting.split(labels, labels, groups))
        found = [_held_out(features, labels, parts, num_classes, penalty) for penalty in PENALTIES]
    own = [likely[np.arange(len(labels)), labels] for likely in found]
    return found[int(np.argmax([np.log(each.clip(1e-6)).mean() for each in own]))]


def _held_out(
    features: NDArray[np.float32], labels: NDArray[np.int64], parts: Iterable[Any], num_classes: int, penalty: float
) -> NDArray[np.float64]:
    """Computes the probabilities for one penalty, from folds of training and held-out indices."""
    found = np.zeros((len(labels), num_classes))
    for learned, held in parts:
        known = np.unique(labels[learned])
        if len(known) > 1:
            head = make_pipeline(Scaler(), LogisticRegression(C=penalty, max_iter=300))
            found[np.ix_(held, known)] = head.fit(features[learned], labels[learned]).predict_proba(features[held])
        unknown = held[~np.isin(labels[held], known)]
        found[unknown, labels[unknown]] = 1
    return found


@dataclass(frozen=True)
class Doubts:
    """Labels that are probably wrong.

    Args:
        places: indices of the suspicious images, int64 M, the most suspicious first.
        likely: predicted class of each of all images, int64 N.
        joint: confident joint: number of images per given label (row) and confident class (column), int64 K×K.
    """

    places: NDArray[np.int64]
    likely: NDArray[np.int64]
    joint: NDArray[np.int64]


def doubts(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> Doubts:
    """Finds label errors by confident learning (Northcutt et al. 2021, arXiv:1911.00068).

    The confident class of an image is the most likely one of those whose probability is at least the mean probability
    of the class over the images with that label. The number of label errors is the off-diagonal sum of the confident
    joint; the errors are the images with the lowest probability of their label.

    Args:
        probabilities: out-of-sample probabilities, float64 N×K.
        labels: int64 N.
    """
    count = probabilities.shape[1]
    own = probabilities[np.arange(len(labels)), labels]
    shares = np.bincount(labels, own, count) / np.maximum(np.bincount(labels, minlength=count), 1)
    confident = np.where((probabilities >= shares) & (np.bincount(labels, minlength=count) > 0), probabilities, -1.0)
    sure = confident.max(1) >= 0
    joint = np.zeros((count, count), np.int64)
    np.add.at(joint, (labels[sure], confident.argmax(1)[sure]), 1)
    likely = probabilities.argmax(1).astype(np.int64)
    order = own.argsort(kind="stable")
    wrong = order[likely[order] != labels[order]][: joint.sum() - joint.trace()]
    return Doubts(wrong.astype(np.int64), likely, joint)
