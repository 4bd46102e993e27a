"""Evaluates a registered model on any data: ``python -m pipelines.evaluate models:/NAME@ALIAS --data NAME --data.root
FOLDER``."""

from pathlib import Path

from datamodules import VisionDataModule
from modules.ranges import Mirroring
from pipelines.engine.command import command
from pipelines.engine.terminal import print_table


def evaluate(
    model: str,
    *,
    data: VisionDataModule | None = None,
    output: Path | None = None,
    experiment: str | None = None,
    tta: Mirroring = "none",
) -> dict[str, float]:
    """Evaluates a registered model on the test split of a data set, in a new run that is linked to the model and its
    training.

    Pictures become the network's input as in its training, classes go by their names, and data without splits are measured
    whole, if the model was not trained on them.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        data: the data set to evaluate on; by default the model's training data.
        output: folder for pictures and tables; if it belongs to another run, a new folder inside it. By default a new one in
            ``outputs/evaluate``.
        experiment: MLflow experiment; by default the task's name.
        tta: test-time augmentation: predictions are averaged over the picture and its mirror image (``flip``), and also over
            both upside down (``flips``).

    Returns:
        The metrics by name.

    Raises:
        ValueError: there is no such model, or it cannot be evaluated on the data.
    """
    from datamodules import DataError
    from pipelines.engine.evaluation import take_unseen
    from pipelines.engine.progress import ProgressBar
    from pipelines.serving import evaluation
    from pipelines.serving.subject import Subject

    subject = Subject.find(model)
    data = subject.prepare(data)
    take_unseen(data, subject)
    if "test" not in data.sources:
        raise DataError(f"{data.title} has no test split to measure on; it has {', '.join(data.sources)}.")
    module = evaluation.fitted_to(subject.folder, data, tta)
    with subject.run("evaluate", data, output, experiment, {"tta": tta}) as logger:
        options = {"logger": logger, "callbacks": [ProgressBar()], "enable_progress_bar": True}
        figures = evaluation.measured(module, data, **options)
    rows = {key: f"{value:.4f}" for key, value in figures.items()}
    print_table(f"{subject.address} on {data.title}", rows | {"run": logger.address(), "folder": str(logger.output)})
    return figures


if __name__ == "__main__":
    command(evaluate)
