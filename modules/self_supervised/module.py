"""Self-supervised learning: views, teacher, evaluation."""

import math
from collections.abc import Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from modules.answers import Answer
from modules.base import Stage, VisionModule
from modules.callbacks.averaging import WeightAverage
from modules.callbacks.linear_head import known_features
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.callbacks.transfer import probe
from modules.measures.features import effective_rank, neighbours
from modules.measures.per_stage import Gathered, PerStage
from modules.networks import BackboneError
from modules.networks.parts import describe
from modules.optimization import Optimization, total_steps
from modules.pictures.sheets import sheet
from modules.processes import gathered
from modules.self_supervised.methods import DINO, Method
from modules.spec import Backbone, DataSpec
from modules.training_data import Batch, given_data, settings_of

KNOWN = 10_000  # number of training images whose labels are used for evaluation
MOMENTUM = 0.996
GRACE = 200  # steps without collapse detection
FLAT = 2.0  # effective rank of a batch below which features have collapsed


class Teacher(WeightAverage):
    """The teacher, a moving average of the weights: its decay rises from the given one to 1 at the end of the training
    with a cosine schedule; it is constant if the length of the training is unknown."""

    total = 0

    @property
    def network(self) -> "SelfSupervisedModule":
        """Network of the teacher, during training."""
        assert self._average_model is not None
        return cast("SelfSupervisedModule", self._average_model.module)

    @override
    def decay_at(self, step: int) -> float:
        share = min(1.0, step / self.total) if self.total else 0.0
        return 1 - (1 - self.decay) * (1 + math.cos(math.pi * share)) / 2

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.total = total_steps(trainer)
        for part in self.network.modules():  # without dropout; its batch-norm statistics are averages, too
            part.train(isinstance(part, _BatchNorm))
            if isinstance(part, _BatchNorm):
                part.momentum = 0.0


class SelfSupervisedModule(VisionModule):
    """Self-supervised learning: a backbone is trained on images without labels, from different views of an image. For
    pretraining, or to embed images.

    Labels are used for evaluation only: if data have them, each validation also computes the accuracy of a
    nearest-neighbour classifier (``knn``) and of a linear one (``probe``) on the features of training images; the
    former selects the best checkpoint. Without labels, the effective rank of the features (``rank``) does. In
    evaluation, the views are the image and its mirror image, and the network is the teacher, if there is one.

    Args:
        data: description of the data.
        backbone: the network to train.
        method: the loss: `DINO` (default) or `VICReg`.
        optimization: optimiser, schedule and regularisation.
    """

    mode = "max"
    square = True
    takes_for_training = ("label_names",)
    needs = ("label",)
    training_only = ("method.",)
    needs_whole_weights = "the teacher of DINO is a moving average of them"  # where no method is named

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("resnet18"),
        optimization: Optimization | None = None,
        method: Method | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.monitor = "val/knn" if data.num_classes > 1 else "val/rank"
        self.labelled = data.num_classes > 1
        self.method = method or DINO()
        self.method.build(self.backbone.head_hidden_size)
        views = {side for side, *_ in self.method.crops(data.image_size)}
        if max(views) > int(data.image_size):
            raise BackboneError(
                f"--model.method.local_size {max(views)} is more than the images have: give less than --data.image_size "
                f"{data.image_size}, of which half is the default."
            )
        for side in views - {data.image_size}:
            self._try(backbone.name, side)
        self.gathered = PerStage(lambda _: Gathered())
        self._known: tuple[NDArray[np.float32], NDArray[np.int64]] | None = None  # features and labels

    def _try(self, name: str, side: int) -> None:
        """Checks that the backbone accepts views of another size than the images.

        Raises:
            BackboneError: it does not.
        """
        try:
            with torch.no_grad():
                found = self.backbone.eval()(torch.zeros(1, self.in_chans, side, side)).shape[1]
            if found != self.backbone.head_hidden_size:
                raise ValueError(f"it makes {found} features of them, not {self.backbone.head_hidden_size}")
        except (RuntimeError, AssertionError, ValueError) as error:
            raise BackboneError(
                f"{name} does not take views of {side} pixels beside images of {self.image_size} "
                f"({' '.join(str(error).split())[:100].rstrip('.')}): give --model.method DINO --model.method.local_size {self.image_size}, or, for a "
                "vision transformer, --model.backbone.options.dynamic_img_size true and a size that its patches divide."
            ) from None
        self.backbone.train()

    @override
    def parts(self) -> dict[str, Any]:
        return {"method": describe(self.method)}

    @override
    def prepare(self, data: Any) -> None:
        if self.method.compares and data.batch_size == 1:
            raise BackboneError(
                f"{type(self.method).__name__} compares the images of a batch with each other: give a --data.batch_size of at least 2."
            )
        data.view_crops = self.method.crops(self.image_size)

    @override
    def averaging(self, decay: float | None) -> WeightAverage | None:
        if not self.method.taught:
            return super().averaging(decay)
        return Teacher(MOMENTUM if decay is None else decay)

    def forward(self, image: Tensor) -> Tensor:
        """Computes features, float32 B×F, from images, uint8 B×C×H×W."""
        return cast(Tensor, self.backbone(self.normalize(image)).float())

    def compared(self, views: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Computes the features of the first view, float B×F, and the projections of all views, float B×D, from views,
        uint8 B×C×s×s."""
        sizes = [torch.cat(list(same)) for _, same in groupby(views, lambda view: view.shape[-2:])]
        features = torch.cat([self(images) for images in sizes])
        return features[: len(views[0])], self.method(features).float().split(len(views[0]))

    @override
    def losses(self, batch: Batch) -> Losses:
        if "views" not in batch and not settings_of(self.trainer).overfit_batches:
            raise BackboneError(
                "The data give one view of each image only: choose other data, such as UnlabelledFolder. (Loaders of your own "
                "have further `views` in a batch, a list of uint8 B×C×s×s.)"
            )
        views = [batch["image"], *batch.get("views", [batch["image"].flip(3)])]
        features, compared = self.compared(views)
        taught = compared[:2]
        if self.method.taught:
            with torch.no_grad():
                taught = self._teacher.compared(views[:2])[1]
        losses = self.method.losses(compared, taught, gathered)
        return Losses(losses.terms, {**losses.figures, "rank": effective_rank(features[:256])}, losses.weight)

    @property
    def _teacher(self) -> "SelfSupervisedModule":
        if self._trainer is None:  # when a step is tried out
            return deepcopy(self).requires_grad_(False)
        return next(each.network for each in self._callbacks if isinstance(each, Teacher))

    @override
    def on_train_epoch_end(self) -> None:
        """Warns if the representation has collapsed."""
        super().on_train_epoch_end()
        names = (key for key in self.trainer.callback_metrics if key.startswith("train/"))
        means = {name.removeprefix("train/"): float(self.trainer.callback_metrics[name]) for name in names}
        said = self.method.collapsed(means)
        if not said and means["rank"] < FLAT:
            said = (
                f"the effective rank of the features is {means['rank']:.1f}. Try "
                "stronger --data.augmentation, a lower learning rate, a larger batch"
            )
        if said and self.global_step >= GRACE:
            rank_zero_warn(f"The representation collapses: in epoch {self.current_epoch} {said}.")

    def on_validation_epoch_start(self) -> None:
        """Embeds labelled training images with the weights that are validated."""
        self._know()

    def on_test_epoch_start(self) -> None:
        """See `on_validation_epoch_start`."""
        self._know()

    def _know(self) -> None:
        data, self._known = given_data(self.trainer), None
        # A registered model that is evaluated is not told of classes.
        labelled = self.labelled or len(getattr(data, "label_names", None) or []) > 1
        if labelled and data is not None and "train" in data.sources:
            self._known = known_features(self, "train", KNOWN)

    @override
    def measure(self, batch: Batch, stage: Stage) -> Losses:
        views = [batch["image"], batch["image"].flip(3)]
        features, compared = self.compared(views)
        self.gathered[stage].update(features, batch["label"], batch["label"])  # order is irrelevant
        if self.without_training_only:  # the loss of a random projection says nothing
            return Losses({})
        return self.method.losses(compared, compared, lambda own: own)  # processes have batches of different sizes

    @override
    def report(self, stage: Stage) -> Report:
        features, labels, _ = self.gathered[stage].compute()
        self.gathered[stage].reset()
        figures: dict[str, Tensor | float] = {"rank": effective_rank(features)}
        if self._known is not None:
            asked = (features.cpu().numpy(), labels.view(-1).cpu().numpy())  # a scalar for a single image
            figures |= {"knn": neighbours(self._known, asked), "probe": probe(self._known, asked)}
        self._known = None
        return Report(figures)

    @override
    def draw_samples(self, batch: Batch, columns: int = 8) -> NDArray[np.uint8]:
        """Draws images; in training, a row of all views for each."""
        if "views" not in batch:
            return super().draw_samples(batch, columns)
        views = [batch["image"], *batch["views"]]
        pixels = [view[i].permute(1, 2, 0).numpy() for i in range(min(8, len(views[0]))) for view in views]
        return sheet(pixels, len(views), side=64)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``embedding`` of each image, the backbone's pooled features, a list of floats."""
        return [{"embedding": row} for row in self(batch["image"]).tolist()]
