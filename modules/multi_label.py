"""Multi-label classification."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics.classification import MultilabelPrecisionRecallCurve
from torchmetrics.functional.classification import binary_precision_recall_curve
from torchmetrics.utilities import dim_zero_cat
from typing_extensions import override

from modules.answers import Answer, HeadedAnswers, Image
from modules.base import Stage
from modules.calibrated import CalibratedModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.networks import BackboneError
from modules.networks.tabular import LateFusion, fuse, headed, inputs_of
from modules.optimization import Optimization
from modules.pictures.charts import precision_recall
from modules.pictures.sheets import sheet
from modules.spec import Backbone, DataSpec
from modules.training_data import share
from modules.views import mean_of_labels
from modules.warm_start import ClassRows

SHOWN = 18  # number of validation images shown with their labels


class Curve(NamedTuple):
    """Precision-recall curve of a label, in the format of torchmetrics.

    >>> curve = Curve(*map(np.array, ([0.5, 1.0, 1.0, 1.0], [1.0, 1.0, 0.5, 0.0], [0.2, 0.6, 0.9])))
    >>> curve.average_precision, curve.best_threshold, curve.at(0.7)
    (1.0, 0.6, (1.0, 0.5))

    Args:
        precision: float64 N+1.
        recall: float64 N+1, descending.
        thresholds: float64 N, ascending.
    """

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    thresholds: NDArray[np.float64]

    @property
    def average_precision(self) -> float:
        """Average precision: the sum of precisions weighted by the increase in recall, in [0, 1]."""
        return float(-(np.diff(self.recall) * self.precision[:-1]).sum())

    @property
    def best_threshold(self) -> float:
        """The threshold with the highest F1."""
        p, r = self.precision[:-1], self.recall[:-1]
        return float(self.thresholds[(2 * p * r / np.maximum(p + r, 1e-12)).argmax()])

    def at(self, threshold: float) -> tuple[float, float]:
        """Returns precision and recall at a threshold; both are 0 if no score reaches it."""
        place = int(np.searchsorted(self.thresholds, threshold))
        found = place < len(self.thresholds)
        return (float(self.precision[place]), float(self.recall[place])) if found else (0.0, 0.0)


class MultiLabelModule(CalibratedModule):
    """Multi-label classification: a backbone with a linear classifier that predicts each label independently.
    If the data have tabular inputs, these are fused with the features, see `LateFusion`.

    Metrics: the mean average precision over labels (``map``) and the mean F1 at a threshold per label. The thresholds
    are those with the best F1 on the validation set and are stored with the weights: `predict` returns the labels
    whose probability reaches them. Logs the metrics per label, precision-recall curves, and predictions for the
    same images each epoch.

    Args:
        data: description of the data.
        backbone: the network that the classifier is built on.
        optimization: optimiser, schedule and regularisation.
        loss: loss of logits and targets, both float B×K, a scalar; by default binary cross-entropy, with the data's
            ``class_weights`` as weights of positive labels. If most labels are absent from most images, use
            ``timm.loss.AsymmetricLossMultiLabel`` (Ben-Baruch et al. 2021, arXiv:2009.14119).
    """

    monitor = "val/map"
    mode = "max"
    training_only = ("loss.",)

    any_bands = True
    any_tabular = True
    takes = ("num_classes", "label_names", "in_chans", "image_size")
    takes_for_training = ("class_weights",)
    needs: tuple[str, ...] = ("labels",)
    mirrors = True
    class_weights: Tensor | None
    head: nn.Linear
    fusion: LateFusion | None

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("convnet"),
        optimization: Optimization | None = None,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization, "logits")
        fuse(self, data)
        self.loss = loss
        weights = None if data.class_weights is None else torch.tensor(data.class_weights)
        if weights is not None and loss is not None:
            raise BackboneError(
                "--data.class_weighting weights the labels in the binary cross-entropy, which --model.loss "
                f"{type(loss).__name__} replaces: leave one out."
            )
        self.register_buffer("class_weights", weights, persistent=False)
        self.keep_thresholds(torch.full((data.num_classes,), 0.5))
        self.answers = LabelAnswers()
        self.curves = PerStage(lambda _: MultilabelPrecisionRecallCurve(data.num_classes))
        self._kept = 0  # batches of the evaluation so far
        self.shown: list[tuple[Tensor, Tensor, Tensor]] = []  # image, probabilities, labels

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {"head": ClassRows()}

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> Image:
        """See `VisionModule.draw_samples`; with the labels."""
        return sheet(batch["image"], columns, [self._named(row > 0) for row in batch["labels"]], side=112)

    def _named(self, has: Tensor) -> str:
        return ", ".join(name for name, one in zip(self.label_names, has.tolist(), strict=True) if one) or "none"

    def forward(self, image: Tensor, tabular: Tensor | None = None) -> Tensor:
        """Computes logits, float B×K.

        Args:
            image: uint8 B×C×H×W.
            tabular: tabular inputs, float32 B×V; None for the means of the training set.
        """
        return headed(self, self.normalize(image), tabular)

    def _logits(self, batch: dict[str, Tensor]) -> Tensor:
        """Computes logits, float B×K, for evaluation, averaged over mirrored views."""
        return self.views.mean(partial(self, **inputs_of(self, batch)), batch["image"], mean_of_labels).float()

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        return self._losses(self(batch["image"], batch.get("tabular")).float(), batch["labels"].float())

    def _losses(self, logits: Tensor, truth: Tensor) -> Losses:
        if self.loss is not None:
            return Losses({"loss": self.loss(logits, truth)})
        return Losses({"loss": F.binary_cross_entropy_with_logits(logits, truth, pos_weight=self.class_weights)})

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        logits = self._logits(batch)
        probabilities = logits.sigmoid()
        self.curves[stage].update(probabilities, batch["labels"])
        with self.publisher.optional(f"{stage}/examples"):
            done, self._kept = self._kept, self._kept + 1
            chosen = share(self.trainer, stage, done, SHOWN, len(logits)).to(logits.device)
            kept = (part[chosen].cpu() for part in (batch["image"], probabilities, batch["labels"]))
            self.shown += zip(*kept, strict=True)
        return self._losses(logits, batch["labels"].float())

    @override
    def report(self, stage: Stage) -> Report:
        state: Any = self.curves[stage]
        with state.sync_context():
            probabilities, truth = dim_zero_cat(state.preds), dim_zero_cat(state.target)
        state.reset()
        counts = truth.sum(0).tolist()
        curves = {  # labels without positive images are not measured
            k: Curve(
                *(
                    part.double().cpu().numpy()
                    for part in binary_precision_recall_curve(probabilities[:, k], truth[:, k])
                )
            )
            for k, count in enumerate(counts)
            if count
        }
        if stage == "val":
            best = [curves[k].best_threshold if k in curves else 0.5 for k in range(self.num_classes)]
            self.calibrate(torch.tensor(best, device=self.device))
        rows, shown, self.shown, self._kept = [], self.shown, [], 0
        for k, (name, threshold) in enumerate(zip(self.label_names, self.threshold.tolist(), strict=True)):
            figures: list[float | None] = [None] * 4
            if k in curves:
                precision, recall = curves[k].at(threshold)
                f1 = 2 * precision * recall / max(precision + recall, 1e-12)
                figures = [curves[k].average_precision, f1, precision, recall]
            rows.append([name, counts[k], *figures, threshold])
        measured = np.array([row[2:4] for row in rows if row[1]], np.float64).reshape(-1, 2)
        means = dict(zip(("map", "f1"), measured.mean(0).tolist(), strict=True)) if len(measured) else {}
        columns = ["label", "images", "ap", "f1", "precision", "recall", "threshold"]
        report = Report(means, tables={"per_label": (columns, rows)})
        named = {
            f"{self.label_names[k]}  {c.average_precision:.3f}": (c.recall, c.precision) for k, c in curves.items()
        }
        report.pictures["precision_recall"] = lambda: precision_recall(named, "AP")
        if shown:
            reached = self.threshold.cpu()
            captions = [f"{self._named(p >= reached)}\nis {self._named(has > 0)}" for _, p, has in shown]
            report.pictures["examples"] = lambda: sheet([image for image, *_ in shown], 6, captions, side=112)
        return report

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns ``labels`` for each image, those whose probability reaches their threshold, the most likely first,
        and the ``probabilities`` of all labels."""
        probabilities = self._logits(batch).sigmoid()
        reached, order = probabilities >= self.threshold, probabilities.argsort(1, descending=True)
        return [
            {
                "labels": [self.label_names[k] for k in ranked if there[k]],
                "probabilities": {name: round(p, 6) for name, p in zip(self.label_names, row, strict=True)},
            }
            for row, there, ranked in zip(probabilities.tolist(), reached.tolist(), order.tolist(), strict=True)
        ]


class LabelAnswers(HeadedAnswers):
    """Predicted labels of an image, with their probabilities."""

    @override
    def told(self, answer: Answer) -> str:
        return ", ".join(f"{name} {answer['probabilities'][name]:.2f}" for name in answer["labels"]) or "none"
