"""The life of an MLflow run, in good and in bad days."""

import json
import os
import platform
import re
import subprocess
import sys
import threading
import time
import traceback
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import compress_image_size
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_LOGGED_IMAGES,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
)
from PIL import Image

RUN_FILE = "run.json"
PARAM_LIMIT = 6000  # MLflow's, in characters
BATCH_LIMIT = 1000  # metrics in one request
PATIENCE = 60  # seconds that a finished training waits for a server that does not answer
REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's word for what it will never take

# The journal tries again by itself, and must learn soon that it has to: MLflow's own way takes minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the table at the end has it


class TrackingError(ValueError):
    """MLflow cannot be reached or does not take the run; the message says what to do."""


@contextmanager
def needed() -> Iterator[None]:
    """Makes one paragraph of MLflow's errors, where a command cannot go on without it.

    Raises:
        TrackingError: MLflow raised an error.
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


def tracking_client() -> MlflowClient:
    """A client of MLflow's for what may be the first command on an embedded store.

    MLflow makes a new store's tables when it is first opened, and fails where two processes do so at the same moment: here
    they take turns.
    """
    file = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    if not mlflow.get_tracking_uri().startswith("sqlite:///") or not file.parent.is_dir():
        return MlflowClient()
    with FileLock(f"{file}.lock"):
        return MlflowClient()


def experiment_id(client: MlflowClient, name: str) -> str:
    """The id of the experiment of this name; it is made by whoever of several processes comes first."""
    if found := client.get_experiment_by_name(name):
        return found.experiment_id
    try:
        return client.create_experiment(name)
    except MlflowException:
        if found := client.get_experiment_by_name(name):
            return found.experiment_id
        raise


class Journal:
    """What is to be sent to an MLflow run, on disk first, so that neither a kill nor a lost server loses any of it.

    ``journal.jsonl`` in the output folder has a line for each metric, picture, file and status; ``journal.sent`` holds
    how many bytes of it the server has taken. A thread sends what is new, and tries again as long as it must.

    Args:
        output: folder of the training.
        run_id: the run.
        client: MLflow's client.
    """

    def __init__(self, output: Path, run_id: str, client: MlflowClient) -> None:
        self.output, self.run_id, self.client = output, run_id, client
        self.file, self._mark = output / "journal.jsonl", output / "journal.sent"
        self.error: Exception | None = None
        self.refused = 0  # entries that the server will never take
        self.last: dict[str, int] = {}  # the last step of each metric and picture
        lines = self.file.read_bytes() if self.file.exists() else b""
        whole = lines[: lines.rfind(b"\n") + 1]  # a kill may have cut the last line
        for line in whole.splitlines():
            entry = json.loads(line)
            if "step" in entry:
                self.last[entry["key"]] = max(entry["step"], self.last.get(entry["key"], -1))
        self._written = len(whole)
        self._sent = int(self._mark.read_bytes() or 0) if self._mark.exists() else 0
        self._mark_stream = self._mark.open("r+b" if self._mark.exists() else "wb", buffering=0)
        self._stream = self.file.open("r+b" if self.file.exists() else "wb")
        self._stream.truncate(self._written)
        self._stream.seek(self._written)
        self._news = threading.Condition()
        self._closing = self._hurry = self._gave_up = False
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry; one of a step that its series already has is left out: an earlier process wrote it."""
        with self._news:
            if "step" in entry:
                if entry["step"] <= self.last.get(entry["key"], -1):
                    return
                self.last[entry["key"]] = entry["step"]
            line = json.dumps(entry | {"timestamp": int(time.time() * 1000)}).encode() + b"\n"
            self._stream.write(line)
            self._stream.flush()
            self._written += len(line)
            self._news.notify_all()

    def wait(self, patience: float | None = None) -> int:
        """Waits until all is sent, or for some seconds if the server does not answer.

        Args:
            patience: how many; by default a minute, and little where a minute has passed before.

        Returns:
            The bytes that are left.
        """
        if patience is None:
            patience = min(PATIENCE, 5) if self._gave_up else PATIENCE
        start = time.monotonic()
        with self._news:
            self._hurry = True
            while self._sent < self._written and self._thread.is_alive():
                if self.error is not None and time.monotonic() - max(start, self._progress) > patience:
                    self._gave_up = True
                    break
                self._news.notify_all()
                self._news.wait(0.05)
            self._hurry = False
            return self._written - self._sent

    def close(self, patience: float | None = None) -> int:
        """`wait`, which Ctrl-C cuts short, then ends the thread."""
        try:
            left = self.wait(patience)
        except KeyboardInterrupt:
            left = self._written - self._sent
        with self._news:
            self._closing = True
            self._news.notify_all()
        if not left:
            self._thread.join()
            self._mark_stream.close()
        self._stream.close()
        return left

    def _send_all(self) -> None:
        pause = 0.5
        with self.file.open("rb") as reader:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._closing or self._sent < self._written)
                    if self._closing:
                        return
                    end = self._written
                reader.seek(self._sent)
                lines = reader.read(min(end - self._sent, 1 << 20)).splitlines(keepends=True)
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                try:
                    self._send(lines)
                except Exception as error:
                    if self.error is None:
                        rank_zero_warn(
                            "MLflow does not answer; the training goes on, and sending is tried again. "
                            f"({redact(str(error))[:300]})"
                        )
                    self.error = error
                    with self._news:
                        self._news.wait_for(lambda: self._closing, timeout=min(pause, 1) if self._hurry else pause)
                    pause = min(2 * pause, 15)
                else:
                    if self.error is not None:
                        rank_zero_info("MLflow answers again.")
                    self.error, pause = None, 0.5

    def _send(self, lines: list[bytes]) -> None:
        """Sends whole lines in order; metrics next to each other go together.

        What was sent, but not marked as sent, is sent again: each entry is such that MLflow then has it once.
        """
        pending: list[Metric] = []
        size = 0
        for position, line in enumerate(lines, 1):
            entry = json.loads(line)
            size += len(line)
            if entry["kind"] == "metric":
                pending.append(Metric(entry["key"], float(entry["value"]), entry["timestamp"], entry["step"]))
            if pending and (entry["kind"] != "metric" or len(pending) == BATCH_LIMIT or position == len(lines)):
                self._send_metrics(pending)
                pending = []
            if entry["kind"] != "metric":
                try:
                    self._send_other(entry)
                except (FileNotFoundError, MlflowException) as error:
                    if isinstance(error, MlflowException) and error.error_code != REFUSED:
                        raise
                    self._note_refusal(entry.get("key") or entry.get("file", ""), error)
            if not pending:
                self._sent += size
                size = 0
                self._progress = time.monotonic()
                os.pwrite(self._mark_stream.fileno(), b"%020d" % self._sent, 0)  # in one piece, whenever a kill comes

    def _send_metrics(self, metrics: list[Metric]) -> None:
        try:
            self.client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            if error.error_code != REFUSED:
                raise
            if len(metrics) == 1:
                self._note_refusal(metrics[0].key, error)
            else:  # one of them spoils the others
                for metric in metrics:
                    self._send_metrics([metric])

    def _send_other(self, entry: dict[str, Any]) -> None:
        client, run_id = self.client, self.run_id
        if entry["kind"] == "picture":
            # As `log_image` names it, but by the same name at every attempt.
            unique = uuid.uuid5(uuid.NAMESPACE_OID, f"{run_id} {entry['file']}")
            stem = "images/{}+step+{step}+timestamp+{timestamp}+{}".format(
                entry["key"].replace("/", "~"), unique, **entry
            )
            with Image.open(self.output / entry["file"]) as picture:
                client.log_image(run_id, picture, artifact_file=f"{stem}.png")
                client.log_image(run_id, compress_image_size(picture), artifact_file=f"{stem}+compressed.webp")
            client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, "True")
        elif entry["kind"] == "file":
            client.log_artifact(run_id, str(self.output / entry["file"]), entry["folder"])
        elif entry["kind"] == "tag" and entry["value"] is not None:
            client.set_tag(run_id, entry["key"], entry["value"])
        elif entry["kind"] == "tag":
            if entry["key"] in client.get_run(run_id).data.tags:
                client.delete_tag(run_id, entry["key"])
        elif entry["kind"] == "status" and entry["value"] == "RUNNING":
            client.update_run(run_id, entry["value"])
        elif entry["kind"] == "status":
            client.set_terminated(run_id, entry["value"], entry["timestamp"])

    def _note_refusal(self, name: str, error: Exception) -> None:
        self.refused += 1
        if self.refused == 1:
            rank_zero_warn(f"MLflow does not take {name}, which is left out of the run: {redact(str(error))[:300]}")


class MachineMonitor(SystemMetricsMonitor):
    """MLflow's monitor of the machine's load, writing to a journal: MLflow's own ends with the first failed request.

    Args:
        journal: of the run.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal.run_id)
        self.journal = journal
        steps = [step for key, step in journal.last.items() if key.startswith(self._metrics_prefix)]
        self._logging_step = max(steps, default=-1) + 1

    def monitor(self) -> None:
        """Measures until the end."""
        while True:
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Writes measured values down."""
        prefix = self._metrics_prefix + (f"{self.node_id}/" if self.node_id else "")
        for key, value in metrics.items():
            self.journal.write({"kind": "metric", "key": prefix + key, "value": value, "step": self._logging_step})
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()


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
        if uri.startswith("http"):
            with suppress(requests.exceptions.SSLError):  # MLflow has its own settings for that
                requests.get(f"{uri}/health", timeout=10)
        self._client = client = tracking_client()
        saved = self.output / RUN_FILE
        given = os.environ.get("MLFLOW_RUN_ID")
        run_name = redact(self._run_name)
        continues = saved.exists()
        if continues:
            run_id = run_id_of(self.output)
            try:
                client.get_run(run_id)
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
        self.output.mkdir(parents=True, exist_ok=True)
        if not continues:
            saved.write_text(json.dumps({"run_id": run_id, "tracking_uri": _without_login(uri)}))
        self.run_id = run_id
        self.journal = Journal(self.output, run_id, client)
        if continues:  # in this order with what an earlier process could not send
            self.journal.write({"kind": "status", "value": "RUNNING"})
            self.journal.write({"kind": "tag", "key": "error", "value": None})
        self._machine = MachineMonitor(self.journal)
        self._machine.start()

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Writes metrics of a step down, to be sent."""
        _ = self.experiment
        for key, value in metrics.items():
            if key != "epoch":
                self.journal.write({"kind": "metric", "key": key, "value": float(value), "step": step or 0})

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the command line logs its whole configuration with `log_config`."""

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Writes pictures, uint8 H×W×3, as points of the series ``key``, to be sent."""
        _ = self.experiment
        for number, image in enumerate(images):
            file = Path("pictures", f"{key.replace('/', '_')}-{step or 0}{f'-{number}' if number else ''}.png")
            (self.output / file.parent).mkdir(exist_ok=True)
            Image.fromarray(image).save(self.output / file)
            self.journal.write({"kind": "picture", "key": key, "step": step or 0, "file": str(file)})

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int | None = None) -> None:
        """Writes a table as a JSON artifact, to be sent; the last one of a key stands."""
        _ = self.experiment
        file = Path("tables", f"{key.replace('/', '_')}.json")
        (self.output / file.parent).mkdir(exist_ok=True)
        (self.output / file).write_text(json.dumps({"columns": columns, "data": rows}))
        self.journal.write({"kind": "file", "file": str(file), "folder": "tables"})

    @rank_zero_only
    def log_text(self, key: str, text: str) -> None:
        """Writes a text in Markdown as an artifact, to be sent."""
        _ = self.experiment
        file = self.output / f"{key}.md"
        file.write_text(text)
        self.log_file(file, "")

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
        _ = self.experiment
        self._machine.finish()
        if error is not None:
            self.set_tag("error", f"{type(error).__name__}: {error}")
            (self.output / "error.txt").write_text(redact("".join(traceback.format_exception(error))))
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

    def address(self) -> str:
        """Where the run is seen: its page on a server, or its id in the embedded store."""
        uri = _without_login(mlflow.get_tracking_uri())
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
        self._times["start"] = time.perf_counter()

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


_SECRET_KEY = r"[\w.-]*(?:passw|passphrase|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential)[\w.-]*"
_SECRET = re.compile(
    r"(?<=://)[^\s/@'\"]+(?=@)"  # user:password@ in an address
    r"|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"
    r"|\b(?:gh[pousr]_\w{30,}|github_pat_\w{30,}|glpat-[\w-]{16,}|hf_[A-Za-z0-9]{30,}|sk-[\w-]{20,}|xox[abprs]-[\w-]{16,})"
    r"|\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*"  # JSON web tokens
    r"|(?<=Bearer )[\w.~+/=-]{12,}"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----(?:[\s\S]*?-----END [A-Z ]*PRIVATE KEY-----|[\s\S]*)"
)
_SECRET_ASSIGNED = (
    re.compile(  # in code, in shell scripts, in addresses: `api_key: str = "…"`, `TOKEN=…`, `--password …`
        rf"""((?:{_SECRET_KEY}["']?\]?(?:\s*:[\w. |\[\]]{{1,40}}?(?==))?\s*[:=]\s*)|--{_SECRET_KEY}\s+)"""
        r"""(?:(["'])(?:(?!\2).)+\2|[^\s"'(){}\[\],;&]{6,}+(?!\())""",
        re.IGNORECASE,
    )
)


def redact(value: Any, key: str = "") -> Any:
    """Puts ``***`` in the place of whatever looks like a credential.

    Args:
        value: text, or nested dictionaries and lists.
        key: the name it goes by; one such as ``api_key`` makes a credential of any text.

    Returns:
        The same without credentials.
    """
    if isinstance(value, dict):
        return {name: redact(inner, f"{key}.{name}") for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [redact(inner, key) for inner in value]
    secret = re.search(_SECRET_KEY, key, re.IGNORECASE)
    if secret and isinstance(value, int | float) and not isinstance(value, bool) and "token" not in key.lower():
        return "***"  # but `num_tokens` is a number
    if not isinstance(value, str) or not value:
        return value
    if secret:
        return "***"
    for name, known in os.environ.items():
        if len(known) >= 8 and re.search(_SECRET_KEY, name, re.IGNORECASE):
            value = value.replace(known, "***")
    return _SECRET_ASSIGNED.sub(r"\1***", _SECRET.sub("***", value))


def redact_yaml(text: str) -> str:
    """`redact` for a document in YAML, which stays as it is if there is nothing to hide."""
    plain = yaml.safe_load(text)
    hidden = redact(plain)
    return text if hidden == plain else yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def _without_login(uri: str) -> str:
    return re.sub(r"(?<=://)[^\s/@]+@", "", uri)


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
    """The run of the training in an output folder."""
    return str(json.loads(Path(output, RUN_FILE).read_text())["run_id"])


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
    uri = json.loads((output / RUN_FILE).read_text())["tracking_uri"]
    if _without_login(mlflow.get_tracking_uri()) == uri:
        uri = mlflow.get_tracking_uri()  # which may have the login
    journal = Journal(output, run_id_of(output), MlflowClient(uri))
    if journal.close(patience=5):
        raise ValueError(f"MLflow at {redact(uri)} still does not take it: {redact(str(journal.error))[:300]}")
    return f"All of {output} is in run {journal.run_id}."


if __name__ == "__main__":
    try:
        print(auto_cli(send, as_positional=True))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
