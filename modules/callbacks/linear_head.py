"""Closed-form linear heads: a linear support vector machine on frozen features."""

from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from typing_extensions import override

from modules.networks.features import extract
from modules.training_data import training_data

if TYPE_CHECKING:
    from modules.base import VisionModule
    from modules.callbacks.support_vectors import Solution


def known_features(
    module: "VisionModule", split: str, most: int | None = None
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Extracts the backbone's features of labelled images, without augmentation; the same in all processes.

    Args:
        module: a module whose trainer has a data module.
        split: name of the split.
        most: maximum number of images; None for all.

    Returns:
        Pooled features, fused with the tabular inputs if the module has any, float32 N×D, and the labels, int64 N.
    """
    trainer = module.trainer
    loader = training_data(trainer).plain_loader(split, most)  # each process loads its share
    features, labels = extract(module.backbone, loader, module.normalize, getattr(module, "fusion", None))
    if trainer.world_size > 1:
        parts: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(parts, (features, labels))
        places = np.concatenate([np.arange(len(own)) * len(parts) + rank for rank, (_, own) in enumerate(parts)])
        features, labels = (np.concatenate(each)[places.argsort()] for each in zip(*parts, strict=True))
    assert labels is not None
    return features, labels


@runtime_checkable
class LinearTask(Protocol):
    """A task whose head is one linear layer on the backbone's features."""

    strategy: str | None

    def solve_head(self, features: NDArray[np.float32], labels: NDArray[np.int64]) -> "Solution":
        """Sets the head to the solution for fixed features.

        Args:
            features: float32 N×D.
            labels: int64 N.
        """


def solved(module: Any) -> bool:
    """Whether a module's head is solved for instead of trained."""
    return isinstance(module, LinearTask) and module.strategy == "features"


class LinearHead(L.Callback):
    """Solves for a linear head before the first step if the backbone's features are frozen. The training then has a
    single step, which changes no weights."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and solved(pl_module):
            trainer.fit_loop.max_epochs = trainer.limit_train_batches = 1
            trainer.check_val_every_n_epoch, trainer.val_check_interval = 1, 1.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not solved(pl_module):
            return
        module = cast("VisionModule", pl_module)
        features, labels = known_features(module, "train")
        solution = cast(LinearTask, module).solve_head(features, labels)
        module.print(solution)
        module.publisher.text(trainer, "head", f"# Head\n\n{solution}\n")
