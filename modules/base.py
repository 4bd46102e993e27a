"""Base class of all task modules: the hooks that a task overrides, those of Lightning, and normalisation on the device."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from modules.answers import Answer, Answers
from modules.callbacks.averaging import WeightAverage
from modules.callbacks.divergence import DivergenceGuard
from modules.callbacks.freezing import Freezing, freeze_unlearned
from modules.callbacks.linear_head import LinearHead, solved
from modules.callbacks.means import EpochMeans, Losses
from modules.callbacks.publish import Publisher, Report
from modules.callbacks.schedule import ChangedSettings, TimedSchedule
from modules.callbacks.transfer import TransferChoice, planned, started
from modules.optimization import (
    Optimization,
    build_optimizer,
    parameter_groups,
    rate_factor,
    total_steps,
)
from modules.pictures.sheets import sheet
from modules.spec import Backbone, DataSpec, SharedBackbone, sides
from modules.stored import StoredModule
from modules.training_data import Batch, given_data, settings_of
from modules.views import Views
from modules.warm_start import ClassRows

Stage = Literal["train", "val", "test"]


class VisionModule(StoredModule):
    """Base class of all task modules. A subclass adds its head, computes its loss in `losses`, and overrides the other
    hooks that it needs. `configure_callbacks` lists the callbacks of a training, and `StoredModule` what is stored.

    Args:
        data: description of the data.
        backbone: the network that the task is built on.
        optimization: optimiser, schedule and regularisation.
        output: output of the backbone: one ``vector`` per image, feature ``maps`` (a list of float B×C×H×W), or the
            ``logits`` of the classes.
    """

    monitor: str = "val/loss"  # a subclass may set both from its arguments
    mode: Literal["min", "max"] = "min"
    takes_for_training: ClassVar[tuple[str, ...]] = ()  # fields only used in training
    needs: tuple[str, ...] = ()  # keys that a sample must have besides ``image``
    averages: ClassVar[Mapping[str, str]] = {}  # prefix of weights -> prefix of their moving average
    compiles_features: bool = False  # whether `last_features` of the backbone is compiled, too
    mirrors: ClassVar[bool] = False  # whether predictions for mirrored images can be averaged, see `Views`
    square: ClassVar[bool] = False  # whether images must be square
    any_bands: ClassVar[bool] = False  # whether images may have other channels than 8-bit RGB or grey
    any_tabular: ClassVar[bool] = False  # whether there may be tabular inputs besides the image
    needs_whole_weights: ClassVar[str] = ""  # why they cannot be split among processes; empty where they can
    series: ClassVar[tuple[str, ...]] = ()  # keys of logged images of which a video is made at the end of training
    scale: Tensor
    shift: Tensor
    image_size: Any  # as in `DataSpec`; an integer in tasks with square images

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone,
        optimization: Optimization | None = None,
        output: Literal["vector", "maps", "logits"] = "vector",
    ) -> None:
        super().__init__()
        data.check(type(self).__name__.removesuffix("Module"), self.square, self.any_bands, self.any_tabular)
        self.num_classes, self.label_names = data.num_classes, data.names
        self.in_chans, self.image_size, self.size = data.in_chans, data.image_size, sides(data.image_size)
        self.tabular_names = data.tabular_names
        self.full = 255.0 if data.bit_depth == 8 else 1.0  # largest possible pixel value
        self.bit_depth, self.channel_mean, self.channel_std = data.bit_depth, data.channel_mean, data.channel_std
        self.optimization = optimization or Optimization()
        self.lr = self.optimization.lr  # Lightning's learning-rate finder reads and sets this attribute
        self.channels_last, self.compile_backbone = backbone.channels_last, backbone.compile
        self.shared_maps = backbone.maps if isinstance(backbone, SharedBackbone) else None
        start = started(backbone, data, output, self.optimization)
        self.backbone, self.learned, self.licence = start.network, start.learned, start.licence
        self.reads_parts = output != "vector"  # of the backbone; some of its layers may then not be read
        self.pretrained, self.transfer, self.strategy = start.pretrained, backbone.transfer, start.strategy
        self.falling_rates = False  # layer by layer, in a fine-tuning that an earlier version began
        mean, std = start.normalization
        if data.channel_mean is not None and data.channel_std is not None:
            mean, std = (torch.tensor(values, dtype=torch.float32) for values in (data.channel_mean, data.channel_std))
        self.register_buffer("scale", (1 / (self.full * std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(-1, 1, 1), persistent=False)
        self.answers, self.views = Answers(), Views(type(self).__name__, self.mirrors)
        self.means, self.guard, self.publisher = EpochMeans(), DivergenceGuard(), Publisher()
        self._callbacks: list[L.Callback] = []
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the compiled function and the callbacks, so that a copy does not hold the trainer, its data and
        loggers."""
        return super().__getstate__() | {"_compiled": None, "_callbacks": []}

    # Hooks that a task overrides

    @property
    def class_layers(self) -> dict[str, ClassRows]:
        """Layers that have one row per class, by name; none by default."""
        return {}

    def losses(self, batch: Batch) -> Losses:
        """Computes the loss of a training batch."""
        raise NotImplementedError

    def measure(self, batch: Batch, stage: Stage) -> Losses:
        """Updates the metrics of a stage, ``val`` or ``test``, and returns losses whose means over the split are
        logged; by default, the training losses."""
        return self.losses(batch)

    def report(self, stage: Stage) -> Report:
        """Returns the metrics, images and tables of an evaluation besides its mean losses, and resets the metrics.
        Called in all processes."""
        return Report()

    def predict(self, batch: Batch) -> list[Answer]:
        """Returns the prediction for each image of a batch as plain data, which ``answers`` draws and writes."""
        raise NotImplementedError

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """Draws the images of a batch as the network sees them: uint8 H×W×3, ``columns`` images per row."""
        return sheet(batch["image"], columns)

    def prepare(self, data: Any) -> None:
        """Requests from a data module what the training needs besides its samples; by default, nothing."""

    # Methods for tasks and pipelines

    def normalize(self, image: Tensor) -> Any:
        """Normalises images on their device, with the mean and standard deviation that the backbone expects: uint8
        B×C×H×W, or float32 in [0, 1] for more than 8 bits, to float32 B×C×H×W, or to the feature maps of a backbone
        that tasks share."""
        if self.shared_maps is not None:
            return self.shared_maps(image)
        if not self.channels_last:
            image = image.contiguous()
        values = image.float()
        scaled = values.mul(self.scale) if values is image else values.mul_(self.scale)
        return scaled.add_(self.shift)

    def last_features(self, image: Tensor) -> Tensor:
        """Computes the backbone's last feature map before pooling, from normalised float B×C×S×S; compiled if
        requested."""
        return (self._compiled or self.backbone.forward_features)(image)

    @property
    def clock(self) -> int:
        """Step at which metrics and images are logged: the current step during training, otherwise the number of steps
        taken."""
        return max(0, self.global_step - 1) if self.trainer.state.fn == TrainerFn.FITTING else self.global_step

    @property
    def plan(self) -> Optimization:
        """``optimization`` with the settings that the transfer strategy adds."""
        return planned(self.optimization, self.strategy, self.backbone, self.falling_rates)

    def holds_gradients(self, batch_idx: int) -> bool:
        """Whether gradients are still being accumulated after this batch; a checkpoint does not store them."""
        count = batch_idx + 1
        return count % self.trainer.accumulate_grad_batches != 0 and count != self.trainer.num_training_batches

    # Hooks that Lightning calls

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.means.note("train", losses, batch)
        self.guard.note(self, losses.total, batch, self.holds_gradients(batch_idx))
        penalty = self.optimization.penalty(self.named_parameters())
        return losses.total + penalty if isinstance(penalty, Tensor) else losses.total

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.means.note("val", self.measure(batch, "val"), batch)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.means.note("test", self.measure(batch, "test"), batch)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[Answer]:
        return self.predict(batch)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.architecture  # fails before the training if the architecture cannot be stored
            if (data := given_data(self.trainer)) is not None:
                self.prepare(data)
                if self.trainer.world_size > 1 and self.reads_parts and self.automatic_optimization:
                    freeze_unlearned(self, data.samples("train", 2))
            if self.compile_backbone:
                self.backbone.compile()
                if self.compiles_features and hasattr(self.backbone, "forward_features"):
                    self._compiled = torch.compile(self.backbone.forward_features)

    @override
    def configure_optimizers(self) -> Any:
        if solved(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)
        groups, steps = parameter_groups(self), total_steps(self.trainer)
        return build_optimizer(self.optimization, groups, steps, self.lr, self.monitor, rate_factor(self))

    def averaging(self, decay: float | None) -> WeightAverage | None:
        """Returns the callback that keeps the moving average of the weights with this decay; none by default if it is
        None."""
        return None if decay is None else WeightAverage(decay)

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        """Returns all callbacks of a training, in the order in which they run."""
        if not self._callbacks:
            average = [] if (one := self.averaging(self.optimization.ema_decay)) is None else [one]
            around = [TransferChoice(), LinearHead(), Freezing(), ChangedSettings(), TimedSchedule()]
            self._callbacks = [*average, *around, self.means, self.guard, self.publisher]
        present = [] if self._trainer is None else settings_of(self.trainer).callbacks
        return [callback for callback in self._callbacks if callback not in present]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.check_weights(self)
        checkpoint["transfer"] = self.strategy
        super().on_save_checkpoint(checkpoint)
