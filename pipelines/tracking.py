"""The life of an MLflow run, in good and in bad days."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import mlflow
import requests
import torch
import yaml
from filelock import FileLock
from jsonargparse import auto_cli
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
)
from PIL import Image

from pipelines.console import mistakes
from pipelines.files import disk_error, held, whole, write_text
from pipelines.journal import Journal, MachineMonitor
from pipelines.redaction import redact, without_login

RUN_FILE = "run.json"
PARAM_LIMIT = 6000  # MLflow's, in characters
PATIENCE = 5  # seconds in which a server must say that it is there

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the table at the end has it


class TrackingError(ValueError):
    """MLflow cannot be reached or does not take the run; the message says what to do."""


@contextmanager
def needed() -> Iterator[None]:
    """Makes one paragraph of MLflow's errors, where a command cannot go on without it.

    Raises:
        TrackingError: MLflow raised an error.
        DiskError: the disk, such as that of temporary files, is full.
    """
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        uri = redact(mlflow.get_tracking_uri())
        if isinstance(error, requests.RequestException) or isinstance(error.__context__, requests.RequestException):
            raise TrackingError(
                f"MLflow at {uri} does not answer: start it, or unset MLFLOW_TRACKING_URI to use the embedded store."
            ) from error
        if error.get_http_status_code() in (401, 403):
            raise TrackingError(
                f"MLflow at {uri} does not let you in: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, "
                "or MLFLOW_TRACKING_TOKEN."
            ) from error
        raise TrackingError(f"MLflow at {uri} refuses: {redact(str(error))}") from error
    except OSError as error:
        raise disk_error(error, Path(tempfile.gettempdir(), "what is to be sent")) or error from None


@needed()
def reach(*uris: str) -> None:
    """Makes sure in a few seconds that MLflow answers, where its own client would try for minutes.

    Args:
        uris: where; by default the run's store and the registry.

    Raises:
        TrackingError: it does not.
    """
    for uri in uris or {mlflow.get_tracking_uri(), mlflow.get_registry_uri()}:
        if uri.startswith("http"):
            with suppress(requests.exceptions.SSLError):  # MLflow has its own settings for that
                requests.get(f"{uri}/health", timeout=PATIENCE)


@needed()
def tracking_client() -> MlflowClient:
    """A client of MLflow's for what may be the first command on an embedded store.

    MLflow makes a new store's tables when it is first opened, and fails where two processes do so at the same moment: here
    they take turns.

    Raises:
        TrackingError: MLflow does not answer.
    """
    reach()
    file = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    if not mlflow.get_tracking_uri().startswith("sqlite:///") or not file.parent.is_dir():
        return MlflowClient()
    with FileLock(f"{file}.lock"):
        return MlflowClient()


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name; it is made by whoever of several processes comes first.

    Raises:
        TrackingError: it was deleted.
    """
    if found := client.get_experiment_by_name(name):
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"The MLflow experiment {name} was deleted: restore it with `mlflow experiments restore --experiment-id "
                f"{found.experiment_id}`, or name another with --experiment."
            )
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


class RunLogger(Logger):
    """Writes a training into one MLflow run, from the process of rank zero, without keeping the training waiting.

    The run is the one named in the output folder's ``run.json`` (a training that goes on), else the one that
    ``MLFLOW_RUN_ID`` names (made by ``mlflow run``), else a new one. Metrics, pictures and tables go through a `Journal`:
    when a training goes on, what an earlier process had logged beyond the checkpoint is not logged again.

    Args:
        output: folder of the training.
        experiment: name of the MLflow experiment.
        run_name: name of a new run.
        tags: tags of the run.
    """

    def __init__(self, output: Path, experiment: str, run_name: str, tags: Mapping[str, str]) -> None:
        super().__init__()
        self.output, self._experiment_name, self._run_name, self.tags = output, experiment, run_name, dict(tags)
        self.run_id: str | None = None
        self._hold = ExitStack()
        self._told = False

    @property
    def name(self) -> str:
        """The experiment's name."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """The run's id."""
        return self.run_id

    @property
    def save_dir(self) -> str:
        """The output folder."""
        return str(self.output)

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client; making it starts or continues the run."""
        if self.run_id is None:
            self._start()
        return self._client

    @needed()
    def _start(self) -> None:
        uri = mlflow.get_tracking_uri()
        self._client = client = tracking_client()
        self._hold.enter_context(held(self.output))
        saved = self.output / RUN_FILE
        given = os.environ.get("MLFLOW_RUN_ID")
        run_name = redact(self._run_name)
        continues = saved.exists()
        if continues:
            run_id = run_id_of(self.output)
            try:
                if client.get_run(run_id).info.lifecycle_stage != "active":
                    raise TrackingError(
                        f"The run of {self.output}, {run_id}, was deleted: restore it with `mlflow runs restore --run-id "
                        f"{run_id}`, or choose another --output."
                    )
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                before = json.loads(saved.read_text())["tracking_uri"]
                raise TrackingError(
                    f"{self.output} belongs to run {run_id} in {before}, which {redact(uri)} does not have: set "
                    "MLFLOW_TRACKING_URI to the former, or choose another --output."
                ) from None
            if given and given != run_id:
                client.set_tag(given, "continues", run_id)
        elif given:
            run_id = given
            client.set_tag(given, MLFLOW_RUN_NAME, run_name)
        else:
            run_id = client.create_run(experiment_id(client, self._experiment_name), run_name=run_name).info.run_id
        tags = redact(self.tags | _provenance())
        client.log_batch(run_id, tags=[RunTag(key, str(value)[:PARAM_LIMIT]) for key, value in tags.items()])
        self._experiment_id = client.get_run(run_id).info.experiment_id
        if not continues:
            write_text(saved, json.dumps({"run_id": run_id, "tracking_uri": without_login(uri)}))
        self.journal = Journal(self.output, run_id, client)
        if continues:  # in this order with what an earlier process could not send
            self.journal.write({"kind": "status", "value": "RUNNING"})
            self.journal.write({"kind": "tag", "key": "error", "value": None})
        self._machine = MachineMonitor(self.journal)
        self._machine.start()
        self.run_id = run_id

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes metrics of a step down, to be sent.

        Raises:
            DiskError: the disk is full, broken or read-only.
        """
        _ = self.experiment
        if self.journal.fault:
            raise self.journal.fault
        for key, value in metrics.items():
            if key != "epoch":
                self.journal.write({"kind": "metric", "key": key, "value": float(value), "step": step or 0})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the command line logs its whole configuration with `log_config`."""

    @contextmanager
    def _only_shown(self, file: Path) -> Iterator[Path]:
        """A place to write what is only for looking at: if the disk does not take it, the training goes on without."""
        try:
            (self.output / file.parent).mkdir(exist_ok=True)
            with whole(self.output / file) as part:
                yield part
        except OSError as error:
            if not self._told:
                rank_zero_warn(f"Left out of the run, which goes on without: {error}")
            self._told = True

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Writes pictures, uint8 H×W×3, as points of the series ``key``, to be sent."""
        _ = self.experiment
        for number, image in enumerate(images):
            file = Path("pictures", f"{key.replace('/', '_')}-{step or 0}{f'-{number}' if number else ''}.png")
            with self._only_shown(file) as part:
                Image.fromarray(image).save(part)
            if (self.output / file).exists():
                self.journal.write({"kind": "picture", "key": key, "step": step or 0, "file": str(file)})

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int | None = None) -> None:
        """Writes a table as a JSON artifact, to be sent; the last one of a key stands."""
        _ = self.experiment
        file = Path("tables", f"{key.replace('/', '_')}.json")
        with self._only_shown(file) as part:
            part.write_text(json.dumps({"columns": columns, "data": rows}))
        if (self.output / file).exists():
            self.journal.write({"kind": "file", "file": str(file), "folder": "tables"})

    @rank_zero_only
    def log_text(self, key: str, text: str) -> None:
        """Writes a text in Markdown as an artifact, to be sent."""
        _ = self.experiment
        file = Path(f"{key}.md")
        with self._only_shown(file) as part:
            part.write_text(text)
        if (self.output / file).exists():
            self.log_file(self.output / file, "")

    @rank_zero_only
    def set_tag(self, key: str, value: str) -> None:
        """Writes a tag of the run down, to be sent."""
        _ = self.experiment
        self.journal.write({"kind": "tag", "key": key, "value": redact(value)[:PARAM_LIMIT]})

    @rank_zero_only
    @needed()
    def log_config(self, config: str) -> None:
        """Logs a resolved configuration, in YAML: whole as an artifact, and flattened as parameters."""
        client = self.experiment
        client.log_text(self.run_id, config, "config.yaml")
        params = [
            Param(key, value if len(value) <= PARAM_LIMIT else f"(whole in config.yaml) {value[:5900]}")
            for key, value in flatten(yaml.safe_load(config))
        ]
        known = client.get_run(self.run_id).data.params
        params = [param for param in params if param.key not in known]  # of a run that goes on, or of `mlflow run`
        for start in range(0, len(params), 100):
            client.log_batch(self.run_id, params=params[start : start + 100])

    @rank_zero_only
    @needed()
    def log_environment(self) -> None:
        """Logs the installed packages, and what differs from the commit."""
        client = self.experiment
        packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
        client.log_text(self.run_id, "\n".join([f"# Python {platform.python_version()}", *packages]), "environment.txt")
        if difference := _git("diff", "HEAD"):
            client.log_text(self.run_id, redact(difference), "uncommitted.diff")

    @rank_zero_only
    @needed()
    def log_data(self, data: Any) -> None:
        """Logs what the data set is, and which files were left out of it."""
        client, identity = self.experiment, data.identity()
        inputs = [
            DatasetInput(
                Dataset(identity["name"], split["digest"][:36], "local", json.dumps({"class": type(data).__name__}),
                        profile=json.dumps({"samples": split["samples"]})),
                [InputTag(MLFLOW_DATASET_CONTEXT, name)],
            )
            for name, split in identity["splits"].items()
        ]  # fmt: skip
        client.log_inputs(self.run_id, inputs)
        client.log_dict(self.run_id, identity, "data.json")
        if data.bad_files:
            client.log_dict(self.run_id, data.bad_files, "bad_files.json")

    @rank_zero_only
    def log_file(self, file: Path, folder: str) -> None:
        """Writes down that a file of the output folder is to be sent."""
        _ = self.experiment
        self.journal.write({"kind": "file", "file": str(file.relative_to(self.output)), "folder": folder})

    def flush(self) -> bool:
        """Waits until all that was written down is sent, as far as the server answers; returns whether it is."""
        _ = self.experiment
        return not self.journal.wait()

    @rank_zero_only
    def finish(self, error: BaseException | None = None) -> None:
        """Ends the run with what is true: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED, with the error."""
        if self.run_id is None:  # it never began
            self._hold.close()
            return
        self._machine.finish()
        if error is not None:
            self.set_tag("error", f"{type(error).__name__}: {error}")
            with suppress(OSError):  # of which the error may be the cause
                write_text(self.output / "error.txt", redact("".join(traceback.format_exception(error))))
                self.log_file(self.output / "error.txt", "")
        killed = isinstance(error, KeyboardInterrupt | SIGTERMException)
        status = "KILLED" if killed else "FAILED" if error else "FINISHED"
        self.journal.write({"kind": "status", "value": status})
        if self.journal.close():
            why = redact(str(self.journal.error))[:300]
            rank_zero_warn(
                f"MLflow did not take all of the run ({why}). What is left is kept in {self.output}; "
                f"once it answers, send it with: python -m pipelines.tracking {self.output}"
            )
        self._hold.close()

    def address(self) -> str:
        """Where the run is seen: its page on a server, or its id in the embedded store."""
        uri = without_login(mlflow.get_tracking_uri())
        if uri.startswith("http"):
            return f"{uri}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        return f"{self.run_id} in {uri}"


class RunCallback(L.Callback):
    """Watches a training for its run: the speed, the time, and how it ended."""

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self.train_seconds = 0.0
        self._times: dict[str, float] = defaultdict(float)
        self._images = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the clock."""
        self._times["start"] = self._times["epoch"] = time.perf_counter()

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the epoch's clock."""
        self._times["epoch"], self._images = time.perf_counter(), 0

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Logs the learning rate, or that of each part of the network where they differ."""
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            rates = {
                f"lr/{group.get('name', number)}": group["lr"]
                for optimizer in trainer.optimizers
                for number, group in enumerate(optimizer.param_groups)
                if not str(group.get("name")).endswith(".no_decay")
            }
            if len(set(rates.values())) == 1:
                rates = {"lr": next(iter(rates.values()))}
            for logger in trainer.loggers:
                logger.log_metrics(rates, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts images."""
        self._images += len(batch["image"]) * trainer.world_size

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count as training time."""
        self._times["validation"] = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validation does not count as training time."""
        self._times["epoch"] += time.perf_counter() - self._times["validation"]

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the speed over the epoch."""
        seconds = time.perf_counter() - self._times["epoch"]
        if (
            self._images and 0 < seconds < time.perf_counter()
        ):  # an epoch that was begun by another process has no start
            for logger in trainer.loggers:
                logger.log_metrics({"train/images_per_second": self._images / seconds}, trainer.global_step - 1)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Stops the clock."""
        self.train_seconds = time.perf_counter() - self._times["start"]

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Remembers why the training ended."""
        self.error = exception


def flatten(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested dictionaries as (dotted key, text) pairs; lists and None are written as JSON."""
    if isinstance(config, dict) and config:
        return [pair for key, value in config.items() for pair in flatten(value, f"{prefix}{key}.")]
    return [(prefix[:-1], config if isinstance(config, str) else json.dumps(config))]


def _git(*args: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _provenance() -> dict[str, str]:
    return {
        MLFLOW_GIT_COMMIT: _git("rev-parse", "HEAD"),
        "git.dirty": str(bool(_git("status", "--porcelain"))).lower(),
        MLFLOW_SOURCE_NAME: Path(sys.argv[0]).name,
        "host": platform.node(),
    }


def surroundings(trainer: L.Trainer) -> dict[str, str]:
    """Where a training runs, as tags: devices, processes, what started them, versions."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    launchers = {"TORCHELASTIC_RUN_ID": "torchrun", "SLURM_STEP_ID": "slurm", "MLFLOW_RUN_ID": "mlflow"}
    tags = {
        "devices": f"{trainer.world_size}×{name}",
        "world_size": str(trainer.world_size),
        "launcher": next((launcher for key, launcher in launchers.items() if key in os.environ), "python"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm.job_id"] = job
    return tags


def run_id_of(output: str | Path) -> str:
    """The run of the training in an output folder.

    Raises:
        TrackingError: the file that names it is torn.
    """
    file = Path(output, RUN_FILE)
    try:
        return str(json.loads(file.read_text())["run_id"])
    except (ValueError, TypeError, KeyError):
        raise TrackingError(
            f'{file.resolve()} does not name the run of this training: write {{"run_id": …, "tracking_uri": …}} '
            "into it, or choose another --output."
        ) from None


def send(output: Path) -> str:
    """Sends what a training could not send to its MLflow run.

    Args:
        output: folder of the training.

    Returns:
        How it went.

    Raises:
        ValueError: it is no folder of a training, or the server still does not answer.
    """
    if not (output / RUN_FILE).exists():
        raise ValueError(f"{output.resolve()} is not the folder of a training: it has no {RUN_FILE}.")
    run_id, uri = run_id_of(output), json.loads((output / RUN_FILE).read_text())["tracking_uri"]
    if without_login(mlflow.get_tracking_uri()) == uri:
        uri = mlflow.get_tracking_uri()  # which may have the login
    try:
        reach(uri)
    except TrackingError:
        raise ValueError(f"MLflow at {redact(uri)} still does not take it: it does not answer.") from None
    with held(output):
        journal = Journal(output, run_id, MlflowClient(uri))
        if journal.close(patience=5):
            raise ValueError(f"MLflow at {redact(uri)} still does not take it: {redact(str(journal.error))[:300]}")
    return f"All of {output} is in run {journal.run_id}."


if __name__ == "__main__":
    with mistakes():
        print(auto_cli(send, as_positional=True))
