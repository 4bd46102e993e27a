"""Child runs: several trainings of one recipe under one parent run in MLflow, for sweeps and cross-validation."""

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from typing_extensions import override

from pipelines.engine.command import UsageError
from pipelines.engine.ranges import check_ranges
from pipelines.engine.signals import stopped
from pipelines.engine.task import Task
from pipelines.tracking.client import experiment_id, tracking_client


class ChildRun(L.Callback):
    """Makes the run of a training a child of another one before anything in it can fail.

    Args:
        parent: the other run.
        tags: what it has beside.
    """

    def __init__(self, parent: str, **tags: str) -> None:
        self.tags = {MLFLOW_PARENT_RUN_ID: parent, **tags}
        self.run_id: str | None = None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.logger:
            client: MlflowClient = trainer.logger.experiment  # type: ignore[attr-defined]
            self.run_id = str(trainer.logger.version)
            for key, value in self.tags.items():
                client.set_tag(self.run_id, key, value)


def resolved(task: Task, args: list[str]) -> dict[str, Any]:
    """Resolves all settings of a training, as the task's command line parses them.

    Raises:
        UsageError: it does not accept them.
    """
    heard, printed = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stderr(heard), contextlib.redirect_stdout(printed):
            task([*args, "--print_config"])
    except SystemExit as end:
        if stopped(end):
            raise
        if end.code:
            raise UsageError(heard.getvalue().strip().removeprefix("error: ")) from None
    settings: dict[str, Any] = yaml.safe_load(printed.getvalue())
    check_ranges("fit", settings)
    return settings


def check_title(option: str, title: str) -> None:
    """Checks that a title can be a folder's name in ``outputs``.

    Raises:
        UsageError: it leads elsewhere.
    """
    if Path(title).name != title or title == "..":
        raise UsageError(f"{option} {title} is a path, but its folder lies in outputs: give a name without slashes.")


def complaint(task: Task, args: list[str]) -> str | None:
    """The error that a task's command line would report for some settings, without training; None if there is none."""
    try:
        resolved(task, args)
    except UsageError as error:
        return str(error)
    return None


def new_parent(experiment: str, name: str, plan: Mapping[str, Any], file: str) -> str:
    """Creates the parent run, or uses the run that ``mlflow run`` has created.

    Returns:
        The run's id.
    """
    client = tracking_client()
    run_id = os.environ.get("MLFLOW_RUN_ID")
    if run_id is None:
        run_id = str(client.create_run(experiment_id(client, experiment), run_name=name).info.run_id)
    client.log_dict(run_id, dict(plan), file)
    return run_id


@contextlib.contextmanager
def running(parent: str) -> Iterator[None]:
    """Context in which a parent run has the status RUNNING. An error ends the run with the matching status; otherwise
    it stays RUNNING."""
    os.environ.pop("MLFLOW_RUN_ID", None)  # it is the parent's, not the children's
    client = MlflowClient()
    client.update_run(parent, "RUNNING")
    try:
        yield
    except BaseException as error:
        client.set_terminated(parent, "KILLED" if stopped(error) else "FAILED")
        raise
