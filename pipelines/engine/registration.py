"""Registration of a training's best weights, once, and without harm to the training where MLflow does not answer."""

from pathlib import Path
from typing import Any

import torch
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from datamodules import VisionDataModule
from modules import VisionModule
from pipelines.serving import registry
from pipelines.tracking.journal import RunGoneError
from pipelines.tracking.logger import RunLogger
from pipelines.tracking.redaction import redact


def register_best(
    name: str,
    output: Path,
    model: VisionModule,
    datamodule: VisionDataModule,
    data: dict[str, Any],
    task: str,
    logger: RunLogger,
    figures: dict[str, float],
) -> str:
    """Registers the best weights of a training.

    Args:
        name: under which.
        output: folder of the training.
        model: with the best weights.
        datamodule: what it learned from.
        data: the recipe of the latter.
        task: name of the task.
        logger: of the run.
        figures: what was measured.

    Returns:
        The registered model's address, or why there is none.
    """
    client, step = (
        MlflowClient(),
        str(torch.load(output / "best.ckpt", "cpu", weights_only=True, mmap=True)["global_step"]),
    )
    try:
        if not logger.flush():
            error = logger.journal.error
            raise ConnectionError(str(error) if isinstance(error, RunGoneError) else "MLflow does not answer.")
        known = [version for version in registry.versions_of(name) if version.run_id == logger.run_id]
        there = [version for version in known if version.tags.get("step") == step]  # it was registered before
        version = there[0] if there else registry.register(
            name, model, datamodule, data, task, str(logger.run_id), figures
        )  # fmt: skip
        client.set_model_version_tag(name, version.version, "step", step)  # last, so that all of it is there
    except (MlflowException, OSError) as error:
        logger.set_tag("registered", f"no: {error}")
        return (
            f"no: {redact(str(error))[:300]} To register it, give the same command again with "
            f"--output {output}: it does not train again what is trained."
        )
    address = f"models:/{version.name}/{version.version}"
    logger.set_tag("registered", address)
    return address
