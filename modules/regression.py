"""Regression of quantities from images, such as an age, a count or a weight."""

import re
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import CatMetric
from typing_extensions import override

from modules.answers import Answer, HeadedAnswers, Image
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.networks.tabular import LateFusion, Standardization, fuse, headed, inputs_of
from modules.optimization import Optimization
from modules.pictures.charts import scatter
from modules.pictures.sheets import sheet
from modules.spec import Backbone, DataSpec
from modules.views import mean_of_values
from modules.warm_start import ClassRows

WORST = 18  # number of images shown
DRAWN = 2000  # maximum number of points in a chart


class RegressionModule(VisionModule):
    """Regression: a backbone with a linear layer for quantities that are standardised over the training set.
    If the data have tabular inputs, these are fused with the features, see `LateFusion`.

    Unknown values (NaN) are ignored in the loss and in the metrics. Metrics for each quantity are the mean absolute
    error (``mae/NAME``) and the root mean squared error (``rmse/NAME``), both in the units of the data, and the
    coefficient of determination, whose mean over the quantities is ``r2``. Logs predicted against true values, and the
    images with the largest errors.

    Args:
        data: description of the data.
        backbone: the network that the regression is built on.
        optimization: optimiser, schedule and regularisation.
        loss: loss of predictions and targets, both float N and standardised, a scalar; by default the Huber loss with δ
            = 1 (Huber 1964), quadratic near the target and linear further away.
    """

    training_only = ("loss.",)

    any_bands = True
    any_tabular = True
    takes = ("label_names", "in_chans", "image_size")
    takes_for_training = ("target_mean", "target_std")
    needs: tuple[str, ...] = ("target",)
    mirrors = True
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
        count = data.num_classes
        fuse(self, data)
        mean, std = (
            torch.tensor(given or [other] * count) for given, other in ((data.target_mean, 0.0), (data.target_std, 1.0))
        )
        self.scaling = Standardization(mean, std)
        self.loss = loss or nn.HuberLoss()
        self.answers = ValueAnswers()
        self.pairs = PerStage(lambda _: CatMetric(nan_strategy="disable"))
        self.worst: list[tuple[float, Tensor, Tensor, Tensor]] = []  # error, image, prediction, truth

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {"head": ClassRows(), "scaling": ClassRows()}

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> Image:
        """See `VisionModule.draw_samples`; with the values."""
        return sheet(batch["image"], columns, [self._told(row) for row in batch["target"]], side=112)

    def _told(self, values: Tensor) -> str:
        return "\n".join(f"{name} {value:.4g}" for name, value in zip(self.label_names, values.tolist(), strict=True))

    def forward(self, image: Tensor, tabular: Tensor | None = None) -> Tensor:
        """Predicts quantities in the units of the data, float B×K.

        Args:
            image: uint8 B×C×H×W.
            tabular: tabular inputs, float32 B×V; None for the means of the training set.
        """
        return self.scaling.undo(headed(self, self.normalize(image), tabular).float())

    def _seen(self, batch: dict[str, Tensor]) -> Tensor:
        """Predicts quantities for evaluation, averaged over mirrored views."""
        return self.views.mean(partial(self, **inputs_of(self, batch)), batch["image"], mean_of_values)

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        return self._losses(self(batch["image"], batch.get("tabular")), batch["target"])

    def _losses(self, said: Tensor, truth: Tensor) -> Losses:
        said, truth = self.scaling(said), self.scaling(truth)
        known = truth.isfinite()
        count = int(known.sum())
        loss = self.loss(said[known], truth[known]) if count else said.sum() * 0
        return Losses({"loss": loss}, weight=count)

    @override
    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        said, truth = self._seen(batch), batch["target"]
        self.pairs[stage].update(torch.stack([said, truth], 1))
        with self.publisher.optional(f"{stage}/worst"):
            error = (self.scaling(said) - self.scaling(truth)).abs().nan_to_num(-1).amax(1)
            rows = zip(error.tolist(), batch["image"].cpu(), said.cpu(), truth.cpu(), strict=True)
            self.worst = sorted([*self.worst, *rows], key=lambda row: -row[0])[:WORST]
        return self._losses(said, truth)

    @override
    def report(self, stage: Stage) -> Report:
        pairs = self.pairs[stage].compute().double().cpu().numpy()
        self.pairs[stage].reset()
        worst, self.worst = self.worst, []
        report, rows, shares = Report(), [], []
        for k, (name, key) in enumerate(zip(self.label_names, keys(self.label_names), strict=True)):
            said, truth = pairs[np.isfinite(pairs[:, 1, k])][:, :, k].T
            mae, rmse, r2 = errors(said, truth)
            rows.append([name, len(truth), mae, rmse, r2])
            if mae is not None and rmse is not None:
                report.figures |= {f"mae/{key}": mae, f"rmse/{key}": rmse}
                points = np.stack([truth, said], 1)[:: -(-len(truth) // DRAWN)].astype(np.float32)
                report.pictures[f"values/{key}"] = partial(scatter, points, None, (), name, ("true", "predicted"), True)
            shares += [r2] if r2 is not None else []
        if shares:
            report.figures["r2"] = float(np.mean(shares))
        report.tables["per_quantity"] = ["quantity", "images", "mae", "rmse", "r2"], rows
        if worst:
            captions = [f"{self._told(said)}\nis {self._told(truth)}" for *_, said, truth in worst]
            report.pictures["worst"] = lambda: sheet([image for _, image, *_ in worst], 6, captions, side=112)
        return report

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns ``values`` for each image, by quantity and in the units of the data."""
        rows = self._seen(batch).tolist()
        return [{"values": dict(zip(self.label_names, row, strict=True))} for row in rows]


class ValueAnswers(HeadedAnswers):
    """Predicted quantities of an image."""

    @override
    def told(self, answer: Answer) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in answer["values"].items())


def keys(names: Sequence[str]) -> list[str]:
    """Converts names to unique ones with characters that MLflow accepts in metrics.

    >>> keys(["weight (kg)", "weight [kg]", "age"])
    ['weight _kg_ 1', 'weight _kg_ 2', 'age']
    """
    plain = [re.sub(r"[^\w. -]+", "_", name, flags=re.ASCII) for name in names]
    return [name if plain.count(name) == 1 else f"{name} {k}" for k, name in enumerate(plain, 1)]


def errors(said: NDArray[np.float64], truth: NDArray[np.float64]) -> tuple[float | None, float | None, float | None]:
    """Computes the mean absolute error, the root mean squared error, and the coefficient of determination 1 - Σ(y - ŷ)²
    / Σ(y - ȳ)².

    >>> errors(np.array([1.0, 2.0, 4.0]), np.array([1.0, 2.0, 3.0]))
    (0.3333333333333333, 0.5773502691896257, 0.5)

    Args:
        said: predictions, float64 N.
        truth: targets, float64 N.

    Returns:
        The three metrics; None for empty inputs, and no coefficient of determination for a constant target.
    """
    if not len(truth):
        return None, None, None
    squares, spread = ((said - truth) ** 2).sum(), ((truth - truth.mean()) ** 2).sum()
    r2 = float(1 - squares / spread) if spread > 0 else None
    return float(np.abs(said - truth).mean()), float((squares / len(truth)) ** 0.5), r2
