"""Metrics that compare two sets of images by their features: Fréchet distance, kernel distance, precision and
recall."""

import math
from typing import Any

import torch
from torch import Tensor


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Computes ‖μ₁ − μ₂‖² + tr(C₁ + C₂ − 2(C₁C₂)^½) (Heusel et al. 2017, arXiv:1706.08500), exact also for singular
    covariances.

    With Inception's features it is the FID; with other features, values are only comparable among themselves.

    Args:
        real: float N×F.
        fake: float M×F.

    >>> points = torch.tensor([[0.0], [2.0]])
    >>> frechet_distance(points, points + 3)
    9.0
    """
    means, covariances = [], []
    for features in (real.double(), fake.double()):
        means.append(features.mean(0))
        centred = features - means[-1]
        covariances.append(centred.T @ centred / max(1, len(features) - 1))
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp_min(0).sqrt().sum()
    distance = (means[0] - means[1]).square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * shared
    return max(0.0, float(distance))


def kernel_distance(real: Tensor, fake: Tensor) -> float:
    """Computes the squared maximum mean discrepancy with the kernel (x·y/F + 1)³ (Bińkowski et al. 2018,
    arXiv:1801.01401), the unbiased estimate over all images at once; it can be negative. Features are centred on the
    real ones and divided by the root of their mean variance: scaled one by one, a feature that hardly varies in real
    images would outweigh the rest.

    Args:
        real: float N×F.
        fake: float M×F.

    >>> points = torch.arange(6.0).view(3, 2)
    >>> kernel_distance(points, points) < kernel_distance(points, points + 5)
    True
    """
    real, fake = real.double(), fake.double()
    mean, spread = real.mean(0), real.var(0).mean().sqrt().clamp_min(1e-6)
    real, fake = (real - mean) / spread, (fake - mean) / spread

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        values = kernel(x, x)
        return (values.sum() - values.diagonal().sum()) / (len(x) * (len(x) - 1))

    return float(within(real) + within(fake) - 2 * kernel(real, fake).mean())


def neighbourhoods(real: Tensor, fake: Tensor, nearest: int = 5) -> dict[str, float]:
    """Computes precision and recall (Kynkäänniemi et al. 2019, arXiv:1904.06991), density and coverage (Naeem et al.
    2020, arXiv:2002.09797). The neighbourhood of an image is a ball that reaches to its k-th neighbour in its own set.

    ``precision``: fraction of the generated images in the ball of a real one; ``density``: number of balls of real
    images that a generated one lies in, over k; ``recall``: fraction of the real images in the ball of a generated one;
    ``coverage``: fraction of the real images with a generated one in their ball, which detects dropped modes.

    Args:
        real: float N×F.
        fake: float M×F.
        nearest: k.

    >>> points = torch.arange(8.0)[:, None]
    >>> neighbourhoods(points, points, 2)["recall"], neighbourhoods(points, points + 100, 2)["recall"]
    (1.0, 0.0)
    """
    real, fake = real.double(), fake.double()
    nearest = min(nearest, len(real) - 1, len(fake) - 1)

    def radii(x: Tensor) -> Tensor:  # the nearest neighbour is the image itself
        return torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist").kthvalue(nearest + 1, dim=1).values

    distance = torch.cdist(real, fake, compute_mode="donot_use_mm_for_euclid_dist")
    around_real, around_fake = radii(real)[:, None], radii(fake)[None]
    inside = distance <= around_real
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((distance <= around_fake).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / nearest),
        "coverage": float((distance.min(1).values <= around_real[:, 0]).double().mean()),
    }


def effective_classes(probabilities: Tensor) -> float:
    """Computes exp of the entropy of the predicted classes of a set of images: K if all are equally frequent, 1 if
    there is only one.

    Args:
        probabilities: float N×K.

    >>> round(effective_classes(torch.eye(4)), 6)
    4.0
    """
    counts = torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1]).double()
    share = counts / counts.sum()
    return float((-(share * share.clamp_min(1e-12).log()).sum()).exp())


def classifier_score(probabilities: Tensor) -> float:
    """Computes exp of the mean KL(p(y|x) ‖ p(y)); with Inception, the Inception score (Salimans et al. 2016,
    arXiv:1606.03498).

    Args:
        probabilities: float N×K.

    >>> round(classifier_score(torch.eye(4)), 6)
    4.0
    """
    p = probabilities.double().clamp_min(1e-12)
    return math.exp(float((p * (p.log() - p.mean(0).log())).sum(1).mean()))


def spread(features: Tensor) -> float:
    """Computes the mean distance between different items.

    Args:
        features: float N×F with N of at least 2.

    >>> spread(torch.tensor([[0.0, 0.0], [3.0, 4.0]]))
    5.0
    """
    x = features.double()
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def compare_sets(
    real: Tensor, fake: Tensor, real_probabilities: Tensor | None, probabilities: Tensor | None
) -> dict[str, float]:
    """Computes all metrics of this module, by name.

    >>> points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    >>> sorted(compare_sets(points, points, None, None))
    ['coverage', 'density', 'fd', 'kd', 'precision', 'recall']
    """
    figures: dict[str, Any] = {"fd": frechet_distance(real, fake), "kd": kernel_distance(real, fake)}
    figures |= neighbourhoods(real, fake)
    if probabilities is not None and real_probabilities is not None:
        figures |= {
            "classes": effective_classes(probabilities),
            "classifier_score": classifier_score(probabilities),
        }
    return figures
