"""Metric-learning losses and triplet miners.

All distances are squared distances between unit embeddings, from 0 to 4. Losses and miners of pytorch-metric-learning
can be used instead; note that their defaults are plain distances and a margin of 0.05.
"""

import torch
import torch.nn.functional as F
from pytorch_metric_learning import losses
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import Tensor, nn
from typing_extensions import override

from modules.ranges import NonNegative, Positive, Share, ShareBelowOne

Triplets = tuple[Tensor, Tensor, Tensor]  # indices of anchors, positives and negatives, int64 each


def squared_distances(one: Tensor, other: Tensor) -> Tensor:
    """Computes squared distances between unit embeddings, float N×D and M×D, as float N×M in [0, 4].

    >>> squared_distances(torch.eye(2), torch.eye(2)).tolist()
    [[0.0, 2.0], [2.0, 0.0]]
    """
    return (2 - 2 * one @ other.T).clamp(0, 4)


class TripletLoss(TripletMarginLoss):
    """Triplet loss max(0, ‖f(a)−f(p)‖² − ‖f(a)−f(n)‖² + α), averaged over the triplets with a positive loss.

    Source: Schroff et al. 2015, arXiv:1503.03832, equation 3.

    Args:
        margin: α, in squared distance.
    """

    def __init__(self, margin: NonNegative = 0.2) -> None:
        super().__init__(margin=margin, distance=LpDistance(power=2))


class CosFaceLoss(losses.CosFaceLoss):
    """CosFace: cross-entropy over the training identities, with a margin subtracted from the cosine of the true one.

    The loss of pytorch-metric-learning, with arguments that the command line can parse.
    Source: Wang et al. 2018, arXiv:1801.09414, equation 4.

    Args:
        num_classes: number of training identities.
        embedding_size: dimensions of the embedding.
        margin: margin, subtracted from the cosine.
        scale: factor on the cosines.
    """

    def __init__(self, num_classes: int, embedding_size: int, margin: NonNegative = 0.35, scale: Positive = 64) -> None:
        super().__init__(num_classes, embedding_size, margin=margin, scale=scale)


class SemiHardMiner(nn.Module):
    """Selects, for each anchor and positive, the nearest negative that is further away than the positive, but by less
    than the margin.

    Source: Schroff et al. 2015, arXiv:1503.03832, section 3.2. Sorts the negatives of each anchor once, where
    pytorch-metric-learning lists all N³ triplets of a batch.

    Args:
        margin: margin of the loss, in squared distance.
    """

    def __init__(self, margin: NonNegative = 0.2) -> None:
        super().__init__()
        self.margin = margin

    @torch.no_grad()
    def forward(self, embedding: Tensor, identity: Tensor) -> Triplets:
        """Mines a batch.

        Args:
            embedding: float N×D, of unit length.
            identity: int64 N.

        Returns:
            M triplets.
        """
        distance, mates, strangers = _pairs(embedding, identity)
        away, order = distance.masked_fill(~strangers, torch.inf).sort(1)
        place = torch.searchsorted(away, distance, right=True).clamp_max(len(identity) - 1)
        nearest = away.gather(1, place)
        semi_hard = mates & (nearest > distance) & (nearest < distance + self.margin)
        anchor, positive = semi_hard.nonzero(as_tuple=True)
        return anchor, positive, order.gather(1, place)[anchor, positive]


class HardMiner(nn.Module):
    """Selects, for each anchor and positive, the nearest negative, even if it is closer than the positive.

    Source: Schroff et al. 2015, arXiv:1503.03832, section 3.2: hard negatives with all anchor-positive pairs. Hermans
    et al. 2017 (arXiv:1703.07737) keep only the furthest positive of each anchor, which is BatchHardMiner in
    pytorch-metric-learning; it collapses more easily.
    """

    @torch.no_grad()
    @override
    def forward(self, embedding: Tensor, identity: Tensor) -> Triplets:
        distance, mates, strangers = _pairs(embedding, identity)
        anchor, positive = (mates & strangers.any(1, keepdim=True)).nonzero(as_tuple=True)
        return anchor, positive, distance.masked_fill(~strangers, torch.inf).argmin(1)[anchor]


class ProgressiveMiner(nn.Module):
    """Mines semi-hard triplets first and hard ones later, depending on the embeddings instead of the epoch.

    It switches to hard triplets when few of all triplets of a batch have a positive loss and different identities are
    far apart, both as moving averages over batches; hard triplets from the start tend to collapse the embedding. It
    switches back if different identities come close again. The state is stored in the checkpoint.

    Args:
        margin: margin of the loss, in squared distance.
        active: switch when a smaller fraction of all triplets has a positive loss, in (0, 1),
        spread: and the mean squared distance between identities is larger; switch back below half of it.
        momentum: momentum of the moving averages, in [0, 1).
    """

    averages: Tensor
    state: Tensor

    def __init__(
        self, margin: NonNegative = 0.2, active: Share = 0.05, spread: NonNegative = 0.5, momentum: ShareBelowOne = 0.9
    ) -> None:
        super().__init__()
        self.margin, self.active, self.spread, self.momentum = margin, active, spread, momentum
        self.semi_hard, self.hard = SemiHardMiner(margin), HardMiner()
        self.register_buffer("averages", torch.tensor([1.0, 0.0]))  # fraction of active triplets, and spread
        self.register_buffer("state", torch.tensor(0))  # 1 for hard triplets

    @torch.no_grad()
    @override
    def forward(self, embedding: Tensor, identity: Tensor) -> Triplets:
        share, spread = triplet_hinge(embedding, identity, self.margin)[1], mean_distances(embedding, identity)[1]
        if share.isfinite():  # otherwise the batch has no triplets
            self.averages.lerp_(torch.stack([share, spread.float()]), 1 - self.momentum)
        share, spread = self.averages
        if self.state:
            self.state.fill_(spread >= self.spread / 2)
        else:
            self.state.fill_((share < self.active) & (spread > self.spread))
        return (self.hard if self.state else self.semi_hard)(embedding, identity)


def _pairs(embedding: Tensor, identity: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes squared distances, float N×N, and masks of positive and of negative pairs, bool N×N."""
    same = identity[:, None] == identity
    mates = same & ~torch.eye(len(identity), dtype=torch.bool, device=identity.device)
    return squared_distances(embedding, embedding), mates, ~same


@torch.no_grad()
def mean_distances(embedding: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """Computes the mean squared distances between images of the same identity and between images of different ones; NaN if
    there are none."""
    distance, mates, strangers = _pairs(embedding, identity)
    return distance[mates].mean(), distance[strangers].mean()


@torch.no_grad()
def triplet_hinge(embedding: Tensor, identity: Tensor, margin: float = 0.2) -> tuple[Tensor, Tensor]:
    """Computes the triplet loss over all triplets, in O(N² log N) instead of O(N³).

    Args:
        embedding: float N×D, of unit length.
        identity: int64 N.
        margin: α, in squared distance.

    Returns:
        The mean over all triplets, including those with zero loss; and the fraction of triplets with a positive loss.
        Both are NaN without triplets.
    """
    total = active = count = torch.zeros((), dtype=torch.float64, device=embedding.device)
    for rows in torch.arange(len(identity), device=identity.device).split(1024):
        same = identity[rows, None] == identity
        distance = squared_distances(embedding[rows], embedding).double()
        away = distance.masked_fill(same, torch.inf).sort(1).values
        sums = F.pad(away.masked_fill(away.isinf(), 0).cumsum(1), (1, 0))
        same[torch.arange(len(rows), device=rows.device), rows] = False  # an image is not its own positive
        bound = distance + margin
        nearer = torch.searchsorted(away, bound)
        total = total + (nearer * bound - sums.gather(1, nearer))[same].sum()
        active = active + nearer[same].sum()
        count = count + (same.sum(1) * away.isfinite().sum(1)).sum()
    return (total / count).float(), (active / count).float()


def within_class_whitening(
    features: Tensor, identity: Tensor, size: int, shrinkage: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Computes a linear layer that projects features to their principal components and whitens the within-class
    covariance.

    Source: Hatch, Kajarekar & Stolcke 2006, Interspeech, "Within-class covariance normalisation".

    Args:
        features: float N×F.
        identity: int64 N.
        size: number of components; those that F and N do not provide are zero.
        shrinkage: fraction of the mean variance that is added to each within-class variance.

    Returns:
        Weight, float32 ``size``×F, and bias, float32 ``size``. Embeddings before normalisation have a total variance of
        1.
    """
    x, mean = features.double(), features.double().mean(0)
    components = torch.linalg.svd(x - mean, full_matrices=False).Vh[:size]
    projected = (x - mean) @ components.T
    centres = torch.stack([projected[identity == person].mean(0) for person in identity.unique()])
    apart = projected - centres[identity.unique(return_inverse=True)[1]]
    within = apart.T @ apart / len(x)
    within += shrinkage * within.trace() / len(within) * torch.eye(len(within), dtype=x.dtype, device=x.device)
    layer = torch.linalg.cholesky(torch.linalg.inv(within)).T @ components
    layer /= ((x - mean) @ layer.T).var(0).sum().sqrt()
    weight = F.pad(layer, (0, 0, 0, size - len(layer)))
    return weight.float(), -(weight @ mean).float()
