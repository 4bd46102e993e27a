"""Image classification."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from typing_extensions import override

from modules.answers import Answer, HeadedAnswers, likeliest
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.networks import BackboneError
from modules.networks.imagenet import GoogLeNet
from modules.networks.tabular import LateFusion, fuse, headed, inputs_of
from modules.optimization import Optimization
from modules.pictures.charts import confusion_matrix
from modules.pictures.sheets import sheet
from modules.ranges import NonNegative, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.views import mean_of_classes
from modules.warm_start import ClassRows

if TYPE_CHECKING:
    from modules.callbacks.support_vectors import Solution

WORST = 18  # number of misclassified images shown


class ClassificationModule(VisionModule):
    """Image classification: a backbone with a linear classifier, trained with cross-entropy.
    If the data have tabular inputs, these are fused with the features, see `LateFusion`.

    Metrics: loss, accuracy (top-1, and top-5 from ten classes on), mean accuracy over classes (``balanced_accuracy``),
    macro F1, expected calibration error over 15 bins (Guo et al. 2017, arXiv:1706.04599), and accuracy per class.
    Logs the confusion matrix and the most confident mistakes.

    Args:
        data: description of the data.
        backbone: the network that the classifier is built on.
        optimization: optimiser, schedule and regularisation.
        label_smoothing: fraction of the target that is spread over all classes, in [0, 1) (Szegedy et al. 2016,
            arXiv:1512.00567).
        mixup: parameter α of mixup's Beta distribution (Zhang et al. 2018, arXiv:1710.09412); 0 for no mixup.
        cutmix: parameter α of cutmix's Beta distribution (Yun et al. 2019, arXiv:1905.04899); 0 for no cutmix. With
            both, one of them is drawn for each batch.
        focal_gamma: γ of the focal loss (Lin et al. 2017, arXiv:1708.02002), -(1 - p)^γ log p of the true class: larger
            values reduce the weight of correctly classified images; 0 for cross-entropy.

    Raises:
        BackboneError: mixup or cutmix with tabular inputs.
    """

    monitor = "val/accuracy"
    mode = "max"

    any_bands = True
    any_tabular = True
    takes = ("num_classes", "label_names", "in_chans", "image_size")
    takes_for_training = ("class_weights",)
    needs: tuple[str, ...] = ("label",)
    mirrors = True
    class_weights: Tensor | None
    head: nn.Linear
    fusion: LateFusion | None

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
        fuse(self, data)
        if self.fusion is not None and (mixup or cutmix):
            raise BackboneError(
                f"--model.{'mixup' if mixup else 'cutmix'} mixes images, but not their tabular inputs: leave it out."
            )
        self.label_smoothing, self.focal_gamma = label_smoothing, focal_gamma
        weights = None if data.class_weights is None else torch.tensor(data.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        from torchvision.transforms import v2

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
            compute_groups=False,  # the automatic grouping compares states after one batch only
        )
        if num_classes >= 10:
            figures.add_metrics({"accuracy_top5": MulticlassAccuracy(num_classes, top_k=5, average="micro")})
        self.figures = PerStage(lambda stage: figures.clone(prefix=f"{stage}/"))
        self.answers = HeadedAnswers("{label} {probability:.3f}")
        self.mistakes: list[tuple[float, int, int, Tensor]] = []

    def solve_head(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> "Solution":
        """See `LinearTask.solve_head`: fits a linear support vector machine."""
        from modules.callbacks.support_vectors import solve  # only here: scikit-learn takes a second to import

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
        """Returns the image of a sample in a batch for display, uint8 C×H×W."""
        return batch["image"][index].cpu()

    def logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Computes logits, float B×K, for evaluation, averaged over mirrored views."""
        return self.views.mean(partial(self, **inputs_of(self, batch)), batch["image"], mean_of_classes)

    def forward(self, image: Tensor, tabular: Tensor | None = None) -> Tensor:
        """Computes logits, float B×K.

        Args:
            image: uint8 B×C×H×W.
            tabular: tabular inputs, float32 B×V; None for the means of the training set.
        """
        return headed(self, self.normalize(image), tabular)

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        label = batch["label"]
        image, target = self.normalize(batch["image"]), label
        if self.mix is not None:
            image, target = self.mix(image, target)
        logits = headed(self, image, batch.get("tabular"))
        loss = self._loss(logits, target)
        for aux in self.backbone.aux_logits if isinstance(self.backbone, GoogLeNet) else ():
            loss = loss + 0.3 * self._loss(aux, target)
        return Losses({"loss": loss}, {"accuracy": (logits.detach().argmax(1) == label).float().mean()})

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Computes the loss as a mean over images, not over their class weights, so that it is independent of batches
        and processes.

        Args:
            logits: float B×K.
            target: int64 B, or class probabilities, float B×K.
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
        doubt = (-likely.expm1()).clamp(min=1e-7) ** self.focal_gamma  # for γ below 1, the slope at 0 is infinite
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
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns ``label``, ``probability`` and the five most likely labels as ``top`` for each image."""
        return likeliest(self.logits(batch), self.label_names)
