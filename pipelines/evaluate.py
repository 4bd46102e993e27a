"""Measure a registered model on any data: ``python -m pipelines.evaluate models:/NAME@ALIAS --data NAME --data.root FOLDER``."""

from pathlib import Path

from mlflow.tracking import MlflowClient

from datamodules import DataError, VisionDataModule
from datamodules.options import Preprocessing
from pipelines.engine.command import command
from pipelines.engine.folders import new_folder, own_folder
from pipelines.engine.launch import stamp
from pipelines.engine.terminal import ProgressBar, print_table, say
from pipelines.serving import registry
from pipelines.serving.store import learned_from, prepared, read_description
from pipelines.tracking.logger import RunLogger


def evaluate(
    model: str, *, data: VisionDataModule | None = None, output: Path | None = None, experiment: str | None = None
) -> dict[str, float]:
    """Measures a registered model on the test split of data, in a run of its own that names the model and its training.

    Pictures become the network's input as in its training, classes go by their names, and data without splits are measured
    whole, if the model was not trained on them.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        data: what it is evaluated on; by default the data of its training.
        output: folder for pictures and tables, or where another run has it, for one of its own; by default a new one in ``outputs/evaluate``.
        experiment: MLflow experiment; by default the task's name.

    Returns:
        The figures by name.

    Raises:
        ValueError: there is no such model, or it cannot be measured on the data.
    """
    address = registry.pinned(model)
    folder = registry.model_folder(address)
    name, _, number = address.removeprefix("models:/").rpartition("/")
    version = MlflowClient().get_model_version(name, number)
    about = read_description(folder)
    data = prepared(data, Preprocessing(**about["preprocessing"])) if data else learned_from(folder)
    learned = {value for key, value in version.tags.items() if key.startswith("digest.")}
    if data.sources and data.drawn and learned.isdisjoint(source.digest for source in data.sources.values()):
        data.take_whole()
        say(f"{data.title} has no splits, and the model was not trained on it: all of it is the test split.")
    if "test" not in data.sources:
        raise DataError(f"{data.title} has no test split to measure on; it has {', '.join(data.sources)}.")
    title = f"{name}-{number}-{data.title}-{stamp()}".lower()
    output = own_folder(output, "evaluate", stamp()) if output else new_folder(Path("outputs", "evaluate", title))
    tags = {"task": about["task"], "data": data.title, "source_model": address, "evaluates": version.run_id or ""}
    logger = RunLogger(output, experiment or about["task"], title, tags)
    try:
        logger.log_data(data)
        figures = registry.evaluate(folder, data, logger=logger, callbacks=[ProgressBar()], enable_progress_bar=True)
    except BaseException as error:
        logger.finish(error)
        raise
    logger.finish()
    rows = {key: f"{value:.4f}" for key, value in figures.items()}
    print_table(f"{address} on {data.title}", rows | {"run": logger.address(), "folder": str(output)})
    return figures


if __name__ == "__main__":
    command(evaluate)
