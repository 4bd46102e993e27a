"""Linear support vector machines on frozen features, with calibrated probabilities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # values of C that cross-validation chooses from
UNTESTED = 1e-2  # C if a class has a single image, so that cross-validation is impossible
SEARCHED = 2000  # number of images from which a part is drawn to choose C


@dataclass
class Solution:
    """A linear head that is solved for instead of trained by gradient descent.

    Args:
        weight: float K×D.
        bias: float K.
        penalty: the constant C of the support vector machine.
        accuracy: cross-validation accuracy, in [0, 1]; None if cross-validation was impossible.
        images: number of images it was fitted to.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float
    accuracy: float | None
    images: int

    def __str__(self) -> str:
        """Summary in one line."""
        how = "by default (a class has a single image, so cross-validation is impossible)"
        if self.accuracy is not None:
            how = f"chosen by cross-validation with {self.accuracy:.1%} accuracy on held-out images"
        return f"A linear SVM on the fixed features of {self.images:,} images; C = {self.penalty:g} {how}."


class Scaler(TransformerMixin, BaseEstimator):
    """Standardises features: subtracts the mean and divides by the feature's standard deviation plus the mean one of
    all.

    With its own standard deviation alone, a nearly constant feature that varies in a few images would outweigh all
    others.
    """

    def fit(self, features: NDArray[Any], labels: Any = None) -> "Scaler":
        """Computes mean and scale of features N×D."""
        deviation = features.std(0, dtype=np.float64)
        self.mean_, self.scale_ = features.mean(0, dtype=np.float64), deviation + (deviation.mean() or 1.0)
        return self

    def transform(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Scales features N×D."""
        return (features - self.mean_) / self.scale_


def machine(penalty: float = UNTESTED, weights: Mapping[int, float] | None = None) -> Any:
    """Returns the scikit-learn estimator that `solve` fits: `Scaler`, then a linear SVM."""
    svm = LinearSVC(C=penalty, dual=True, random_state=0, max_iter=5000, class_weight=weights)
    return make_pipeline(Scaler(), svm)


def solve(
    features: NDArray[np.float32],
    labels: NDArray[np.int64],
    num_classes: int,
    class_weights: Sequence[float] | None = None,
) -> Solution:
    """Fits a one-vs-rest linear support vector machine to features (Cortes & Vapnik 1995).

    C is chosen by stratified cross-validation on at most 2,000 images. The scaling is folded into the weights. These
    are divided by a temperature (Guo et al. 2017, arXiv:1706.04599) fitted to the held-out margins, so that the softmax
    of the outputs is a calibrated probability; neither changes the predicted class.

    Args:
        features: float N×D.
        labels: int N, in [0, K).
        num_classes: K. A class without images is never predicted.
        class_weights: weight of each of the K classes; None for equal weights.

    Returns:
        The fitted head.
    """
    present, counts = np.unique(labels, return_counts=True)
    weights = None if class_weights is None else {k: class_weights[k] for k in present.tolist()}
    if len(present) < 2:
        return Solution(np.zeros((num_classes, features.shape[1])), np.where(np.isin(range(num_classes), present), 0.0, -1e4),
                        UNTESTED, None, len(labels))  # fmt: skip
    penalty, accuracy, temperature, folds = UNTESTED, None, 1.0, min(3, int(counts.min()))
    if folds > 1:
        part, most = np.arange(len(labels)), max(SEARCHED, len(present) * folds)
        if len(part) >= most + len(present):  # scikit-learn's split leaves out as many as there are classes, or more
            part = train_test_split(part, train_size=most, stratify=labels, random_state=0)[0]
            kept = np.bincount(labels[part], minlength=num_classes)
            rare = [k for k in present if kept[k] < 2]  # each fold needs one
            few = [np.flatnonzero(labels == k)[:2] for k in rare]
            part = np.concatenate([part[~np.isin(labels[part], rare)], *few])
            folds = min(folds, int(np.unique(labels[part], return_counts=True)[1].min()))
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        search = GridSearchCV(machine(weights=weights), {"linearsvc__C": PENALTIES}, cv=split, refit=False)
        search.fit(features[part], labels[part])
        penalty, accuracy = search.best_params_["linearsvc__C"], float(search.best_score_)
        held = cross_val_predict(
            machine(penalty, weights), features[part], labels[part], cv=split, method="decision_function"
        )
        margins = np.stack([-held / 2, held / 2], 1) if held.ndim == 1 else held
        truth = (np.arange(len(part)), np.searchsorted(present, labels[part]))
        size = margins.std()
        found = minimize_scalar(
            lambda t: -log_softmax(margins / (size * np.exp(t)), 1)[truth].mean(), bounds=(-4, 4), method="bounded"
        )  # bounded: without held-out errors there is no minimum
        temperature = float(size * np.exp(found.x))
    fitted = machine(penalty, weights).fit(features, labels)
    scaler, svm = fitted[0], fitted[1]
    weight = svm.coef_ / scaler.scale_
    bias = svm.intercept_ - weight @ scaler.mean_
    if len(present) == 2:  # a binary SVM has one margin for both classes
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    whole, offset = np.zeros((num_classes, weight.shape[1])), np.full(num_classes, -1e4)
    whole[present], offset[present] = weight / temperature, bias / temperature
    return Solution(whole, offset, float(penalty), accuracy, len(labels))
