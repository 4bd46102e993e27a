"""What every module shares: the hooks that a task writes, the backbone, normalisation on the device."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from modules.answers import Answers
from modules.callbacks.divergence import DivergenceGuard
from modules.callbacks.freezing import Freezing
from modules.callbacks.linear_head import LinearHead, solved
from modules.callbacks.means import EpochMeans, Losses
from modules.callbacks.publish import Publisher, Report
from modules.callbacks.transfer import TransferChoice, planned, started
from modules.checkpoints import check_network, load_checkpoint, rebuild
from modules.networks import BackboneError
from modules.optimization import (
    ChangedSettings,
    Optimization,
    TimedSchedule,
    WeightAverage,
    build_optimizer,
    parameter_groups,
    rate_factor,
    total_steps,
)
from modules.pictures.sheets import sheet
from modules.spec import VALUES, Backbone, DataSpec, SharedBackbone, sides
from modules.training_data import given_data, settings_of
from modules.views import Views
from modules.warm_start import ClassRows

Stage = Literal["train", "val", "test"]


class VisionModule(L.LightningModule):
    """Base of all task modules. A subclass adds its head, says in `losses` what is minimised, and writes of the other hooks
    those that it needs. `configure_callbacks` adds what happens around a training.

    Args:
        data: description of its data.
        backbone: the network that it is built on.
        optimization: how it is trained.
        output: what the backbone gives: one ``vector`` an image, feature ``maps``, a list of float B×C×H×W, or ``logits``
            of the classes.
    """

    monitor: str = "val/loss"  # a module may choose them by its settings
    mode: Literal["min", "max"] = "min"
    takes: ClassVar[tuple[str, ...]] = ("in_chans", "image_size")  # of `DataSpec`; goes with the weights
    takes_for_training: ClassVar[tuple[str, ...]] = ()  # of `DataSpec` too, but forgotten with the training
    needs: tuple[str, ...] = ()  # what a sample of its data has beside ``image``
    late_parts: ClassVar[Mapping[str, type]] = {}  # arguments that make a part once the backbone is there, and its base
    training_only: ClassVar[tuple[str, ...]] = ()  # what the names of weights begin with that a user needs none of
    averages: ClassVar[Mapping[str, str]] = {}  # what those of weights begin with, and those of their moving average
    compiles_features: bool = False  # of the backbone `last_features` is asked for, too
    mirrors: ClassVar[bool] = False  # whether its answers for mirrored images can be put together, see `Views`
    oblong: ClassVar[bool] = False  # whether its images need not be square
    any_bands: ClassVar[bool] = False  # whether they may be others than RGB or grey of 8 bits
    series: ClassVar[tuple[str, ...]] = ()  # keys of pictures that a training's end makes a film of
    scale: Tensor
    shift: Tensor
    image_size: Any  # as `DataSpec` has it: a whole number in tasks whose images are square

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone,
        optimization: Optimization | None = None,
        output: Literal["vector", "maps", "logits"] = "vector",
    ) -> None:
        super().__init__()
        self.num_classes, self.label_names = data.num_classes, data.names
        self.in_chans, self.image_size, self.size = data.in_chans, data.image_size, sides(data.image_size)
        if not self.oblong and not isinstance(data.image_size, int):
            raise BackboneError(
                f"{type(self).__name__.removesuffix('Module')} takes square images: --data.image_size {min(self.size)}, not "
                f"{data.image_size}."
            )
        if not self.any_bands and (data.in_chans not in (1, 3) or data.bit_depth > 8):
            raise BackboneError(
                f"{type(self).__name__.removesuffix('Module')} takes RGB or grey of 8 bits, not {data.in_chans} channels of "
                f"{data.bit_depth}: leave --data.bits out, and give --data.in_chans 3 or 1. More can classification, several labels, "
                "regression, segmentation, detection and autoencoding."
            )
        self.full = 255.0 if data.bit_depth == 8 else 1.0  # the largest value of images
        self.bit_depth, self.channel_mean, self.channel_std = data.bit_depth, data.channel_mean, data.channel_std
        self.optimization = optimization or Optimization()
        self.lr = self.optimization.lr  # where Lightning's learning-rate finder looks
        self.channels_last, self.compile_backbone = backbone.channels_last, backbone.compile
        self.shared_maps = backbone.maps if isinstance(backbone, SharedBackbone) else None
        start = started(backbone, data, output, self.optimization)
        self.backbone, self.learned, self.licence = start.network, start.learned, start.licence
        self.pretrained, self.transfer, self.strategy = start.pretrained, backbone.transfer, start.strategy
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
        """What a copy takes over: not the trainer, with its data and loggers."""
        return super().__getstate__() | {"_compiled": None, "_callbacks": []}

    # What a task writes

    def parts(self) -> dict[str, Any]:
        """The arguments of its own that rebuild this network, as plain data; exchangeable parts as `describe` gives them."""
        return {}

    @property
    def class_layers(self) -> dict[str, ClassRows]:
        """The layers that have rows for each class, by name; by itself, none."""
        return {}

    def losses(self, batch: dict[str, Any]) -> Losses:
        """What is minimised for a training batch."""
        raise NotImplementedError

    def measure(self, batch: dict[str, Any], stage: Stage) -> Losses:
        """Updates the metrics of a stage, ``val`` or ``test``, by a batch, and returns losses that are logged as means over
        the split; by itself, those of training."""
        return self.losses(batch)

    def report(self, stage: Stage) -> Report:
        """What an evaluation came to beside its means; resets what it was gathered in. All processes are asked."""
        return Report()

    def predict(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        """What a user is told about each image of a batch, as plain data, which ``answers`` draws and writes."""
        raise NotImplementedError

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """Draws what the network is given: the images of a batch, as uint8 H×W×3, ``columns`` in a row."""
        return sheet(batch["image"], columns)

    def prepare(self, data: Any) -> None:
        """Tells a data module what a training wants of it beside its samples; by itself nothing."""

    # What it offers

    def normalize(self, image: Tensor) -> Any:
        """uint8 B×C×H×W, or float32 in [0, 1] where images have more than 8 bits, to what the backbone expects, on the device
        where it is: float32 B×C×H×W, or the maps of a backbone that several tasks share."""
        if self.shared_maps is not None:
            return self.shared_maps(image)
        if not self.channels_last:
            image = image.contiguous()
        values = image.float()
        scaled = values.mul(self.scale) if values is image else values.mul_(self.scale)
        return scaled.add_(self.shift)

    def last_features(self, image: Tensor) -> Tensor:
        """The backbone's last features before pooling, of normalised float B×C×S×S; compiled where that is asked for."""
        return (self._compiled or self.backbone.forward_features)(image)

    @property
    def architecture(self) -> dict[str, Any]:
        """What rebuilds this network, without its training, as plain data: what it `takes` of the data, the backbone as
        ``backbone`` and ``backbone_options``, and its `parts`."""
        data = {name: deepcopy(getattr(self, name)) or None for name in self.takes}
        plain = {"bit_depth": 8, "channel_mean": None, "channel_std": None}
        data |= {name: deepcopy(getattr(self, name)) for name in VALUES if getattr(self, name) != plain[name]}
        return {**data, **self.backbone.recipe, **self.parts()}

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> Self:
        """The network that `architecture` describes, also one of an earlier version."""
        return rebuild(cls, architecture)

    @property
    def clock(self) -> int:
        """The step at which figures and pictures stand: the last one of a training under way, or how many there were."""
        return max(0, self.global_step - 1) if self.trainer.state.fn == TrainerFn.FITTING else self.global_step

    @property
    def plan(self) -> Optimization:
        """``optimization`` with what the strategy adds."""
        return planned(self.optimization, self.strategy, self.backbone)

    def holds_gradients(self, batch_idx: int) -> bool:
        """Whether after this batch there are gradients that wait for the next one: a checkpoint does not hold them."""
        count = batch_idx + 1
        return count % self.trainer.accumulate_grad_batches != 0 and count != self.trainer.num_training_batches

    # What Lightning calls

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        losses = self.losses(batch)
        self.means.note("train", losses, batch)
        self.guard.note(self, losses.total, batch, self.holds_gradients(batch_idx))
        return losses.total + self.optimization.penalty(self.named_parameters())

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.means.note("val", self.measure(batch, "val"), batch)

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.means.note("test", self.measure(batch, "test"), batch)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        return self.predict(batch)

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            _ = self.architecture  # what could not be written down is told before the training
            if (data := given_data(self.trainer)) is not None:
                self.prepare(data)
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
        """What keeps the moving average of its weights, with the decay that is asked for; by itself none without one."""
        return None if decay is None else WeightAverage(decay)

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        """All that happens around a training, in this order."""
        if not self._callbacks:
            average = [] if (one := self.averaging(self.optimization.ema_decay)) is None else [one]
            around = [TransferChoice(), LinearHead(), Freezing(), ChangedSettings(), TimedSchedule()]
            self._callbacks = [*average, *around, self.means, self.guard, self.publisher]
        present = [] if self._trainer is None else settings_of(self.trainer).callbacks
        return [callback for callback in self._callbacks if callback not in present]

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.guard.check_weights(self)
        checkpoint["architecture"], checkpoint["module"] = self.architecture, type(self).__name__
        checkpoint["licence"] = self.licence

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_network(checkpoint.get("architecture", {}), self.architecture)
        self.licence = checkpoint.get("licence", self.licence)

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = "cpu") -> Self:  # type: ignore[override]
        """The network of a checkpoint, with its weights; those of the average where weights are averaged.

        Args:
            checkpoint_path: ``best.ckpt`` or ``last.ckpt`` of a training.
            map_location: where it shall be.

        Returns:
            The module in evaluation mode. How it was trained is not part of it: give a new one its ``optimization`` to go on.

        Raises:
            BackboneError: it is no checkpoint of this kind of module.
        """
        return load_checkpoint(cls, checkpoint_path, map_location)
