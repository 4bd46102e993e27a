"""What every module shares: the hooks that a task writes, the backbone, normalisation on the device."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self, TypeVar, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from typing_extensions import override

from modules.callbacks.divergence import DivergenceGuard
from modules.callbacks.freezing import Freezing
from modules.callbacks.linear_head import LinearHead, solved
from modules.callbacks.means import EpochMeans
from modules.callbacks.publish import Publisher, Report
from modules.callbacks.transfer import TransferChoice, check_wishes, forget, planned
from modules.checkpoints import check_network, load_checkpoint
from modules.networks.backbones import create_backbone
from modules.networks.parts import build, is_description, upgrade
from modules.optimization import (
    ChangedSettings,
    Optimization,
    WeightAverage,
    build_optimizer,
    parameter_groups,
    total_steps,
)
from modules.pictures.sheets import sheet
from modules.spec import Backbone, DataSpec, Strategy, Transfer
from modules.training_data import settings_of
from modules.warm_start import ClassRows

Stage = Literal["train", "val", "test"]
M = TypeVar("M", bound=nn.Module)


class PerStage(nn.ModuleDict, Generic[M]):
    """A metric for each stage of evaluation.

    Args:
        make: makes one of ``val`` or ``test``.
    """

    def __init__(self, make: Callable[[str], M]) -> None:
        super().__init__({stage: make(stage) for stage in ("val", "test")})

    @override
    def __getitem__(self, key: str) -> M:
        return cast(M, super().__getitem__(key))


class VisionModule(L.LightningModule):
    """Base of all task modules. A subclass adds its head, says in `step` what the loss of a batch is, and writes of the other
    hooks those that it needs. What happens around a training is the affair of `configure_callbacks`.

    Args:
        data: what its data are like.
        backbone: what it is built on.
        optimization: how it is trained.
        output: what the backbone gives: one ``vector`` an image, feature ``maps``, a list of float B×C×H×W, or ``logits``
            of the classes.
    """

    monitor: str = "val/loss"  # a module may choose them by its settings
    mode: Literal["min", "max"] = "min"
    training_only: ClassVar[tuple[str, ...]] = ()  # what the names of weights begin with that a user needs none of
    averages: ClassVar[Mapping[str, str]] = {}  # what those of weights begin with, and those of their moving average
    compiles_features: bool = False  # of the backbone `last_features` is asked for, too
    series: ClassVar[tuple[str, ...]] = ()  # keys of pictures that a training's end makes a film of
    backbone: Any  # what `create_backbone` makes
    scale: Tensor
    shift: Tensor

    takes: ClassVar[tuple[str, ...]] = ("in_chans", "image_size")  # of `DataSpec`; goes with the weights
    takes_for_training: ClassVar[tuple[str, ...]] = ()  # of `DataSpec` too, but forgotten with the training
    needs: tuple[str, ...] = ()  # what a sample of its data has beside ``image``
    late_parts: ClassVar[Mapping[str, type]] = {}  # arguments that make a part once the backbone is there, and its base

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone,
        optimization: Optimization | None = None,
        output: Literal["vector", "maps", "logits"] = "vector",
    ) -> None:
        super().__init__()
        self.num_classes, self.label_names = data.num_classes, data.names
        self.in_chans, self.image_size = in_chans, image_size = data.in_chans, data.image_size
        self.optimization = optimization or Optimization()
        self.transfer: Transfer | None = backbone.transfer
        check_wishes(self.transfer, self.optimization)
        self.pretrained = backbone.pretrained and self.transfer != "scratch"
        self.strategy: Strategy | None = None if self.transfer == "auto" else self.transfer
        self.lr = self.optimization.lr  # where Lightning's learning-rate finder looks
        self.channels_last, self.compile_backbone = backbone.channels_last, backbone.compile
        self.backbone = create_backbone(
            backbone.name,
            self.pretrained,
            in_chans,
            image_size,
            data.num_classes if output == "logits" else 0,
            features_only=output == "maps",
            **(backbone.options or {}),
        )
        # from a file or a registered model
        self.learned = self.pretrained or backbone.name != self.backbone.recipe["backbone"]
        self.licence: str | None = getattr(self.backbone, "licence", None)  # of the weights that it starts from
        if self.pretrained:
            self.licence = str(self.backbone.pretrained_cfg.get("license") or "not stated")
        if self.transfer == "scratch" and self.learned:
            forget(self.backbone, in_chans, image_size)
            self.learned, self.licence = False, None
        if self.channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        config = self.backbone.pretrained_cfg
        mean, std = (torch.tensor(config[key], dtype=torch.float32) for key in ("mean", "std"))
        if len(mean) != in_chans:
            mean, std = (value.mean().repeat(in_chans) for value in (mean, std))
        self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(-1, 1, 1), persistent=False)
        self.means, self.guard, self.publisher = EpochMeans(), DivergenceGuard(), Publisher()
        self._callbacks: list[L.Callback] = []
        self._losses: list[Tensor] = []  # of the batches of the step that is under way
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy without the trainer, and so without its data and loggers: what averaging of weights needs."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        shared: dict[str, Any] = {
            "_trainer": None,
            "optimization": self.optimization,
            "_compiled": None,
            "_callbacks": [],
        }
        for key, value in self.__dict__.items():
            twin.__dict__[key] = shared[key] if key in shared else deepcopy(value, memo)
        return twin

    # What a task writes

    def parts(self) -> dict[str, Any]:
        """The arguments of its own that rebuild this network, as plain data; exchangeable parts as `describe` gives them."""
        return {}

    @property
    def architecture(self) -> dict[str, Any]:
        """What rebuilds this network, without its training, as plain data: what it `takes` of the data, the backbone as
        ``backbone`` and ``backbone_options``, and its `parts`."""
        data = {name: deepcopy(getattr(self, name)) or None for name in self.takes}
        return {**data, **self.backbone.recipe, **self.parts()}

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> Self:
        """The network that `architecture` describes, also one of an earlier version."""
        rest = upgrade(architecture)
        rest.pop("pretrained", None)  # of a training
        data = DataSpec(**{key: rest.pop(key) for key in [*rest] if key in DataSpec.__dataclass_fields__})
        backbone = Backbone(rest.pop("backbone"), options=rest.pop("backbone_options", None))
        parts = {
            key: build(value) if is_description(value) else value
            for key, value in rest.items()
            if key not in cls.late_parts
        }
        for key in rest.keys() & cls.late_parts.keys():
            parts[key] = partial(build, rest[key], base=cls.late_parts[key])
        return cls(data, backbone, **parts)

    @property
    def class_layers(self) -> dict[str, ClassRows]:
        """The layers that have rows for each class, by name; by itself, none."""
        return {}

    def step(self, batch: dict[str, Tensor], stage: Stage) -> Tensor:
        """The loss of a batch, a scalar; updates the metrics of the stage."""
        raise NotImplementedError

    def evaluate(self, batch: dict[str, Any], stage: Stage) -> None:
        """What is done with a batch of the validation or test split: by default, its loss is logged."""
        self.log_mean(f"{stage}/loss", self.step(batch, stage), len(batch["image"]))

    def report(self, stage: Stage) -> Report:
        """What an evaluation came to, beside its means; resets what it was gathered in. All processes are asked, also at the
        end of Lightning's sanity check."""
        return Report()

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """Draws what the network is given: the images of a batch, as uint8 H×W×3, ``columns`` in a row."""
        return sheet(batch["image"], columns)

    def answers(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """What a user is told about each image of a batch, as plain data."""
        raise NotImplementedError

    def draw_answer(self, image: NDArray[np.uint8], answer: dict[str, Any]) -> NDArray[np.uint8]:
        """Draws what `answers` says of an image; by itself, the image alone.

        Args:
            image: uint8 H×W×C as it was read, with one or three channels; it is left as it is.
            answer: one of `answers`.

        Returns:
            uint8 H×W×3, not always of the image's size.
        """
        return image.repeat(3, 2) if image.shape[2] == 1 else image[..., :3].copy()

    def answer_pictures(self, answer: dict[str, Any]) -> dict[str, Image.Image]:
        """What of an answer is a picture of its own, to be kept without losses; by itself, nothing.

        Args:
            answer: one of `answers`.

        Returns:
            Pictures by what the names of their files end with, such as ``.mask.png``.
        """
        return {}

    def categories(self) -> dict[int, str]:
        """Names of the categories of `annotations` by their ids; by itself, none."""
        return {}

    def annotations(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer as annotations in COCO's format, without ``id`` and ``image_id``."""
        return []

    # What a task calls

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 B×C×H×W to the float32 B×C×H×W that the backbone expects, on the device where it is."""
        if not self.channels_last:
            image = image.contiguous()
        return image.float().mul_(self.scale).add_(self.shift)

    def last_features(self, image: Tensor) -> Tensor:
        """The backbone's last features before pooling, of normalised float B×C×S×S; compiled where that is asked for."""
        return (self._compiled or self.backbone.forward_features)(image)

    def log_mean(self, key: str, value: Tensor, weight: float) -> None:
        """Logs a weighted mean over an epoch or an evaluation; see `EpochMeans.update`."""
        self.means.update(key, value, weight)

    @property
    def clock(self) -> int:
        """The step at which the figures and pictures of an epoch or an evaluation stand: the last one of a training that is
        under way, or else how many there were."""
        return max(0, self.global_step - 1) if self.trainer.state.fn == TrainerFn.FITTING else self.global_step

    @property
    def plan(self) -> Optimization:
        """``optimization`` with what the strategy adds."""
        return planned(self.optimization, self.strategy, self.backbone)

    # What Lightning calls

    @override
    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self.step(batch, "train")
        self.log_mean("train/loss", loss.detach(), len(batch["image"]))
        if self.global_step % settings_of(self.trainer).log_every_n_steps == 0:
            self._losses.append(loss.detach())
            if not self.holds_gradients(batch_idx):
                self.log_step({"loss": torch.stack(self._losses).mean()}, batch)
                self._losses = []
        return loss + self.optimization.penalty(self.named_parameters())

    def log_step(self, terms: dict[str, Tensor], batch: dict[str, Tensor], step: int | None = None) -> None:
        """Logs the losses of a step, means over all processes, which look together whether these are finite.

        Args:
            terms: scalars by name.
            batch: the last one of it.
            step: which one; by default, the one that is under way.
        """
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self.trainer.world_size > 1:
            values = cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="mean"))
        figures = {f"train/{name}_step": value for name, value in zip(terms, values.tolist(), strict=True)}
        self.publisher.figures(self.trainer, figures, self.global_step if step is None else step)
        self.guard.check_loss(self, float(values.sum()), batch)

    def holds_gradients(self, batch_idx: int) -> bool:
        """Whether after this batch there are gradients that wait for the next one: a checkpoint does not hold them."""
        count = batch_idx + 1
        return count % self.trainer.accumulate_grad_batches != 0 and count != self.trainer.num_training_batches

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "val")

    @override
    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.evaluate(batch, "test")

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        return self.answers(batch)

    @override
    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        _ = self.architecture  # what could not be written down is told before the training
        if self.compile_backbone:
            self.backbone.compile()
            if self.compiles_features and hasattr(self.backbone, "forward_features"):
                self._compiled = torch.compile(self.backbone.forward_features)

    @override
    def configure_optimizers(self) -> Any:
        if solved(self):
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)
        return build_optimizer(
            self.optimization, parameter_groups(self), total_steps(self.trainer), self.lr, self.monitor
        )

    @override
    def configure_callbacks(self) -> list[L.Callback]:
        """All that happens around a training, in this order."""
        if not self._callbacks:
            decay = self.optimization.ema_decay
            average = [] if decay is None else [WeightAverage(decay)]
            around = [TransferChoice(), LinearHead(), Freezing(), ChangedSettings()]
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
