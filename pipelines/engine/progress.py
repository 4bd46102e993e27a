"""What a training shows on the terminal: its progress bar, and a summary at its start."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from datamodules.augmentations import sides
from modules.optimization import images_a_step, rate_factor
from modules.training_data import settings_of
from pipelines.engine.terminal import say


class ProgressBar(RichProgressBar):
    """Lightning's progress bar with the most useful metrics."""

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        """Metrics at the end of the bar."""
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics

    @override
    def _get_train_description(self, current_epoch: int) -> str:
        epochs = self.trainer.max_epochs or -1
        text = f"Epoch {current_epoch + 1}{f' of {epochs}' if epochs > 0 else ''}"  # Lightning counts from zero
        return f"{text:{len(self.validation_description)}}"


FEW_STEPS = 100  # of a whole training


def _images(count: int) -> str:
    return f"{count} image{'s' * (count != 1)}"


def _batches(counts: Sequence[int | float], split: str) -> str:
    return f"{sum(counts):,} batch{'es' * (sum(counts) != 1)} of the {split} split"


class Summary(L.Callback):
    """Prints a summary when a training or evaluation starts: data, device, batches and steps."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises the training ahead, also when it resumes."""
        steps = -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
        total = trainer.estimated_stepping_batches
        ahead = f"{steps:,} step{'s' * (steps != 1)} an epoch" + (
            f", {total:,} in all" if total != float("inf") else ""
        )
        done = f"{', of which' if total != float('inf') else ';'} {trainer.global_step:,} are done"
        self._say(trainer, ahead + done * bool(trainer.global_step))
        module: Any = pl_module
        asked: Any = trainer
        share = asked.limit_train_batches  # 1 is one batch, 1.0 is all of them
        whole = isinstance(share, float) and share == 1 and not asked.overfit_batches and asked.max_steps < 0
        if (
            total < FEW_STEPS
            and whole
            and "val/accuracy" in module.monitor
            and module.transfer not in ("features", "auto")
        ):
            say(
                "These are few steps, after which a network has seldom learned much: give more --trainer.max_epochs or a smaller "
                "--data.batch_size; or start from learned weights without any, with --model.backbone.pretrained true "
                "--model.backbone.transfer features."
            )
        if stated := module.optimization.lr_batch_size:
            rate = max(group.get("initial_lr", group["lr"]) for group in trainer.optimizers[0].param_groups)
            say(
                f"Learning rate: {rate:.4g} for {images_a_step(module):,} images a step, stated as {rate / rate_factor(module):.4g} "
                f"for {stated:,}."
            )

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises a stand-alone evaluation on the validation split."""
        if trainer.state.fn == TrainerFn.VALIDATING and not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, _batches(trainer.num_val_batches, "validation"))

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Summarises a stand-alone evaluation on the test split."""
        if not trainer.fit_loop.epoch_progress.current.ready:
            self._say(trainer, _batches(trainer.num_test_batches, "test"))

    @staticmethod
    def _say(trainer: L.Trainer, ahead: str) -> None:
        data: Any = settings_of(trainer).datamodule
        parts = [data.extent]
        if len(names := [*getattr(data, "label_names", [])]) > 1:
            shown = ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
            parts.append(f"{len(names)} {data.labels_are} ({shown})" + _extremes(names, data.class_counts))
        height, width = sides(data.image_size)
        pixels = "" if data.preprocessing.numbers else f"{height} × {width} pixels, "
        parts.append(f"{pixels}{data.in_chans} channel{'s' * (data.in_chans > 1)}")
        if data.bad_files:
            parts.append(f"{len(data.bad_files)} unreadable files left out, the first {min(data.bad_files)}")
        say(f"Data: {data.title}: {'; '.join(parts)}.")
        device = trainer.strategy.root_device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        network: Any = trainer.lightning_module
        weights = sum(parameter.numel() for parameter in network.parameters())
        say(f"Network: {network.backbone.recipe['backbone']}; {weights:,} parameters in all.")
        processes = f"{trainer.world_size} processes on {kind}" if trainer.world_size > 1 else f"on {kind}"
        say(f"{processes[0].upper()}{processes[1:]}: {ahead}, {_images(data.batch_size * trainer.world_size)} a batch.")
        if device.type == "cpu" and str(trainer.precision).startswith("bf16") and not has_bfloat16():
            say(
                f"This processor has no instructions for bfloat16: --trainer.precision {trainer.precision} takes several times as "
                "long here as 32, which is the default."
            )


def has_bfloat16() -> bool:
    """Whether the processor computes with bfloat16 itself; what this torch cannot tell counts as yes."""
    tells = getattr(torch.cpu, "get_capabilities", None)  # an older torch lacks it
    known = {"bf16": True} if tells is None else tells()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def _extremes(names: list[str], counts: list[int]) -> str:
    """The classes with the fewest and the most training images."""
    if len(set(counts)) < 2:
        return f", {counts[0]:,} images to train on of each" if counts else ""
    (least, rarest), *_, (most, commonest) = sorted(zip(counts, names, strict=True))
    return f", from {least:,} images of {rarest} to {most:,} of {commonest} to train on"
