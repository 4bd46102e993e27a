"""Segmentation losses."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from segmentation_models_pytorch.losses import LovaszLoss
from torch import Tensor, nn
from typing_extensions import override

from modules.ranges import NonNegative, ShareBelowOne

IGNORE = 255  # label of ignored pixels


class Loss(nn.Module):
    """Base class of losses over the pixels of a batch."""

    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        """Computes the loss, a scalar.

        Args:
            logits: float B×K×H×W.
            mask: int64 B×H×W, classes 0 … K - 1, or 255 for ignored pixels.
            weights: float K, weights of the classes' pixels; None for equal weights.
        """
        raise NotImplementedError


class CrossEntropy(Loss):
    """Cross-entropy, averaged over all pixels.

    Args:
        label_smoothing: fraction of the target that is spread over all classes, in [0, 1).
    """

    def __init__(self, label_smoothing: ShareBelowOne = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing

    @override
    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        loss = F.cross_entropy(logits, mask, weights, ignore_index=IGNORE, reduction="sum",
                               label_smoothing=self.label_smoothing)  # fmt: skip
        seen = mask != IGNORE
        total = seen.sum() if weights is None else weights[mask[seen]].sum()
        return loss / total.clamp(min=1e-6)


class Focal(Loss):
    """Focal loss (Lin et al. 2017, arXiv:1708.02002, equation 4) of the softmax probability p of the true class: -(1 -
    p)^γ log p, averaged over all pixels.

    Args:
        gamma: γ; larger values reduce the weight of easy pixels.
    """

    def __init__(self, gamma: NonNegative = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    @override
    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        entropy = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
        seen = mask != IGNORE
        share = torch.ones_like(entropy) if weights is None else weights[mask.where(seen, 0)]
        share = share * seen
        return ((1 - (-entropy).exp()) ** self.gamma * entropy * share).sum() / share.sum().clamp(min=1e-6)


class Dice(Loss):
    """Soft Dice loss (Milletari et al. 2016, arXiv:1606.04797): 1 - (2·Σpt + s) / (Σp + Σt + s) per class over all
    pixels of the batch, averaged over classes; s, one pixel, smooths classes that do not occur.

    Args:
        background: include the first class.
    """

    def __init__(self, background: bool = True) -> None:
        super().__init__()
        self.background = background

    @override
    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        seen = mask != IGNORE
        likely = logits.softmax(1) * seen[:, None]
        target = F.one_hot(mask.where(seen, 0), logits.shape[1]).permute(0, 3, 1, 2) * seen[:, None]
        common, both = (likely * target).sum((0, 2, 3)), (likely + target).sum((0, 2, 3))
        loss = 1 - (2 * common + 1) / (both + 1)
        share = torch.ones_like(loss) if weights is None else weights.clone()
        if not self.background:
            share[0] = 0
        return (loss * share).sum() / share.sum()


class Lovasz(Loss):
    """Lovász-softmax loss (Berman et al. 2018, arXiv:1705.08790), a surrogate of 1 - IoU, averaged over the classes
    that occur. Class weights are ignored: all classes have the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.loss = LovaszLoss("multiclass", per_image=False, ignore_index=IGNORE)

    @override
    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        return self.loss(logits, mask) if (mask != IGNORE).any() else logits.sum() * 0


class Mixture(Loss):
    """A weighted sum of losses.

    Args:
        parts: the losses.
        shares: their weights; all 1 by default.
    """

    def __init__(self, parts: list[Loss], shares: list[float] | None = None) -> None:
        super().__init__()
        self.parts: Sequence[Loss] = nn.ModuleList(parts)  # type: ignore[assignment]
        self.shares = shares or [1.0] * len(parts)
        if len(self.shares) != len(parts):
            raise ValueError(f"A mixture of {len(parts)} losses takes {len(parts)} shares, not {len(self.shares)}.")

    @override
    def forward(self, logits: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
        return torch.stack(
            [share * part(logits, mask, weights) for share, part in zip(self.shares, self.parts, strict=True)]
        ).sum()
