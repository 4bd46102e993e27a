"""Self-supervised losses, and detection of their collapse."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from modules.callbacks.means import Losses
from modules.networks.parts import Part, within
from modules.ranges import NonNegative, NonNegativeInt, Positive, PositiveInt, ShareBelowOne

Gather = Callable[[Tensor], Tensor]  # see `modules.processes.gathered`
Crop = tuple[int, float, float]  # side of a view in pixels, minimum and maximum fraction of the image's area


class Method(Part):
    """Base class of methods: a projection head on the backbone's features, and a loss of several views of an image."""

    taught: ClassVar[bool] = False  # whether the targets come from a teacher, the moving average of the weights
    needs_whole_weights: ClassVar[str] = ""  # see `VisionModule`
    compares: ClassVar[bool] = False  # whether the images of a batch are compared with each other

    def build(self, features: int) -> None:
        """Creates the head."""
        raise NotImplementedError

    def crops(self, side: int) -> list[Crop]:
        """Returns the views of images of this side in pixels; the first two are the global ones."""
        raise NotImplementedError

    def forward(self, features: Tensor) -> Tensor:
        """Projects features, float B×F, to float B×D."""
        raise NotImplementedError

    def losses(self, views: Sequence[Tensor], taught: Sequence[Tensor], gather: Gather) -> Losses:
        """Computes the loss of a batch; in training also the metrics for `collapsed`.

        Args:
            views: projections of each view, float B×D.
            taught: the teacher's projections of the two global views; without a teacher, the first two of ``views``.
            gather: gathers the values of all processes.
        """
        raise NotImplementedError

    def collapsed(self, figures: Mapping[str, float]) -> str:
        """Describes a collapse, with remedies, from the means of an epoch; empty if there is none."""
        raise NotImplementedError


class DINO(Method):
    """DINO, self-distillation (Caron et al. 2021, arXiv:2104.14294): the student predicts, from each view of an image,
    the output of a teacher, the moving average of its weights, for the global views. The decay of the average rises
    from ``optimization.ema_decay`` (by default 0.996) to 1 with a cosine schedule.

    Args:
        prototypes: number of prototypes, the output size of the head; 65,536 in the paper.
        hidden: width of the head's two hidden layers.
        bottleneck: size of the normalised layer before the prototypes.
        student_temperature: softmax temperature of the student.
        teacher_temperature: softmax temperature of the teacher; lower values sharpen its output.
        centre_momentum: decay of the moving average of the teacher's outputs, which is subtracted from them.
        local_views: number of local views, which only the student sees.
        local_size: their side in pixels; None for half of the images'.
        share: largest fraction of an image's area in a local view, and smallest one in a global view.
        least: smallest fraction in a local view.
    """

    taught = True
    needs_whole_weights = "its teacher is a moving average of them"
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
        """Computes the cosine similarity with each prototype, float B×K, from float B×F."""
        return F.linear(F.normalize(self.head(features)), F.normalize(self.weight))

    @override
    def losses(self, views: Sequence[Tensor], taught: Sequence[Tensor], gather: Gather) -> Losses:
        """See `Method.losses`; the mean cross-entropy over all pairs of a global view of the teacher and another view
        of the student (equations 2 and 3)."""
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
        said = f"the teacher's output is the same for all images (entropy {entropy:.2f} of at most {most:.2f}"
        if entropy > most / 2:
            return f"{said}: uniform). Try a lower --model.method.teacher_temperature, a lower learning rate"
        return f"{said}: a single prototype). Try a higher --model.method.teacher_temperature, a lower --model.method.centre_momentum, a lower learning rate"  # fmt: skip


class VICReg(Method):
    """VICReg, variance-invariance-covariance regularisation (Bardes et al. 2022, arXiv:2105.04906): two views of an
    image have the same embedding, whose dimensions vary between images and are uncorrelated.

    Args:
        size: size of the embedding; 8,192 in the paper.
        invariance: weight of the squared difference between the views.
        variance: weight of the hinge loss that keeps each dimension's standard deviation above 1.
        covariance: weight of the squared covariances.
        share: smallest fraction of an image's area in a view.
    """

    compares = True

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
            f"all images have nearly the same embedding (standard deviation {figures['spread']:.2f} instead of 1). Try "
            "a higher --model.method.variance, a lower learning rate, a larger batch"
        )
