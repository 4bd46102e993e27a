"""Evaluation of saved models on a test split."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.ranges import Mirroring

if TYPE_CHECKING:
    from datamodules import VisionDataModule
    from modules import VisionModule


def evaluate(
    folder: Path, data: "VisionDataModule | None" = None, tta: Mirroring = "none", **options: Any
) -> dict[str, float]:
    """Evaluates a saved model on the test split of its training data.

    Args:
        folder: a folder that `save_model` wrote.
        data: a data set other than the training data.
        tta: see `modules.views.Views`.
        options: options of Lightning's trainer, such as ``logger``.

    Returns:
        The metrics by name.

    Raises:
        ValueError: the model does not state its training data, or the data are of another task.
    """
    from pipelines.serving.store import learned_from

    data = data or learned_from(folder, folder)
    return measured(fitted_to(folder, data, tta), data, **options)


def fitted_to(folder: Path, data: "VisionDataModule", tta: Mirroring = "none") -> "VisionModule":
    """A saved model to be evaluated on a data set, whose classes it adopts; see `evaluate`."""
    from datamodules.classes import adopt_classes
    from modules.checkpoints import classes_of
    from pipelines.serving.store import lacking_in, load_model

    module, _ = load_model(folder)
    module.views.choose(tta)
    if lacking := lacking_in(data, module):
        raise ValueError(
            f"{data.title} does not fit a {type(module).__name__}: its samples have no {lacking}. Give data of the task that "
            "the model has learned."
        )
    if names := classes_of(module.architecture):
        adopt_classes(data, names)
    return module


def measured(module: "VisionModule", data: "VisionDataModule", **options: Any) -> dict[str, float]:
    """Metrics of a module on the test split; see `evaluate`."""
    import lightning as L

    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**quiet | options, use_distributed_sampler=False)
    (figures,) = trainer.test(module, datamodule=data, verbose=False)
    return dict(figures)
