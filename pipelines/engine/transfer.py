"""``--model.backbone.transfer auto`` by measurement: the head on fixed features beside the whole training."""

import lightning as L
from lightning.pytorch.utilities.seed import isolate_rng
from typing_extensions import override

from datamodules import VisionDataModule
from modules import VisionModule
from modules.callbacks.linear_head import LinearTask, known_features
from modules.callbacks.transfer import Choice, chosen
from modules.training_data import settings_of
from pipelines.engine.averaging import unrecorded
from pipelines.engine.checkpoint import BestCheckpoint
from pipelines.engine.progress import ProgressBar
from pipelines.engine.terminal import say

SOLVED = 1_000_000  # images times classes up to which a head is fitted


class _Solve(L.Callback):
    """Measures the data and fits the head before a validation."""

    choice: Choice

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        module = pl_module
        assert isinstance(module, VisionModule)
        assert isinstance(module, LinearTask)
        self.choice = chosen(trainer, module)
        module.print(module.solve_head(*known_features(module, "train")))


def judge_features(trainer: L.Trainer, module: VisionModule, data: VisionDataModule, best: BestCheckpoint) -> None:
    """Fits the head to the fixed features of a new training and validates it: it is ``best.ckpt`` until the training,
    which then is that of ``finetune``, finds better weights; with too many images for a head, there is the training alone.
    Does nothing if the strategy is not to be chosen, or without a head that can be fitted; `TransferChoice` then chooses by
    the data alone.

    Args:
        trainer: Lightning's, before the training.
        module: what is to learn; its weights are the same afterwards.
        data: what it learns from.
        best: judges validations.
    """
    if module.transfer != "auto" or not isinstance(module, LinearTask) or trainer.limit_val_batches == 0:
        return
    if (count := len(data.sources["train"])) * module.num_classes > SOLVED:
        module.strategy = "finetune"
        say(f"Transfer: finetune. {count:,} images of {module.num_classes:,} classes are too many to fit a head to.")
        module.publisher.tags(trainer, {"transfer": "finetune"})
        return
    fresh = {name: value.clone() for name, value in module.head.state_dict().items()}
    settings, solve = settings_of(trainer), _Solve()
    callbacks = settings.callbacks
    settings.callbacks = [each for each in callbacks if isinstance(each, ProgressBar)] + [solve]
    trainer.validate_loop.inference_mode = False  # the states of metrics that begin here are used in the training
    try:
        with isolate_rng(), unrecorded(trainer):
            trainer.validate(module, datamodule=data, verbose=False)
    finally:
        settings.callbacks = callbacks
    module.strategy = "finetune"
    best.judge_first(trainer)
    module.head.load_state_dict(fresh)
    figures = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    for logger in trainer.loggers:
        logger.log_metrics(figures, -1)  # the first step's are of step 0
    choice, monitor = solve.choice, best.monitor
    found = f"The head on fixed features has {monitor} {best.first:.4f}"
    say(
        f"Transfer: {choice.quadrant}, where {choice.strategy} is expected to be the better. {found}. Now all layers learn; what is "
        "better in validation is kept."
    )
    tags = {"transfer": "auto", "quadrant": choice.quadrant}
    module.publisher.text(
        trainer, "transfer", f"# Measured\n\n{found}, before all layers learn.\n\n#{choice.report()}", tags
    )


def better(trainer: L.Trainer, module: VisionModule, best: BestCheckpoint) -> str | None:
    """Tags the run with the strategy whose weights are the best, and returns what is to be told of it; None where there was
    none to choose; see `judge_features`."""
    if best.first is None:
        return None
    strategy = "features" if best.is_first else "finetune"
    module.publisher.tags(trainer, {"transfer": strategy})
    after = "none" if best.trained is None else f"{best.trained:.4f}"
    return (
        f"{strategy}; {best.monitor} {best.first:.4f} with the head on fixed features, {after} with all layers trained"
    )
