"""One label for each image."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchvision.transforms import v2
from typing_extensions import override

from modules.answers import HeadedAnswers, likeliest
from modules.base import Stage, VisionModule
from modules.callbacks.linear_head import Solution, solve
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.networks.backbones import take_head
from modules.optimization import Optimization
from modules.pictures.charts import confusion_matrix
from modules.pictures.sheets import sheet
from modules.ranges import NonNegative, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.views import mean_of_classes
from modules.warm_start import ClassRows

WORST = 18  # mistakes shown


class ClassificationModule(VisionModule):
    """A backbone and a linear classifier, trained by cross-entropy.

    Measures loss, accuracy (top-1, and top-5 from ten classes on), the mean over classes of their accuracy
    (``balanced_accuracy``), macro F1, the expected calibration error over 15
    bins (Guo et al. 2017, arXiv:1706.04599), and the accuracy of each class; shows the confusion matrix and the most
    confident mistakes.

    Args:
        data: description of its data.
        backbone: the network that it is built on.
        optimization: how it is trained.
        label_smoothing: share of the target that is spread over all classes, in [0, 1) (Szegedy et al. 2016,
            arXiv:1512.00567).
        mixup: parameter α of mixup's Beta distribution (Zhang et al. 2018, arXiv:1710.09412); 0 for none.
        cutmix: parameter α of cutmix's (Yun et al. 2019, arXiv:1905.04899); 0 for none. With both, each batch draws
            one of them.
        focal_gamma: γ of the focal loss (Lin et al. 2017, arXiv:1708.02002), -(1 - p)^γ log p of the true class: how
            little images count that are already right; 0 for cross-entropy.
    """

    monitor = "val/accuracy"
    mode = "max"

    any_bands = True
    takes = ("num_classes", "label_names", "in_chans", "image_size")
    takes_for_training = ("class_weights",)
    needs: tuple[str, ...] = ("label",)
    mirrors = True
    class_weights: Tensor | None

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("lenet5"),
        optimization: Optimization | None = None,
        label_smoothing: ShareBelowOne = 0.0,
        mixup: NonNegative = 0.0,
        cutmix: NonNegative = 0.0,
        focal_gamma: NonNegative = 0.0,
    ) -> None:
        super().__init__(data, backbone, optimization, "logits")
        num_classes = data.num_classes
        self.head = take_head(self.backbone, num_classes)
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        weights = None if data.class_weights is None else torch.tensor(data.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        mixers = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        mixers += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
        self.mix = v2.RandomChoice(mixers) if mixers else None
        figures = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
                "calibration_error": MulticlassCalibrationError(num_classes),
                "confusion": MulticlassConfusionMatrix(num_classes),
            },
            compute_groups=False,  # found by comparing states, they join what only the first batch does not tell apart
        )
        if num_classes >= 10:
            figures.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, top_k=5, average="micro")})
        self.figures = PerStage(lambda stage: figures.clone(prefix=f"{stage}/"))
        self.answers = HeadedAnswers("{label} {probability:.3f}")
        self.mistakes: list[tuple[float, int, int, Tensor]] = []

    def solve_head(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Solution:
        """See `VisionModule.solve_head`: a linear support vector machine."""
        weights = None if self.class_weights is None else self.class_weights.tolist()
        solution = solve(features, labels, self.num_classes, weights)
        self.head.load_state_dict({"weight": torch.tensor(solution.weight), "bias": torch.tensor(solution.bias)})
        return solution

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {"head": ClassRows()}

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """See `VisionModule.draw_samples`; with the labels."""
        images = [self.shown(batch, i) for i in range(len(batch["label"]))]
        return sheet(images, columns, [self.label_names[k] for k in batch["label"]], side=112)

    def shown(self, batch: dict[str, Tensor], index: int) -> Tensor:
        """What is looked at of a sample of a batch, uint8 C×H×W."""
        return batch["image"][index].cpu()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """What is said of a batch, float B×K."""
        return self.views.mean(self, batch["image"], mean_of_classes)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 B×C×S×S to logits, float B×K."""
        return self.head(self.backbone(self.normalize(image)))

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        label = batch["label"]
        image, target = self.normalize(batch["image"]), label
        if self.mix is not None:
            image, target = self.mix(image, target)
        logits = self.head(self.backbone(image))
        loss = self._loss(logits, target)
        for aux in getattr(self.backbone, "aux_logits", ()):  # see GoogLeNet
            loss = loss + 0.3 * self._loss(aux, target)
        return Losses({"loss": loss}, {"accuracy": (logits.detach().argmax(1) == label).float().mean()})

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The mean over the images, not over their weights, so that it does not depend on the batches and processes.

        Args:
            logits: float B×K.
            target: int64 B, or shares, float B×K.
        """
        if not self.focal_gamma:
            losses = F.cross_entropy(
                logits, target, self.class_weights, reduction="none", label_smoothing=self.label_smoothing
            )
            return losses.mean()
        shares = target if target.ndim == 2 else F.one_hot(target, self.num_classes)
        shares = shares * (1 - self.label_smoothing) + self.label_smoothing / self.num_classes
        if self.class_weights is not None:
            shares = shares * self.class_weights
        likely = logits.float().log_softmax(1)
        doubt = (-likely.expm1()).clamp(min=1e-7) ** self.focal_gamma  # of a γ below 1, the slope at 0 is infinite
        return -(shares * doubt * likely).sum(1).mean()

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        label = batch["label"]
        logits = self.logits(batch).float()
        self.figures[stage].update(logits, label)
        with self.publisher.optional(f"{stage}/mistakes"):
            self._collect_mistakes(batch, logits)
        return Losses({"loss": F.cross_entropy(logits, label)})

    def _collect_mistakes(self, batch: dict[str, Tensor], logits: Tensor) -> None:
        label = batch["label"]
        confidence, guess = logits.softmax(1).max(1)
        wrong = (guess != label).nonzero()[:, 0]
        wrong = wrong[confidence[wrong].argsort(descending=True)[:WORST]]
        least = self.mistakes[-1][0] if len(self.mistakes) == WORST else -1.0
        for i in wrong[confidence[wrong] > least].tolist():
            self.mistakes.append((float(confidence[i]), int(label[i]), int(guess[i]), self.shown(batch, i)))
        self.mistakes = sorted(self.mistakes, key=lambda mistake: -mistake[0])[:WORST]

    @override
    def report(self, stage: Stage) -> Report:
        values = self.figures[stage].compute()
        self.figures[stage].reset()
        counts = values.pop(f"{stage}/confusion").cpu().numpy()
        report = Report({key.removeprefix(f"{stage}/"): value for key, value in values.items()})
        there = counts.sum(1) > 0
        report.figures["balanced_accuracy"] = float((counts.diagonal()[there] / counts.sum(1)[there]).mean())
        report.pictures["confusion_matrix"] = lambda: confusion_matrix(counts, self.label_names)
        mistakes, self.mistakes = self.mistakes, []
        if mistakes:
            captions = [f"{self.label_names[g]} {c:.2f}\nis {self.label_names[t]}" for c, t, g, _ in mistakes]
            report.pictures["mistakes"] = lambda: sheet([image for *_, image in mistakes], 6, captions, side=112)
        rows = [
            [
                name,
                int(row.sum()),
                float(row[k] / row.sum()) if row.sum() else None,
                float(row[k] / max(1, column.sum())),
            ]
            for k, (name, row, column) in enumerate(zip(self.label_names, counts, counts.T, strict=True))
        ]
        report.tables["per_class"] = ["class", "images", "accuracy", "precision"], rows
        return report

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """For each image ``label``, ``probability`` and the five likeliest labels as ``top``."""
        return likeliest(self.logits(batch), self.label_names)
