"""The trainer behind the command line."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import LearningRateFinder
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.plugins.layer_sync import LayerSync, TorchSyncBatchNorm
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from datamodules import VisionDataModule
from datamodules.loading import collate
from modules import VisionModule
from pipelines.engine.checkpoint import WholeCheckpoints
from pipelines.engine.command import UsageError
from pipelines.engine.disk import write_image
from pipelines.engine.loops import _EpochLoop, _FitLoop
from pipelines.engine.signals import Signals
from pipelines.engine.splitting import SplitStrategy, check_whole
from pipelines.engine.terminal import say


class VisionTrainer(L.Trainer):
    """Lightning's trainer with exactly resumable checkpoints and a preview of the training samples."""

    # Lightning's own compares two texts in small letters, twenty times a step.
    training = property(lambda self: self.state.stage is RunningStage.TRAINING, L.Trainer.training.fset)  # type: ignore[attr-defined]

    def __init__(
        self,
        *args: Any,
        # Lightning's `Optional[Union[int, float]]` is one object with the other order, whichever library said it first: 1 would
        # be read as 1.0, which is all batches.
        limit_train_batches: int | float | None = None,
        limit_val_batches: int | float | None = None,
        limit_test_batches: int | float | None = None,
        limit_predict_batches: int | float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            limit_train_batches=limit_train_batches,
            limit_val_batches=limit_val_batches,
            limit_test_batches=limit_test_batches,
            limit_predict_batches=limit_predict_batches,
            **kwargs,
        )
        self._signal_connector = Signals(self)
        plain = self.fit_loop
        self.fit_loop = _FitLoop(self, plain.min_epochs, plain.max_epochs)
        self.fit_loop.epoch_loop = _EpochLoop(self, plain.min_steps, plain.max_steps)
        strategy: Any = self.strategy
        if type(getattr(strategy, "_layer_sync", None)) is TorchSyncBatchNorm:
            if self.world_size > 1 and strategy.root_device.type == "cpu":
                raise UsageError(
                    "--trainer.sync_batchnorm true: torch has no batch normalisation over several processes on CPUs. Leave it out, or "
                    "train on GPUs."
                )
            strategy._layer_sync = SyncedNorms()
        check_whole(strategy)
        if isinstance(strategy, SplitStrategy):
            self.fit_loop.epoch_loop.val_loop.inference_mode = False  # weights put together there are trained with
        # Not where a plugin of the user's writes checkpoints.
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = WholeCheckpoints()

    def preview(self, model: VisionModule, datamodule: VisionDataModule, images: int = 8, draws: int = 7) -> Path:
        """Draws a sheet of training samples: unchanged, and after each of several random augmentations.

        Args:
            model: draws the samples of its task.
            datamodule: has them.
            images: samples, a row each.
            draws: augmentations of each.

        Returns:
            The file ``preview.png`` in the output folder.
        """
        from pipelines.tracking.logger import RunLogger

        model.prepare(datamodule)
        source = datamodule.sources["train"]
        chosen = np.linspace(0, len(source) - 1, min(images, len(source))).astype(int).tolist()
        plain, augmented = (datamodule.dataset("train", t) for t in (False, True))
        samples = [sample for i in chosen for sample in (plain[i, 0], *(augmented[i, epoch] for epoch in range(draws)))]
        sheet = model.draw_samples(collate(samples), columns=draws + 1)
        for logger in self.loggers:
            if isinstance(logger, RunLogger):
                logger.log_image("train/preview", [sheet])
        file = Path(self.default_root_dir, "preview.png")
        write_image(file, sheet)
        return file


class SyncedNorms(LayerSync):
    """Synchronises batch normalisation over all processes. Lightning's own plugin drops the activations in timm's norm
    layers and does not restore the layers after training."""

    def __init__(self) -> None:
        self.own: dict[str, nn.Module] = {}

    @override
    def apply(self, model: nn.Module) -> nn.Module:
        from timm.layers import convert_sync_batchnorm

        self.own = {name: layer for name, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
        synced = convert_sync_batchnorm(model)
        for name, layer in self.own.items():
            synced.get_submodule(name)._forward_pre_hooks.update(layer._forward_pre_hooks)  # of gradient checkpointing
        return synced

    @override
    def revert(self, model: nn.Module) -> nn.Module:
        for name, layer in self.own.items():
            synced = model.get_submodule(name)
            layer._parameters, layer._buffers = synced._parameters, synced._buffers
            model.set_submodule(name, layer.train(synced.training))
        return model


class RateFinder(LearningRateFinder):
    """Lightning's learning-rate finder. It also covers all rates if the training has fewer steps, and reports its
    result. Arguments as Lightning's.
    """

    @classmethod
    def like(cls, other: LearningRateFinder) -> "RateFinder":
        """Copies the settings of Lightning's finder.

        Raises:
            UsageError: there are no rates to try.
        """
        twin = cls()
        vars(twin).update(vars(other))
        if not 0 < twin._min_lr < twin._max_lr or twin._num_training_steps < 1:
            raise UsageError(
                f"LearningRateFinder tries rates from min_lr {twin._min_lr} to max_lr {twin._max_lr} in num_training_steps "
                f"{twin._num_training_steps}: give a min_lr above 0, a greater max_lr, and at least one step."
            )
        return twin

    def lr_find(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tries all rates over as many epochs as needed, without validation."""
        loop, epochs, every = trainer.fit_loop, trainer.fit_loop.max_epochs, trainer.check_val_every_n_epoch
        loop.max_epochs, trainer.check_val_every_n_epoch = -1, every and sys.maxsize
        try:
            super().lr_find(trainer, pl_module)
        finally:
            loop.max_epochs, trainer.check_val_every_n_epoch = epochs, every
        loop._combined_loader = None  # the data may plan by the number of epochs
        loop.setup_data()
        found = self.optimal_lr and self.optimal_lr.suggestion()
        steps = len(self.optimal_lr.results["lr"]) if self.optimal_lr else 0
        if found:
            say(f"LearningRateFinder chooses a rate of {found:.3g}, found in {steps} steps.")
        else:
            say(f"LearningRateFinder found no rate in {steps} steps: --model.optimization.lr stays as it is.")
