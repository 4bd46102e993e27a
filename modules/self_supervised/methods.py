"""What is minimised over the views of images, and how it looks when the network finds the cheap way out."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.callbacks.means import Losses
from modules.networks import BackboneError
from modules.networks.parts import Part, within
from modules.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, ShareBelowOne

Gather = Callable[[Tensor], Tensor]  # see `modules.processes.gathered`
Crop = tuple[int, float, float]  # side of a view in pixels, least and largest share of the image's area


class Method(Part):
    """Base of the methods: a head on the backbone's features, and a loss of what it makes of several views of an image."""

    taught: ClassVar[bool] = False  # by the moving average of its own weights

    def build(self, features: int) -> None:
        """Makes the head.

        Args:
            features: numbers that the backbone makes of an image.
        """
        raise NotImplementedError

    def crops(self, side: int) -> list[Crop]:
        """The views of each image of this side in pixels, two large ones first."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """float B×F to what is compared, float B×D."""
        raise NotImplementedError

    def losses(self, views: Sequence[Tensor], taught: Sequence[Tensor], gather: Gather) -> Losses:
        """The loss of a batch; in training also what `collapsed` judges by.

        Args:
            views: what the head makes of each view, float B×D.
            taught: what the teacher's head makes of the two large views; without a teacher the same as of ``views``.
            gather: gives the values of all processes.
        """
        raise NotImplementedError

    def collapsed(self, figures: Mapping[str, float]) -> str:
        """In words, how the network has collapsed by the means of an epoch, and what often helps; nothing where it has not."""
        raise NotImplementedError


class DINO(Method):
    """Self-distillation (Caron et al. 2021, arXiv:2104.14294): the network learns to say of each view of an image what its
    teacher, the moving average of its weights, says of the large ones. The average's decay rises from
    ``optimization.ema_decay`` (by default 0.996) to 1 with half a cosine.

    Args:
        prototypes: numbers that the head ends with; 65,536 in the paper.
        hidden: width of the head's two hidden layers.
        bottleneck: numbers of length one before the prototypes.
        student_temperature: by which the network's numbers are divided before the softmax.
        teacher_temperature: the same of the teacher's; a lower one sharpens.
        centre_momentum: decay of the mean of the teacher's numbers, which is subtracted from them.
        local_views: small views, which only the network sees.
        local_size: their side in pixels; None for half of the images'.
        share: share of an image's area that a small view shows at most, and a large one at least.
        least: share that a small view shows at least.
    """

    taught = True
    centre: Tensor

    def __init__(
        self,
        prototypes: PositiveInt = 4096,
        hidden: PositiveInt = 1024,
        bottleneck: PositiveInt = 256,
        student_temperature: Positive = 0.1,
        teacher_temperature: Positive = 0.04,
        centre_momentum: ShareBelowOne = 0.9,
        local_views: NonNegativeInt = 4,
        local_size: PositiveInt | None = None,
        share: ShareBelowOne = 0.4,
        least: ShareBelowOne = 0.05,
    ) -> None:
        super().__init__()
        within("prototypes", prototypes, 2)
        within("share", share, 0.01, 0.99)
        within("least", least, 0.01, share)
        self.prototypes, self.hidden, self.bottleneck = prototypes, hidden, bottleneck
        self.student_temperature, self.teacher_temperature = student_temperature, teacher_temperature
        self.centre_momentum = centre_momentum
        self.local_views, self.local_size, self.share, self.least = local_views, local_size, share, least

    @override
    def build(self, features: int) -> None:
        layers = [nn.Linear(features, self.hidden), nn.GELU(), nn.Linear(self.hidden, self.hidden), nn.GELU()]
        self.head = nn.Sequential(*layers, nn.Linear(self.hidden, self.bottleneck))
        self.weight = nn.Parameter(torch.empty(self.prototypes, self.bottleneck))
        for name, parameter in self.named_parameters():
            if name.endswith("weight"):
                nn.init.trunc_normal_(parameter, std=0.02)
            else:
                nn.init.zeros_(parameter)
        self.register_buffer("centre", torch.zeros(self.prototypes))

    @override
    def crops(self, side: int) -> list[Crop]:
        local = (self.local_size or side // 2, self.least, self.share)
        return [(side, self.share, 1.0)] * 2 + [local] * self.local_views

    @override
    def forward(self, features: Tensor) -> Tensor:
        """float B×F to the cosine with each prototype, float B×K."""
        return F.linear(F.normalize(self.head(features)), F.normalize(self.weight))

    @override
    def losses(self, views: Sequence[Tensor], taught: Sequence[Tensor], gather: Gather) -> Losses:
        """See `Method.losses`; the mean cross-entropy of all pairs of a large view, as the teacher sees it, and another view
        (equations 2 and 3)."""
        targets = [((one - self.centre) / self.teacher_temperature).softmax(1) for one in taught]
        logs = [(one / self.student_temperature).log_softmax(1) for one in views]
        pairs = [-(p * q).sum(1).mean() for i, p in enumerate(targets) for j, q in enumerate(logs) if i != j]
        loss = torch.stack(pairs).mean()
        entropy = torch.special.entr(torch.stack(targets)).sum(2).mean()
        figures = {"entropy": entropy, "kl": loss - entropy}
        if self.training:
            mean = gather(torch.cat(targets)).mean(0)
            figures["told"] = torch.special.entr(mean).sum() - entropy
            self.centre.lerp_(gather(torch.cat([*taught])).mean(0), 1 - self.centre_momentum)
        return Losses({"loss": loss}, figures)

    @override
    def collapsed(self, figures: Mapping[str, float]) -> str:
        if figures["told"] >= 0.05:
            return ""
        entropy, most = figures["entropy"], math.log(self.prototypes)
        said = f"the teacher says the same of all images (entropy {entropy:.2f} of at most {most:.2f}"
        if entropy > most / 2:
            return f"{said}: it is undecided). What often helps: a lower --model.method.teacher_temperature, a lower learning rate"
        return f"{said}: one prototype takes all). What often helps: a higher --model.method.teacher_temperature, a lower --model.method.centre_momentum, a lower learning rate"  # fmt: skip


class VICReg(Method):
    """Variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv:2105.04906): two views of an image get the
    same embedding, whose numbers each differ between images and are not correlated with each other.

    Args:
        size: numbers of the embedding; 8,192 in the paper.
        invariance: weight of the squared difference between the views.
        variance: weight of what each number's standard deviation lacks of 1.
        covariance: weight of the squared covariances.
        share: share of an image's area that a view shows at least.
    """

    def __init__(
        self,
        size: PositiveInt = 1024,
        invariance: NonNegative = 25.0,
        variance: NonNegative = 25.0,
        covariance: NonNegative = 1.0,
        share: ShareBelowOne = 0.2,
    ) -> None:
        super().__init__()
        within("share", share, 0.01, 0.99)
        self.size, self.share = size, share
        self.invariance, self.variance, self.covariance = invariance, variance, covariance

    @override
    def build(self, features: int) -> None:
        layers = [nn.Linear(features, self.size), nn.BatchNorm1d(self.size), nn.ReLU(),
                  nn.Linear(self.size, self.size), nn.BatchNorm1d(self.size), nn.ReLU()]  # fmt: skip
        self.head = nn.Sequential(*layers, nn.Linear(self.size, self.size, bias=False))

    @override
    def crops(self, side: int) -> list[Crop]:
        return [(side, self.share, 1.0)] * 2

    @override
    def forward(self, features: Tensor) -> Tensor:
        return self.head(features)

    @override
    def losses(self, views: Sequence[Tensor], taught: Sequence[Tensor], gather: Gather) -> Losses:
        """See `Method.losses` (equations 1 to 6)."""
        one, other = (gather(view) for view in views)
        if self.training and len(one) < 2:
            raise BackboneError("VICReg compares the images of a batch: give a --data.batch_size of at least 2.")
        spreads = [(view.var(0, correction=min(1, len(view) - 1)) + 1e-4).sqrt() for view in (one, other)]
        centred = [view - view.mean(0) for view in (one, other)]
        covariances = [view.T @ view / max(1, len(view) - 1) for view in centred]
        rest = [(c.square().sum() - c.diagonal().square().sum()) / self.size for c in covariances]
        terms = {
            "invariance": self.invariance * F.mse_loss(one, other),
            "variance": self.variance * torch.stack([F.relu(1 - spread).mean() for spread in spreads]).mean(),
            "covariance": self.covariance * torch.stack(rest).sum(),
        }
        return Losses(terms, {"spread": torch.stack(spreads).mean()} if self.training else {}, len(one))

    @override
    def collapsed(self, figures: Mapping[str, float]) -> str:
        if figures["spread"] >= 0.1:
            return ""
        return (
            f"all images get nearly the same embedding (its numbers deviate by {figures['spread']:.2f} instead of 1). What "
            "often helps: a higher --model.method.variance, a lower learning rate, a larger batch"
        )
