"""What every module shares: backbone, normalisation on the device, optimisation, averaging of weights, pictures."""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, cast

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.tuner.lr_finder import _LRCallback
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torchmetrics import Metric

from modules.callbacks.freezing import FIRST_LAYER, layers, unfreezing
from modules.callbacks.linear_head import Solution
from modules.callbacks.transfer import Strategy, Transfer, measure
from modules.networks import BackboneError
from modules.networks.backbones import create_backbone, untrained
from modules.networks.features import extract
from modules.networks.parts import upgrade
from modules.networks.weights import read_weights
from modules.optimization import Optimization, WeightAverage
from modules.pictures.sheets import image_grid

Stage = Literal["train", "val", "test"]
# What two descriptions of one network may differ in.
CHANGEABLE = ("pretrained", "label_names", "threshold", "max_detections", "nms", "across_classes")


class DivergenceError(ValueError):
    """The training came to numbers that are not finite; the message says where."""


class Mean(Metric):
    """A weighted mean over samples and processes. (torchmetrics' own drops NaN, or else the weights.)"""

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("weight", torch.tensor(0.0), "sum")

    def update(self, value: Tensor, weight: float) -> None:
        """Adds the mean of some samples, a scalar, and how many they are."""
        self.total = self.total + value * weight
        self.weight = self.weight + weight

    def compute(self) -> Tensor:
        """The mean of all."""
        return self.total / self.weight


def classes_of(architecture: Mapping[str, Any]) -> list[str] | None:
    """The names of the classes that a network has learned, in the order of their numbers.

    Args:
        architecture: `VisionModule.architecture`.

    Returns:
        None where it has learned none, as a generator that is not conditional.
    """
    names = architecture.get("label_names")
    return list(names) if names and architecture.get("conditional", True) else None


def read_checkpoint(path: str | Path, device: Any = "cpu") -> dict[str, Any]:
    """Reads a checkpoint of a training, without running any code that the file may hold.

    Args:
        path: ``last.ckpt``, ``best.ckpt``, or another that Lightning's trainer saved of a `VisionModule`.
        device: where the tensors shall be.

    Raises:
        BackboneError: there is no such file, or it is something else.
    """
    read_weights(path)
    found = None if Path(path).suffix == ".safetensors" else torch.load(path, device, weights_only=True)
    if not isinstance(found, dict) or not {"architecture", "state_dict"} <= found.keys():
        raise BackboneError(
            f"{path} holds weights alone and is no checkpoint of a training. To start another training from them, name the "
            "file as --model.backbone; a registered model is asked with python -m pipelines.predict."
        )
    return found


def _shortened(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f", … ({len(names)} in all)" if len(names) > 20 else "")


class VisionModule(L.LightningModule):
    """Base of all task modules. A subclass adds its head and says in `step` what the loss of a batch is.

    Args:
        backbone: what `create_backbone` takes.
        pretrained: start from published weights.
        in_chans: channels of the images.
        image_size: side of the images, in pixels.
        num_classes: size of the backbone's own classifier; 0 for features.
        backbone_options: further arguments of the backbone, such as ``drop_rate``.
        optimization: how it is trained.
        compile: compile the backbone with ``torch.compile``.
        channels_last: memory order of images and kernels; the faster one on most devices.
        features_only: the backbone gives its feature maps, a list of float B×C×H×W, instead of one vector.
        transfer: how the backbone is put to its new use; None as ``optimization`` says. ``scratch``: without what it
            learned before. ``features``: it stays as it is; where the head is linear, it is solved for. ``finetune``: all
            layers learn, the first at a tenth of the head's rate, unless ``layer_decay`` says otherwise.
            ``freeze_unfreeze``: first the head, for ``frozen_epochs`` or else a fifth of the training, then, one after the
            other down to the first, the layers, with the rates of ``finetune``. ``auto``: measures and chooses.
    """

    monitor: ClassVar[str] = "val/loss"
    mode: ClassVar[Literal["min", "max"]] = "min"
    training_only: ClassVar[tuple[str, ...]] = ()  # what the names of weights begin with that a user needs none of
    compiles_features: bool = False  # of the backbone `last_features` is asked for, too
    series: ClassVar[tuple[str, ...]] = ()  # keys of pictures that a training's end makes a film of
    backbone: Any  # what `create_backbone` makes
    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        backbone: str,
        pretrained: bool = False,
        in_chans: int = 3,
        image_size: int = 224,
        num_classes: int = 0,
        backbone_options: dict[str, Any] | None = None,
        optimization: Optimization | None = None,
        compile: bool = False,
        channels_last: bool = True,
        features_only: bool = False,
        transfer: Transfer | None = None,
    ) -> None:
        super().__init__()
        self.optimization = optimization or Optimization()
        self.transfer = transfer
        self.strategy: Strategy | None = None if transfer == "auto" else transfer
        if self.optimization.frozen_epochs < 0 and transfer in ("finetune", "freeze_unfreeze", "auto"):
            raise BackboneError(
                f"--model.transfer {transfer} lets the backbone learn, which --model.optimization.frozen_epochs "
                f"{self.optimization.frozen_epochs} forbids: leave one of them out."
            )
        pretrained = pretrained and transfer != "scratch"
        self.pretrained, self._input = pretrained, (in_chans, image_size)
        self.lr = self.optimization.lr  # where Lightning's learning-rate finder looks
        self.channels_last, self.compile_backbone = channels_last, compile
        self.backbone = create_backbone(
            backbone, pretrained, in_chans, image_size, num_classes, features_only, **(backbone_options or {})
        )
        learned = pretrained or backbone != self.backbone.recipe["backbone"]  # a file, a registered model
        if transfer == "scratch" and learned:
            self._forget()
        elif transfer and not learned and transfer != "scratch":
            raise BackboneError(
                f"--model.transfer {transfer} starts from what the backbone has learned, and {backbone} has random weights: "
                "give --model.pretrained true, or a file of weights or a registered model as --model.backbone."
            )
        if channels_last:
            self.backbone.to(memory_format=torch.channels_last)
        config = self.backbone.pretrained_cfg
        mean, std = (torch.tensor(config[key], dtype=torch.float32) for key in ("mean", "std"))
        if len(mean) != in_chans:
            mean, std = (value.mean().repeat(in_chans) for value in (mean, std))
        self.register_buffer("scale", (1 / (255 * std)).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (-mean / std).view(-1, 1, 1), persistent=False)
        self.means = nn.ModuleDict()
        self.frozen = 0  # layers of the backbone that do not learn, from the image on
        self._fixed: set[str] | None = None  # parameters that never learn
        self._finite = ""  # the last loss that was looked at
        self._planned: list[dict[str, Any]] = []  # settings of each optimiser and its schedule
        self._planned_before: list[dict[str, Any]] = []  # the same of the checkpoint that is gone on from
        self._undrawn: set[str] = set()  # pictures that could not be made
        self._losses: list[Tensor] = []  # of the batches of the step that is under way
        self._compiled: Callable[[Tensor], Tensor] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "VisionModule":
        """A copy without the trainer, and so without its data and loggers: what averaging of weights needs."""
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        shared = {"_trainer": None, "optimization": self.optimization, "_compiled": None}
        for key, value in self.__dict__.items():
            twin.__dict__[key] = shared[key] if key in shared else deepcopy(value, memo)
        return twin

    @property
    def architecture(self) -> dict[str, Any]:
        """The arguments that rebuild this network, without its training, as plain data."""
        raise NotImplementedError

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> Self:
        """The network that `architecture` describes."""
        return cls(**architecture)

    @classmethod
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
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        kind = checkpoint.get("module", cls.__name__)
        if kind != cls.__name__:
            raise BackboneError(
                f"{checkpoint_path} is the checkpoint of a {kind}: load it with {kind}.load_from_checkpoint, not with "
                f"{cls.__name__}'s."
            )
        module = cls.from_architecture(checkpoint["architecture"])
        own, saved = module.state_dict(), checkpoint["state_dict"]
        training = {key for key in {*own, *saved} if key.startswith(cls.training_only)}  # as of a miner or a loss
        state = {key: value for key, value in own.items() if key in training}
        module.load_state_dict(
            state | {key: value for key, value in saved.items() if key in own or key not in training}
        )
        return module.to(map_location).eval()

    def step(self, batch: dict[str, Tensor], stage: Stage) -> Tensor:
        """The loss of a batch, a scalar; updates the metrics of the stage."""
        raise NotImplementedError

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

    def write_answer(self, answer: dict[str, Any], place: Path) -> None:
        """Writes what of an answer is a file of its own; by itself, nothing.

        Args:
            answer: one of `answers`.
            place: a file in the folder of the answer's drawing; what is written has its name, but for the suffix.
        """

    def categories(self) -> dict[int, str]:
        """Names of the categories of `annotations` by their ids; by itself, none."""
        return {}

    def annotations(self, answer: dict[str, Any]) -> list[dict[str, Any]]:
        """An answer as annotations in COCO's format, without ``id`` and ``image_id``."""
        return []

    def normalize(self, image: Tensor) -> Tensor:
        """uint8 B×C×H×W to the float32 B×C×H×W that the backbone expects, on the device where it is."""
        if not self.channels_last:
            image = image.contiguous()
        return image.float().mul_(self.scale).add_(self.shift)

    def last_features(self, image: Tensor) -> Tensor:
        """The backbone's last features before pooling, of normalised float B×C×S×S; compiled where that is asked for."""
        return (self._compiled or self.backbone.forward_features)(image)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The loss with its penalties."""
        loss = self.step(batch, "train")
        value = loss.detach()
        self.log_mean("train/loss", value, len(batch["image"]))
        if self.global_step % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._losses.append(value)
            if not self.holds_gradients(batch_idx):
                self._log_step({"loss": torch.stack(self._losses).mean()}, self.global_step, batch)
                self._losses = []
        return loss + self.weight_penalty()

    def _log_step(
        self, terms: dict[str, Tensor], step: int, batch: dict[str, Tensor], more: dict[str, Tensor] | None = None
    ) -> None:
        """Logs the losses of a step, means over all processes, which look together whether these are finite.

        Args:
            terms: scalars by name.
            step: the step.
            batch: the last one of it.
            more: further figures, the same in all processes.
        """
        values = torch.stack([value.detach().float() for value in terms.values()])
        if self.trainer.world_size > 1:
            values = cast(Tensor, self.trainer.strategy.reduce(values, reduce_op="mean"))
        figures = {f"{name}_step": value for name, value in zip(terms, values.tolist(), strict=True)}
        figures |= {name: float(value) for name, value in (more or {}).items()}
        self._log_now({f"train/{name}": value for name, value in figures.items()}, step)
        self._check(float(values.sum()), batch)

    def weight_penalty(self, parts: Sequence[str] = ("",)) -> Tensor | float:
        """The penalties on weight matrices and kernels that `Optimization` asks for.

        Args:
            parts: how the names of those begin that are meant, by default of all.
        """
        plan = self.optimization
        penalty: Tensor | float = 0.0
        if plan.l1_penalty or plan.l2_penalty:
            named = self.named_parameters()
            weights = [p for name, p in named if p.ndim > 1 and p.requires_grad and name.startswith(tuple(parts))]
            if plan.l1_penalty:
                penalty = penalty + plan.l1_penalty * sum(w.abs().sum() for w in weights)
            if plan.l2_penalty:
                penalty = penalty + plan.l2_penalty * sum(w.square().sum() for w in weights)
        return penalty

    def log_mean(self, key: str, value: Tensor, weight: float) -> None:
        """Logs the exact weighted mean over an epoch, whatever the number of processes, also after a resume within it.

        Args:
            key: name, such as ``train/loss``.
            value: mean of a batch, a scalar.
            weight: samples in the batch, or whatever the mean is over.
        """
        name, bar = key.replace("/", "_"), key in ("train/loss", self.monitor)
        mean = self._mean(name)
        mean.update(value, weight)
        if not key.startswith("train/"):  # those wait for `on_train_epoch_end`
            self.log(key, mean, on_step=False, on_epoch=True, prog_bar=bar, metric_attribute=f"means.{name}")

    def on_train_epoch_end(self) -> None:
        """Logs the means of the epoch, before a checkpoint says that the epoch is over."""
        for name, mean in self.means.items():
            if name.startswith("train_"):
                value = mean.compute()  # type: ignore[operator]
                mean.reset()  # type: ignore[operator]
                if value.isnan() and name != "train_loss":
                    continue  # there was none in this epoch
                key = name.replace("_", "/", 1)
                self.log(key, value, prog_bar=key == "train/loss", logger=False)
                self._log_now({key: float(value)}, self.global_step - 1)
                if name == "train_loss":
                    self._check(float(value), {})

    def _check(self, loss: float, batch: dict[str, Tensor]) -> None:
        """Looks at a loss that is known anyway, the same in all processes.

        Raises:
            DivergenceError: it is not finite.
        """
        if math.isfinite(loss):
            self._finite = f"; it was {loss:.4g} at step {self.global_step}"
        elif not any(isinstance(c, _LRCallback) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            raise self._diverged(f"The loss is {loss} at step {self.global_step}{self._finite}. ", batch)

    def _diverged(self, what: str, batch: dict[str, Tensor]) -> DivergenceError:
        named = [
            *((f"the input {key!r}: look at the data", value) for key, value in batch.items()),
            *((f"the parameter {key}", value) for key, value in self.named_parameters()),
            *((f"the statistic {key}", value) for key, value in self.named_buffers() if not key.startswith("means.")),
        ]
        values = [(name, value) for name, value in named if isinstance(value, Tensor)]
        where = next((name for name, value in values if not value.isfinite().all()), "")
        if self.trainer.world_size > 1:  # it may be another process's input; all are here
            places: list[str] = [""] * self.trainer.world_size
            torch.distributed.all_gather_object(places, where)
            where = next((place for place in places if place), "")
        return DivergenceError(
            f"{what}The first thing that is not finite is {where or 'the loss itself'}. No checkpoint is made of it. What often helps: a "
            "lower --model.optimization.lr, --trainer.gradient_clip_val 1, a longer warm-up, another --trainer.precision."
        )

    def _log_now(self, metrics: dict[str, float], step: int) -> None:
        """Hands metrics to the loggers at once: Lightning would do it only after the checkpoint of the same step."""
        for logger in self.loggers:
            logger.log_metrics(metrics, step)

    def _mean(self, name: str) -> Mean:
        if name not in self.means:
            self.means[name] = Mean().to(self.device)
        return self.means[name]  # type: ignore[return-value]

    def evaluate(self, batch: dict[str, Any], stage: Stage) -> None:
        """What is done with a batch of the validation or test split: by default, its loss is logged."""
        self.log_mean(f"{stage}/loss", self.step(batch, stage), len(batch["image"]))

    def report(self, stage: Stage) -> None:
        """Logs the figures and pictures of an evaluation at its end, and resets what they were gathered in."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "val")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """See `evaluate`."""
        self.evaluate(batch, "test")

    def on_validation_epoch_end(self) -> None:
        """See `report`."""
        self.report("val")

    def on_test_epoch_end(self) -> None:
        """See `report`."""
        self.report("test")

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        """See `answers`."""
        return self.answers(batch)

    def setup(self, stage: str) -> None:
        """Chooses a strategy where that is asked for, compiles, and checks that the freezing plan fits the trainer."""
        if stage != "fit":
            return
        _ = self.architecture  # what could not be written down is told before the training
        if self.transfer == "auto":
            self._choose()
        if self.compile_backbone:
            self.backbone.compile()
            if self.compiles_features and hasattr(self.backbone, "forward_features"):
                self._compiled = torch.compile(self.backbone.forward_features)
        if self._solves:  # the head is found at the start; the loop then has one step, which changes nothing
            self.trainer.fit_loop.max_epochs = self.trainer.limit_train_batches = 1
            self.trainer.check_val_every_n_epoch, self.trainer.val_check_interval = 1, 1.0
        opens = self._opens
        if min(opens, default=0) == math.inf:
            self._freeze(len(opens))
        elif max(opens, default=0) > 0 and self.trainer.world_size > 1 and not self._finds_unused_parameters:
            raise BackboneError(
                "Unfreezing during training on several processes needs "
                "--trainer.strategy ddp_find_unused_parameters_true, or --model.optimization.frozen_epochs -1 or 0."
            )

    @property
    def _finds_unused_parameters(self) -> bool:
        return bool(getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters"))

    @property
    def plan(self) -> Optimization:
        """``optimization`` with what the strategy adds: the user's own settings stay, where the strategy has room for them."""
        plan = self.optimization
        if self.strategy == "scratch":
            return replace(plan, backbone_lr_scale=1.0, layer_decay=1.0, frozen_epochs=0)
        if self.strategy == "features":
            return replace(plan, frozen_epochs=-1)
        if self.strategy in ("finetune", "freeze_unfreeze") and plan.layer_decay == 1:
            last = max(layers(self.backbone).values(), default=0) + 1
            return replace(plan, layer_decay=FIRST_LAYER ** (1 / last))
        return plan

    @property
    def _opens(self) -> list[float]:
        """The epoch in which each layer of the backbone, from the image on, starts to learn."""
        epochs = self.plan.frozen_epochs
        if epochs == 0 and self.strategy != "freeze_unfreeze":
            return []
        count = max(layers(self.backbone, coarse=True).values(), default=-1) + 1
        if self.strategy == "freeze_unfreeze":
            whole = max(0, self.trainer.max_epochs or 0)
            return list[float](unfreezing(count, epochs or max(1, round(whole / 5)), whole))
        return [math.inf if epochs < 0 else epochs] * count

    def _freeze(self, count: int) -> None:
        """Stops the first layers of the backbone, seen from the image, from learning, and lets the others learn."""
        self.frozen, depth = count, layers(self.backbone, coarse=True)
        if self._fixed is None:
            self._fixed = {name for name, p in self.backbone.named_parameters() if not p.requires_grad}
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(depth.get(name, 0) >= count and name not in self._fixed)
        self.train(self.training)

    def train(self, mode: bool = True) -> "VisionModule":
        """Training mode, in which what is frozen of the backbone keeps its batch-norm statistics."""
        super().train(mode)
        if mode and self.frozen:
            for part in self.backbone.modules():
                parameters = list(part.parameters())
                if parameters and not any(p.requires_grad for p in parameters):
                    part.eval()
        return self

    def _follow_freezing_plan(self) -> None:
        opens = self._opens
        frozen = sum(epoch > self.current_epoch for epoch in opens)
        if frozen != self.frozen:
            self._freeze(frozen)

    def _choose(self) -> None:
        """Takes the strategy that the checkpoint to go on from was begun with, or else the one that suits the data."""
        path = self.trainer.ckpt_path
        if path is not None and os.path.isfile(path):
            self.strategy = torch.load(path, "cpu", weights_only=True, mmap=True).get("transfer")
        if self.strategy is not None:
            return
        self.to(self.trainer.strategy.root_device)
        choice = None
        if self.trainer.is_global_zero:
            choice = measure(self.backbone, self._data, self.normalize, getattr(self, "num_classes", None))
        choice = self.trainer.strategy.broadcast(choice)
        assert choice is not None
        self.strategy = choice.strategy
        self._tell("transfer", str(choice), choice.report(), {"transfer": choice.strategy, "quadrant": choice.quadrant})

    def _forget(self) -> None:
        """Gives the backbone random weights."""
        twin = untrained(self.backbone, *self._input).state_dict()
        own = self.backbone.state_dict()
        self.backbone.load_state_dict({key: twin.get(key, value) for key, value in own.items()})

    @property
    def _data(self) -> Any:
        data = getattr(self.trainer, "datamodule", None)
        if not hasattr(data, "plain_loader"):
            raise BackboneError(
                f"--model.transfer {self.transfer} looks at the data itself: give the trainer a data module of "
                "`datamodules` instead of loaders."
            )
        return data

    def solve_head(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> Solution:
        """Sets the head to what suits fixed features best; a task whose head is linear overrides it.

        Args:
            features: float32 N×D.
            labels: int64 N.
        """
        raise NotImplementedError

    @property
    def _solves(self) -> bool:
        return self.strategy == "features" and type(self).solve_head is not VisionModule.solve_head

    def _solve(self) -> None:
        """Computes the features of all training images once, each process its share, and finds the head."""
        features, labels = extract(self.backbone, self._data.plain_loader("train"), self.normalize)
        if self.trainer.world_size > 1:
            parts: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(parts, (features, labels))
            places = np.concatenate([np.arange(len(own)) * len(parts) + rank for rank, (_, own) in enumerate(parts)])
            features, labels = (np.concatenate(each)[places.argsort()] for each in zip(*parts, strict=True))
        assert labels is not None
        solution = self.solve_head(features, labels)
        self._tell("head", str(solution), f"# Head\n\n{solution}\n", {})

    def _tell(self, key: str, line: str, text: str, tags: dict[str, str]) -> None:
        """Says a line on the terminal, and hands a text and tags to the loggers that take them."""
        self.print(line)
        if self.trainer.is_global_zero:
            for logger in self.loggers:
                if hasattr(logger, "log_text"):
                    logger.log_text(key, text)
                    for name, value in tags.items():
                        logger.set_tag(name, value)  # type: ignore[attr-defined]

    def on_train_start(self) -> None:
        """Freezes, also when a training goes on in mid-epoch; takes over what a learning-rate finder found."""
        if self.lr != self._planned_lr and self.global_step == 0:  # it knows neither the schedule nor the groups' rates
            self.trainer.strategy.setup_optimizers(self.trainer)
            self._planned_before = []
        self._follow_freezing_plan()
        self._take_up()
        if self._solves:
            self._solve()

    def _take_up(self) -> None:
        """Takes up what the optimisers and schedules of a training that goes on are to do otherwise than before: the
        checkpoint has brought the old settings back."""
        before, self._planned_before = self._planned_before, []
        for config, old, new in zip(self.trainer.lr_scheduler_configs, before, self._planned, strict=False):
            if old == new:
                continue
            scheduler: Any = config.scheduler
            for group, was, now in zip(scheduler.optimizer.param_groups, old["groups"], new["groups"], strict=True):
                group["lr"] *= now["lr"] / was["lr"] if was["lr"] else 1.0
                group |= {
                    key: value for key, value in now.items() if key not in ("lr", "name") and value != was.get(key)
                }
                if "initial_lr" in group:
                    group["initial_lr"] = now["lr"]
            if hasattr(scheduler, "base_lrs"):
                scheduler.base_lrs = [group["lr"] for group in new["groups"]]
            for key, value in new["schedule"].items():
                if value != old["schedule"].get(key):
                    setattr(scheduler, key, value)
            if hasattr(scheduler, "total_steps"):  # its rate is a function of the step
                scheduler.last_epoch -= 1
                scheduler.step()
            rates = sorted({group["lr"] for group in scheduler.optimizer.param_groups})
            length = new["schedule"].get("total_steps")
            self.print(
                "The learning rate is laid out anew"
                + (f" over {length} steps instead of {old['schedule'].get('total_steps')}" if length else "")
                + f": from step {self.global_step} on it is {' to '.join(f'{rate:.4g}' for rate in {*rates[:1], *rates[-1:]})}."
            )

    def on_train_epoch_start(self) -> None:
        """Freezes or unfreezes as planned."""
        self._follow_freezing_plan()

    def on_train_batch_start(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Shows once what the network sees."""
        if self.global_step == 0 and batch_idx == 0 and self.trainer.is_global_zero:
            with self.optional("train/samples"):
                few = move_data_to_device({key: value[:32] for key, value in batch.items()}, torch.device("cpu"))
                self.show("train/samples", lambda: self.draw_samples(few))

    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        """Draws what the network is given: the images of a batch, as uint8 H×W×3, ``columns`` in a row."""
        return image_grid(batch["image"].numpy(), columns)

    def holds_gradients(self, batch_idx: int) -> bool:
        """Whether after this batch there are gradients that wait for the next one: a checkpoint does not hold them."""
        count = batch_idx + 1
        return count % self.trainer.accumulate_grad_batches != 0 and count != self.trainer.num_training_batches

    def show(self, key: str, draw: Callable[[], NDArray[np.uint8]]) -> None:
        """Hands a picture to the loggers that take pictures.

        Args:
            key: its fixed name.
            draw: makes it, uint8 H×W×3; only called where a logger wants it.
        """
        takers = [logger for logger in self.loggers if hasattr(logger, "log_image")]
        if takers and self.trainer.is_global_zero and not self.trainer.sanity_checking:
            with self.optional(key):
                image = draw()
                for logger in takers:
                    logger.log_image(key, [image], step=self.global_step)

    @contextmanager
    def optional(self, key: str) -> Iterator[None]:
        """What is only for looking at never ends a training: an error in it is reported once for each picture.

        Args:
            key: the picture's name.
        """
        try:
            yield
        except Exception as error:
            if key not in self._undrawn:
                self._undrawn.add(key)
                why = f"{type(error).__name__}: {error}"
                rank_zero_warn(f"The picture {key} could not be made ({why}). The training goes on without it.")

    def show_table(self, key: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Hands a table to the loggers that take tables."""
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            for logger in self.loggers:
                if hasattr(logger, "log_table"):
                    logger.log_table(key, columns, rows, step=self.global_step)

    def parameter_groups(self, parts: Sequence[str] = ("",)) -> list[dict[str, Any]]:
        """Parameters by learning rate and weight decay; ``lr_scale`` is the factor on the rate.

        Biases, norms and other vectors are not decayed (Bello et al. 2021, arXiv:2103.07579).

        Args:
            parts: how the names of those begin that are meant, by default of all.
        """
        plan = self.plan
        depth = layers(self.backbone) if plan.layer_decay != 1 else {}
        last = max(depth.values(), default=0) + 1
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.named_parameters():
            if not name.startswith(tuple(parts)):
                continue
            inner = name.removeprefix("backbone.")
            part, scale = "head", 1.0
            if inner != name:
                layer = depth.get(inner, last)
                part = f"backbone.{layer}" if depth else "backbone"
                scale = plan.backbone_lr_scale * plan.layer_decay ** (last - layer)
            plain = parameter.ndim <= 1
            group = groups.setdefault((part, plain), {"params": [], "lr_scale": scale, "name": part})
            if plain:
                group |= {"weight_decay": 0.0, "name": f"{part}.no_decay"}
            group["params"].append(parameter)
        return list(groups.values())

    def configure_optimizers(self) -> Any:
        """The injected optimiser and schedule, over `parameter_groups`."""
        self._planned_lr, self._planned = self.lr, []
        if self._solves:
            return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)
        return self._optimizer(self.parameter_groups(), self._total_steps)

    @property
    def _total_steps(self) -> int:
        """Steps of the whole training; 0 where its length is not known, as with ``max_epochs -1`` and ``max_time``."""
        steps = self.trainer.estimated_stepping_batches
        return max(1, int(steps)) if math.isfinite(steps) else 0

    def _optimizer(self, groups: list[dict[str, Any]], total_steps: int) -> dict[str, Any]:
        try:
            optimizer = self.optimization.optimizer(groups)
        except ValueError as error:
            raise BackboneError(f"--model.optimization.optimizer cannot be made: {error}") from None
        for group in optimizer.param_groups:
            group["lr"] = (self.lr or group["lr"]) * group.pop("lr_scale")
        make = self.optimization.lr_scheduler
        try:
            scheduler = make(optimizer, total_steps=total_steps)  # type: ignore[call-arg]
            interval = "step"
        except TypeError:
            scheduler, interval = make(optimizer), "epoch"
        except ValueError:
            if total_steps:
                raise
            raise BackboneError(
                "The schedule of the learning rate needs to know how long the training is: give --trainer.max_epochs or "
                "--trainer.max_steps, or another --model.optimization.lr_scheduler."
            ) from None
        self._planned.append(
            {
                "groups": [
                    {**_plain(group), "lr": float(group.get("initial_lr", group["lr"]))}
                    for group in optimizer.param_groups
                ],
                "schedule": {
                    key: value
                    for key, value in _plain(scheduler.state_dict()).items()
                    if key not in ("last_epoch", "base_lrs") and not key.startswith(("_last", "_step", "_is", "_get"))
                },
            }
        )
        config: dict[str, Any] = {"scheduler": scheduler, "interval": interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            config["monitor"] = getattr(scheduler, "monitor", self.monitor)
        return {"optimizer": optimizer, "lr_scheduler": config}

    def configure_callbacks(self) -> list[L.Callback]:
        """The averaging of weights, where it is asked for."""
        decay = self.optimization.ema_decay
        if decay is None:
            return []

        if self._trainer is not None and any(isinstance(c, WeightAverage) for c in self.trainer.callbacks):  # type: ignore[attr-defined]
            return []
        return [WeightAverage(decay)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Writes down which network the weights are of, and the means of the epoch so far.

        Raises:
            DivergenceError: the weights are not finite, so that there is nothing to keep.
        """
        if not all(value.isfinite().all() for value in self.parameters()):
            raise self._diverged(f"The weights are spoilt at step {self.global_step}{self._finite}. ", {})
        checkpoint["architecture"], checkpoint["transfer"] = self.architecture, self.strategy
        checkpoint["module"] = type(self).__name__
        checkpoint["planned"] = self._planned
        checkpoint["means"] = {}
        epoch: Any = self.trainer.fit_loop.epoch_progress.current
        for name, mean in self.means.items():
            if name.startswith("train_") and epoch.processed == epoch.completed:  # else the epoch is over
                with mean.sync_context():  # type: ignore[operator]
                    checkpoint["means"][name] = [float(mean.total), float(mean.weight)]  # type: ignore[arg-type]

    def check_network(self, saved: dict[str, Any]) -> None:
        """Refuses the weights of another network, or of one that has learned other classes.

        Args:
            saved: the `architecture` of the weights.

        Raises:
            BackboneError: they are.
        """
        saved, mine = upgrade(saved), self.architecture
        names, own = classes_of(saved), classes_of(mine)
        if names is not None and own is not None and names != own:
            raise BackboneError(
                f"The checkpoint is of a network that has learned other classes, or in another order: "
                f"{_shortened(names)}; here they are {_shortened(own)}. Give it the data with its own classes, or train anew "
                "in another --output; to keep what its backbone has learned, name the file as --model.backbone."
            )
        for key, value in saved.items():
            if key not in CHANGEABLE and mine.get(key) != value:
                raise BackboneError(
                    f"The checkpoint is of another network: its {key} is {value!r}, this one's is {mine.get(key)!r}. "
                    f"Give --model.{key} or --data the values that it was trained with, or choose another checkpoint."
                )

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses a checkpoint of another network.

        Raises:
            BackboneError: it is one.
        """
        self.check_network(checkpoint.get("architecture", {}))
        self._planned_before = checkpoint.get("planned", [])
        for name, (value, weight) in checkpoint.get("means", {}).items():
            mean = self._mean(name)  # in all processes, as they add theirs up by name
            mean.update(torch.tensor(0.0), 0.0)
            if weight and self.trainer.is_global_zero:  # the values are those of all together
                mean.total, mean.weight = mean.total + value, mean.weight + weight


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an optimiser's or a schedule's settings that are plain data, not state."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in settings.items()
        if key not in ("params", "initial_lr") and isinstance(value, bool | int | float | str | list | tuple)
    }
