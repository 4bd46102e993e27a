"""The average of a training's best checkpoints, kept if it validates better than the best one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, cast

import lightning as L
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from datamodules import VisionDataModule
from modules import VisionModule
from modules.checkpoints import read_checkpoint
from pipelines.engine.checkpoint import BestCheckpoint, KeptCheckpoints, WholeCheckpoints

Average = Literal["none", "uniform", "greedy"]
Weights = dict[str, Tensor]
WITHOUT = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "current_model_state", "averaging_state")


def average_best(
    trainer: L.Trainer,
    module: VisionModule,
    data: VisionDataModule,
    kept: KeptCheckpoints,
    best: BestCheckpoint,
    way: Literal["uniform", "greedy"],
) -> tuple[Path | None, str]:
    """Averages the best checkpoints of a training (Wortsman et al. 2022, arXiv:2203.05482), and writes ``average.ckpt`` beside
    ``best.ckpt`` if the average is better in validation.

    Batch norms learn the statistics of the average anew, on the images to train on as they are.

    Args:
        trainer: Lightning's, whose training has ended.
        module: what learned; it then has any of the weights.
        data: what it learned from.
        kept: the checkpoints.
        best: what judged them.
        way: ``uniform``, the mean of all; ``greedy``, from the best on each is added to the mean that does not make it worse.

    Returns:
        The file, or None where the average is not better; and what is to be told of it.
    """
    average = kept.folder.parent / "average.ckpt"
    if trainer.is_global_zero:
        average.unlink(missing_ok=True)  # of a shorter training
    files = {each: rank for each, rank in kept.files.items() if each.exists()}  # a user may have removed one
    if len(files) < 2:
        return None, f"no average: {('none', 'one')[len(files)]} of the best validations is kept, and it takes two"
    checkpoint = read_checkpoint(next(iter(files)))
    weights = {file: read_checkpoint(file)["state_dict"] for file in files}
    sign = 1 if best.mode == "max" else -1
    alone = max(*files.values(), (sign * float(cast(Tensor, best.best_model_score)), -best._loss))
    if way == "uniform":
        used, found = [*files], _measured(trainer, module, data, best, [*weights.values()])
    else:
        used, found = [next(iter(files))], alone
        for file in [*files][1:]:
            rank = _measured(trainer, module, data, best, [weights[each] for each in (*used, file)])
            if rank >= found:
                used, found = [*used, file], rank
    said = f"{len(used)} of {len(files)} checkpoints, {best.monitor} {sign * found[0]:.4f}, {sign * alone[0]:.4f} for the best alone"
    if len(used) < 2 or not found > alone:
        return None, f"no: {said}; the best alone is kept"
    _take(trainer, module, data, [weights[each] for each in used])
    if trainer.is_global_zero:
        rest = {key: value for key, value in checkpoint.items() if key not in WITHOUT}
        WholeCheckpoints().save_checkpoint(rest | {"state_dict": module.state_dict()}, average)
    trainer.strategy.barrier()
    trainer.validate(module, datamodule=data, ckpt_path=average, verbose=False, weights_only=True)  # of the record, too
    return average, said


def mean_of(weights: Sequence[Mapping[str, Tensor]]) -> Weights:
    """Averages the weights of several networks by name; integer buffers, such as counters, are the first network's."""
    return {
        name: torch.stack([one[name].double() for one in weights]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in weights[0].items()
    }


def _measured(
    trainer: L.Trainer, module: VisionModule, data: VisionDataModule, best: BestCheckpoint, weights: Sequence[Weights]
) -> tuple[float, float]:
    """Validates the average of some weights, without recording the result."""
    _take(trainer, module, data, weights)
    with unrecorded(trainer):
        trainer.validate(module, datamodule=data, verbose=False)
    rank: tuple[float, float] = trainer.strategy.broadcast(best.rank(trainer))
    return rank


@contextmanager
def unrecorded(trainer: L.Trainer) -> Iterator[None]:
    """Keeps an evaluation from the run's record."""
    loggers, trainer.loggers = trainer.loggers, []
    try:
        yield
    finally:
        trainer.loggers = loggers


@torch.no_grad()
def _take(trainer: L.Trainer, module: VisionModule, data: VisionDataModule, weights: Sequence[Weights]) -> None:
    """Loads averaged weights into a module and recomputes the batch-norm statistics where the networks differ in
    them."""
    module.load_state_dict(mean_of(weights))
    module.to(trainer.strategy.root_device).eval()
    norms = [
        (norm, norm.momentum)
        for name, norm in module.named_modules()
        if isinstance(norm, _BatchNorm) and norm.running_mean is not None
        and any(not torch.equal(one[f"{name}.running_mean"], weights[0][f"{name}.running_mean"]) for one in weights[1:])
    ]  # fmt: skip
    if not norms:
        return
    for norm, _ in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in data.plain_loader("train", shared=False):  # the same in each process
        given = [batch[key].to(module.device) for key in ("image", "length") if key in batch]
        with trainer.precision_plugin.forward_context():
            module(*given)
    for norm, momentum in norms:
        norm.momentum = momentum
        norm.eval()
