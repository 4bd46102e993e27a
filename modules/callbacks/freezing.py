"""Freezing and gradual unfreezing of a backbone's layers."""

import math
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import torch
from torch import nn
from typing_extensions import override

from modules.networks import BackboneError
from modules.training_data import Batch

if TYPE_CHECKING:
    from modules.base import VisionModule

FIRST_LAYER = 0.1  # learning rate of the first layer relative to the head, if a strategy sets the decay


def layers(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """Returns the layer index of each backbone parameter by name; 0 is the layer nearest to the image.

    Args:
        backbone: a network of `create_backbone`, with or without ``features_only``.
        coarse: count stages, if the architecture has them, instead of blocks.
    """
    from timm.models._manipulate import flatten_modules, group_parameters

    inner: Any = getattr(backbone, "model", None) if not hasattr(backbone, "group_matcher") else backbone
    if hasattr(inner, "group_matcher"):
        prefix = "" if inner is backbone else "model."
        found = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        return {prefix + name: int(layer) for name, layer in found.items()}
    parts = flatten_modules(backbone.named_children(), depth=1, module_types="container")
    named = {name: [f"{name}.{key}" for key, _ in part.named_parameters()] for name, part in parts}
    filled = [keys for keys in named.values() if keys]
    return {key: layer for layer, keys in enumerate(filled) for key in keys}


def unfreezing(count: int, head_epochs: int, epochs: int) -> list[int]:
    """Returns the epoch in which each layer is unfrozen: after the head's epochs the last layer, then one after the
    other from the top down, all before half of the training is over (Howard & Ruder 2018, arXiv:1801.06146).

    Args:
        count: number of layers.
        head_epochs: epochs in which only the head is trained.
        epochs: epochs of the whole training; 0 if unknown, which unfreezes one layer per epoch.

    Returns:
        Zero-based epoch of each layer; the first entry is the layer nearest to the image.
    """
    span = max(0, -(-epochs // 2) - head_epochs) if epochs else count
    return [head_epochs + span * (count - 1 - layer) // count for layer in range(count)]


def freeze_unlearned(module: "VisionModule", batch: Batch) -> None:
    """Freezes the layers of a module's backbone, in place, that the loss of a batch does not depend on, such as GoogLeNet's
    auxiliary classifiers in regression: DDP expects a gradient for all others. A copy makes the step.

    Args:
        module: the module being trained.
        batch: at least two samples.
    """
    twin = deepcopy(module).train()
    if not any(parameter.requires_grad for parameter in twin.backbone.parameters()):
        return
    with torch.random.fork_rng([]):
        twin.losses(batch).total.backward()
    for parameter, tried in zip(module.backbone.parameters(), twin.backbone.parameters(), strict=True):
        parameter.requires_grad_(tried.grad is not None)


class Freezing(L.Callback):
    """Unfreezes each layer of the backbone in the epoch that the module's ``plan`` and ``strategy`` set, also when a
    training resumes in mid-epoch. Frozen layers are in evaluation mode: their batch-norm statistics do not change."""

    def __init__(self) -> None:
        self.frozen = 0  # number of frozen layers, counted from the image
        self._fixed: set[str] | None = None  # parameters that are never trained

    @staticmethod
    def opens(module: "VisionModule", epochs: int | None) -> list[float]:
        """Returns the epoch in which each backbone layer, counted from the image, is unfrozen; empty if none is ever
        frozen.

        Args:
            module: the module being trained.
            epochs: epochs of the whole training; None or -1 if unknown.
        """
        head = module.plan.frozen_epochs
        if head == 0 and module.strategy != "freeze_unfreeze":
            return []
        count = max(layers(module.backbone, coarse=True).values(), default=-1) + 1
        if module.strategy == "freeze_unfreeze":
            whole = max(0, epochs or 0)
            return [*map(float, unfreezing(count, head or max(1, round(whole / 5)), whole))]
        return [math.inf if head < 0 else head] * count

    def freeze(self, backbone: nn.Module, count: int, training: bool = True) -> None:
        """Freezes the first layers of a backbone, counted from the image, and unfreezes the others."""
        self.frozen, depth = count, layers(backbone, coarse=True)
        if self._fixed is None:
            self._fixed = {name for name, p in backbone.named_parameters() if not p.requires_grad}
        for name, parameter in backbone.named_parameters():
            parameter.requires_grad_(depth.get(name, 0) >= count and name not in self._fixed)
        backbone.train(training)
        if count:
            self._rest(backbone)

    @staticmethod
    def _rest(backbone: nn.Module) -> None:
        """Puts frozen parts into evaluation mode."""
        for part in backbone.modules():
            parameters = list(part.parameters())
            if parameters and not any(p.requires_grad for p in parameters):
                part.eval()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        module = cast("VisionModule", pl_module)
        opens = self.opens(module, trainer.max_epochs)
        if trainer.world_size == 1:  # also for the learning-rate and batch-size finders, which run without callbacks
            self._follow(trainer, module)
        elif min(opens, default=0) == math.inf:  # DDP has to know this in advance
            self.freeze(module.backbone, len(opens), module.training)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Checks that the unfreezing schedule works with the trainer's strategy.

        Raises:
            BackboneError: layers are unfrozen later, but DDP does not expect parameters without gradients.
        """
        later = [
            epoch for epoch in self.opens(cast("VisionModule", pl_module), trainer.max_epochs) if 0 < epoch < math.inf
        ]
        settings = getattr(trainer.strategy, "_ddp_kwargs", {})  # of DDP
        if later and trainer.world_size > 1 and not settings.get("find_unused_parameters"):
            raise BackboneError(
                "Unfreezing during training on several processes needs "
                "--trainer.strategy ddp_find_unused_parameters_true, or --model.optimization.frozen_epochs -1 or 0."
            )

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._follow(trainer, cast("VisionModule", pl_module))

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._follow(trainer, cast("VisionModule", pl_module))

    def _follow(self, trainer: L.Trainer, module: "VisionModule") -> None:
        frozen = sum(epoch > trainer.current_epoch for epoch in self.opens(module, trainer.max_epochs))
        if frozen != self.frozen:
            self.freeze(module.backbone, frozen, module.training)
        elif frozen:  # an evaluation, for example, may have put it back into training mode
            self._rest(module.backbone)
