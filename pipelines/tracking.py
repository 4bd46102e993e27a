"""The life of an MLflow run, in good and in bad days."""

import json
import os
import platform
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import mlflow
import yaml
from jsonargparse import auto_cli
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_DATASET_CONTEXT,
    MLFLOW_GIT_COMMIT,
    MLFLOW_RUN_NAME,
    MLFLOW_SOURCE_NAME,
)
from PIL import Image

RUN_FILE = "run.json"
PARAM_LIMIT = 6000  # MLflow's, in characters
BATCH_LIMIT = 1000  # metrics in one request
PATIENCE = 60  # seconds that a finished training waits for a server that does not answer


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
        self._closing = False
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Adds an entry; one of a step that its series already has is left out: an earlier process wrote it."""
        if "step" in entry:
            if entry["step"] <= self.last.get(entry["key"], -1):
                return
            self.last[entry["key"]] = entry["step"]
        line = json.dumps(entry | {"timestamp": int(time.time() * 1000)}).encode() + b"\n"
        with self._news:
            self._stream.write(line)
            self._stream.flush()
            self._written += len(line)
            self._news.notify()

    def wait(self, patience: float = PATIENCE) -> int:
        """Waits until all is sent, or for some seconds if the server does not answer; returns how much is left."""
        while self._sent < self._written and self._thread.is_alive():
            failing_since = time.monotonic()
            while self._sent < self._written and (self.error is None or time.monotonic() - failing_since < patience):
                time.sleep(0.01)
            if self.error is not None:
                break
        return self._written - self._sent

    def close(self, patience: float = PATIENCE) -> int:
        """`wait`, then ends the thread."""
        left = self.wait(patience)
        with self._news:
            self._closing = True
            self._news.notify()
        if not left:
            self._thread.join()
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
                    self.error, pause = None, 0.5
                except Exception as error:
                    if self.error is None:
                        rank_zero_warn(
                            f"MLflow does not answer; training goes on, and sending is tried again. ({error})"
                        )
                    self.error = error
                    with self._news:
                        self._news.wait_for(lambda: self._closing, timeout=pause)
                    pause = min(2 * pause, 15)

    def _send(self, lines: list[bytes]) -> None:
        """Sends whole lines in order; metrics next to each other go together."""
        pending: list[Metric] = []
        size = 0
        for position, line in enumerate(lines, 1):
            entry = json.loads(line)
            size += len(line)
            if entry["kind"] == "metric":
                pending.append(Metric(entry["key"], float(entry["value"]), entry["timestamp"], entry["step"]))
            if pending and (entry["kind"] != "metric" or len(pending) == BATCH_LIMIT or position == len(lines)):
                self.client.log_batch(self.run_id, metrics=pending)
                pending = []
            if entry["kind"] == "picture":
                with Image.open(self.output / entry["file"]) as picture:
                    self.client.log_image(
                        self.run_id, picture, key=entry["key"], step=entry["step"], timestamp=entry["timestamp"]
                    )
            elif entry["kind"] == "file":
                self.client.log_artifact(self.run_id, str(self.output / entry["file"]), entry["folder"])
            elif entry["kind"] == "tag":
                self.client.set_tag(self.run_id, entry["key"], entry["value"])
            elif entry["kind"] == "status":
                self.client.set_terminated(self.run_id, entry["value"], entry["timestamp"])
            if not pending:
                self._sent += size
                size = 0
                os.pwrite(self._mark_stream.fileno(), b"%020d" % self._sent, 0)  # in one piece, whenever a kill comes


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
        self.output, self._experiment_name, self._run_name, self._tags = output, experiment, run_name, dict(tags)
        self.run_id: str | None = None
        self._system: SystemMetricsMonitor | None = None

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

    def _start(self) -> None:
        self._client = client = MlflowClient()
        saved = self.output / RUN_FILE
        given = os.environ.get("MLFLOW_RUN_ID")
        continues = saved.exists()
        if continues:
            self.run_id = run_id_of(self.output)
            client.update_run(self.run_id, "RUNNING")
            if "error" in client.get_run(self.run_id).data.tags:
                client.delete_tag(self.run_id, "error")
            if given and given != self.run_id:
                client.set_tag(given, "continues", self.run_id)
        elif given:
            self.run_id = given
            client.set_tag(given, MLFLOW_RUN_NAME, self._run_name)
        else:
            found = client.get_experiment_by_name(self._experiment_name)
            experiment_id = found.experiment_id if found else client.create_experiment(self._experiment_name)
            self.run_id = client.create_run(experiment_id, run_name=self._run_name).info.run_id
        tags = self._tags | _provenance()
        client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:PARAM_LIMIT]) for key, value in tags.items()])
        self.output.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps({"run_id": self.run_id, "tracking_uri": mlflow.get_tracking_uri()}))
        self.journal = Journal(self.output, self.run_id, client)
        self._system = SystemMetricsMonitor(self.run_id, resume_logging=continues)
        self._system.start()

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
    def log_config(self, config: str) -> None:
        """Logs a resolved configuration: whole as an artifact, and flattened as parameters."""
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
    def log_environment(self) -> None:
        """Logs the installed packages, and what differs from the commit."""
        client = self.experiment
        packages = sorted({f"{d.metadata['Name']}=={d.version}" for d in distributions()}, key=str.lower)
        client.log_text(self.run_id, "\n".join([f"# Python {platform.python_version()}", *packages]), "environment.txt")
        if difference := _git("diff", "HEAD"):
            client.log_text(self.run_id, difference, "uncommitted.diff")

    @rank_zero_only
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

    @rank_zero_only
    def flush(self) -> None:
        """Waits until all that was written down is sent, as far as the server answers."""
        _ = self.experiment
        self.journal.wait()

    @rank_zero_only
    def finish(self, error: BaseException | None = None) -> None:
        """Ends the run with what is true: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED, with the error."""
        _ = self.experiment
        if self._system:
            self._system.finish()
        if error is not None:
            self.journal.write(
                {"kind": "tag", "key": "error", "value": f"{type(error).__name__}: {error}"[-PARAM_LIMIT:]}
            )
            (self.output / "error.txt").write_text("".join(traceback.format_exception(error)))
            self.log_file(self.output / "error.txt", "")
        killed = isinstance(error, KeyboardInterrupt | SIGTERMException)
        status = "KILLED" if killed else "FAILED" if error else "FINISHED"
        self.journal.write({"kind": "status", "value": status})
        if self.journal.close():
            rank_zero_warn(
                f"MLflow did not take all of the run ({self.journal.error}). What is left is kept in {self.output}; "
                f"send it with: python -m pipelines.tracking {self.output}"
            )

    def address(self) -> str:
        """Where the run is seen: its page on a server, or its id in the embedded store."""
        uri = mlflow.get_tracking_uri()
        if uri.startswith("http"):
            experiment = self.experiment.get_run(self.run_id).info.experiment_id
            return f"{uri}/#/experiments/{experiment}/runs/{self.run_id}"
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
    client = MlflowClient(json.loads((output / RUN_FILE).read_text())["tracking_uri"])
    journal = Journal(output, run_id_of(output), client)
    if journal.close():
        raise ValueError(f"The server still does not take it: {journal.error}")
    return f"All of {output} is in run {journal.run_id}."


if __name__ == "__main__":
    try:
        print(auto_cli(send, as_positional=True))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
