"""Finds the largest batch that fits into a device's memory."""

from copy import deepcopy
from typing import Any
from weakref import finalize

import lightning as L
import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from datamodules import DataError, VisionDataModule
from modules import VisionModule
from modules.optimization import parameter_groups
from pipelines.engine.command import UsageError

CPU_BYTES = 4 * 2**30  # for a training step on a CPU, whose memory belongs to others too
GPU_SHARE = 0.9  # of the smallest card's memory: the allocator loses some of it between tensors


def largest_batch(trainer: L.Trainer, model: VisionModule, data: VisionDataModule) -> int:
    """The largest power of two of images that a training step of this process has the memory for.

    Steps of growing batches are made by a copy of the model, so that the training is the same as with the number given.

    Raises:
        UsageError: not even two images have room; or steps of this task or device cannot be tried.
        DataError: no batch can be made of the data.
    """
    device = trainer.strategy.root_device
    if not model.automatic_optimization:
        raise UsageError(
            "--data.batch_size auto tries steps of one network, and this task trains several against each other: give a number."
        )
    if device.type not in ("cpu", "cuda"):
        raise UsageError(
            f"--data.batch_size auto knows the memory of CPUs and CUDA devices, not of {device}: give a number."
        )
    model.prepare(data)
    data.trainer = trainer  # whose processes share a batch of people
    given, found, limit = data.batch_size, 0, _limit(device)
    peaks: list[int] = []
    refused: DataError | None = None
    size, most = 2, 2**20  # some networks cannot learn from one image
    try:
        while size <= most:
            data.batch_size = size
            try:
                loader = data.loader("train")
                most = max(2, loader.dataset.epoch_size // trainer.world_size)
                if size > most:
                    break
                batch = loader.dataset.load(next(loader.keys()))
            except DataError as error:  # of people there may have to be several pictures
                refused = error
                if found or size >= 64:
                    break
            else:
                last = peaks[-1] + 2 * (peaks[-1] - peaks[-2]) if len(peaks) > 1 else 0  # at least so many
                if last > limit:
                    break
                peaks.append(last if _linear(peaks) and device.type == "cpu" else _peak(trainer, model, batch, device))
                if peaks[-1] > limit:
                    break
                found = size
            size *= 2
    finally:
        data.batch_size = given
    if not found and not peaks and refused:
        raise refused
    if not found:
        raise UsageError(
            f"--data.batch_size auto: a step on two images takes more than {limit / 2**30:.1f} GiB, which is what there is. "
            "Take a smaller network or --data.image_size, or --model.backbone.grad_checkpointing true."
        )
    return found


def _linear(peaks: list[int]) -> bool:
    """Whether memory has begun to grow in proportion to the batch, so that the next size need not be tried."""
    if len(peaks) < 3 or peaks[-2] == peaks[-3]:
        return False
    return abs((peaks[-1] - peaks[-2]) / (peaks[-2] - peaks[-3]) - 2) < 0.1


def _limit(device: torch.device) -> int:
    """Number of bytes that a step may use."""
    if device.type == "cpu":
        return CPU_BYTES
    cards = range(torch.cuda.device_count())
    return int(GPU_SHARE * min(torch.cuda.get_device_properties(card).total_memory for card in cards))


def _peak(trainer: L.Trainer, model: VisionModule, batch: Any, device: torch.device) -> int:
    """Peak memory of one training step in bytes, network and optimiser included; 2⁶³ if it does not fit."""
    if device.type == "cpu":
        with torch.random.fork_rng([]), _Live() as live:
            _step(trainer, model, batch, device)
        return live.most
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.random.fork_rng([device]):
            _step(trainer, model, batch, device)
    except torch.OutOfMemoryError:
        return 2**63
    return torch.cuda.max_memory_reserved(device)


def _step(trainer: Any, model: VisionModule, batch: Any, device: torch.device) -> None:
    """Runs one training step on a copy of the network and discards it."""
    copy = trainer.precision_plugin.convert_module(deepcopy(model).to(device)).train()
    groups = [{key: value for key, value in group.items() if key != "lr_scale"} for group in parameter_groups(copy)]
    optimizer = copy.optimization.optimizer(groups)
    with trainer.precision_plugin.forward_context():
        loss = copy.losses(move_data_to_device(batch, device)).total
    loss.backward()
    gradients = [p.grad for p in copy.parameters() if p.grad is not None]
    _ = [gradient.clone() for gradient in gradients] if trainer.world_size > 1 else []  # DDP's buckets
    optimizer.step()


class _Live(TorchDispatchMode):
    """Counts the bytes of live tensors; ``most`` is the peak."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if (key := storage._cdata) not in self._known:
                    self._known.add(key)
                    self._now += storage.nbytes()
                    self.most = max(self.most, self._now)
                    finalize(storage, self._forget, key, storage.nbytes())
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
