"""A version of a registered model, and the run of what is done with it: evaluation or audit."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient

from datamodules import VisionDataModule
from datamodules.options import Preprocessing
from pipelines.engine.folders import new_folder, own_folder
from pipelines.engine.launch import stamp
from pipelines.serving.registry import model_folder, pinned
from pipelines.serving.store import learned_from, prepared, read_description
from pipelines.tracking.logger import RunLogger


@dataclass(frozen=True)
class Subject:
    """A version of a registered model.

    Args:
        address: ``models:/name/version``.
        folder: what `save_model` wrote of it.
        about: see `read_description`.
        version: what the registry has of it.
    """

    address: str
    folder: Path
    about: dict[str, Any]
    version: ModelVersion

    @classmethod
    def find(cls, model: str) -> "Subject":
        """Looks up ``models:/name@alias`` or ``models:/name/version``.

        Raises:
            ValueError: there is no such model.
        """
        address = pinned(model)
        folder = model_folder(address)
        name, _, number = address.removeprefix("models:/").rpartition("/")
        return cls(address, folder, read_description(folder), MlflowClient().get_model_version(name, number))

    @property
    def preprocessing(self) -> Preprocessing:
        """Preprocessing of its inputs."""
        return Preprocessing(**self.about["preprocessing"])

    @property
    def place(self) -> dict[str, Any]:
        """Settings of the data that it was trained on."""
        return (self.about.get("data") or {}).get("init_args") or {}

    @property
    def digests(self) -> set[str]:
        """Digests of their splits, as far as the registry tells."""
        return {value for key, value in self.version.tags.items() if key.startswith("digest.")}

    def prepare(self, data: VisionDataModule | None) -> VisionDataModule:
        """A data set with the preprocessing of its training; by default the one it was trained on.

        Raises:
            ValueError: they cannot.
        """
        return prepared(data, self.preprocessing) if data else learned_from(self.folder, self.folder)

    @contextmanager
    def run(
        self,
        verb: str,
        data: VisionDataModule,
        output: Path | None,
        experiment: str | None,
        more: dict[str, str] | None = None,
    ) -> Iterator[RunLogger]:
        """A new run, linked to the version by the tag ``source_model`` and to its training by ``evaluates`` or a
        similar tag.

        Args:
            verb: what is done, such as ``evaluate``.
            data: with what.
            output: the run's folder; by default a new one in ``outputs``, named by the verb.
            experiment: MLflow experiment; by default the task's name.
            more: tags of the run.
        """
        now, task = stamp(), self.about["task"]
        title = f"{self.version.name}-{self.version.version}-{data.title}-{now}".lower()
        output = own_folder(output, verb, now) if output else new_folder(Path("outputs", verb, title))
        tags = {"task": task, "data": data.title, "source_model": self.address, f"{verb}s": self.version.run_id or ""}
        tags |= more or {}
        logger = RunLogger(output, experiment or task, title, tags)
        try:
            logger.log_data(data)
            yield logger
        except BaseException as error:
            logger.finish(error)
            raise
        logger.finish()
