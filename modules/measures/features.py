"""Quality of self-supervised features: effective rank and k-nearest-neighbour accuracy."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

NEIGHBOURS, TEMPERATURE = 20, 0.07


def effective_rank(features: Tensor) -> Tensor:
    """Computes the effective rank of features: the exponential of the entropy of the singular values of the centred
    features (Roy & Vetterli 2007, EUSIPCO; as a measure of self-supervised learning, Garrido et al. 2023,
    arXiv:2210.02885).

    >>> effective_rank(torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])).round(decimals=4)
    tensor(2.)

    Args:
        features: float N×D.

    Returns:
        A scalar from 1, also if all features are equal, to the smaller of N - 1 and D.
    """
    with torch.autocast(features.device.type, enabled=False):
        centred = features.detach().float() - features.detach().float().mean(0)
        gram = centred.T @ centred if len(centred) > centred.shape[1] else centred @ centred.T
    values = torch.linalg.eigvalsh(gram.double()).clamp(min=0)
    # Rounding errors of equal features are not a direction.
    values = torch.where(values > 1e-12 * features.detach().double().square().sum(), values, 0.0).sqrt()
    shares = values / values.sum().clamp(min=1e-30)
    rank: Tensor = torch.special.entr(shares).sum().exp()
    return rank.float()


def neighbours(train: tuple[NDArray[Any], Any], val: tuple[NDArray[Any], Any]) -> float:
    """Computes the accuracy, in [0, 1], of k-nearest-neighbour classification by the 20 most similar images, weighted
    by exp(s / 0.07) with the cosine similarity s (Wu et al. 2018, arXiv:1805.01978, section 3.4; Caron et al. 2021,
    arXiv:2104.14294).

    Args:
        train: features float N×D and labels int N of the reference images.
        val: features and labels to evaluate on.
    """

    def votes(distance: NDArray[Any]) -> NDArray[Any]:
        return np.exp(-distance / TEMPERATURE)  # a common factor does not matter

    count = min(NEIGHBOURS, len(train[0]))
    classifier = KNeighborsClassifier(count, weights=votes, metric="cosine", algorithm="brute")
    return float(classifier.fit(*train).score(*val))
