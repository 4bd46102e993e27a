"""The life of an MLflow run, in good and in bad days."""

import json
import os
import platform
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import lightning as L
import mlflow
import yaml
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME

RUN_FILE = "run.json"
PARAM_LIMIT = 6000  # MLflow's, in characters
BATCH_LIMIT = 1000  # metrics in one request


class RunLogger(Logger):
    """Writes a training into one MLflow run, from the process of rank zero, without keeping the training waiting.

    The run is the one named in the output folder's ``run.json`` (a training that goes on), else the one that
    ``MLFLOW_RUN_ID`` names (made by ``mlflow run``), else a new one. Metrics, pictures and tables are sent by a thread.
    When a training goes on, what an earlier process had logged beyond the checkpoint is not logged again.

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
        self._queue: queue.Queue[Metric | Callable[[], None] | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._system: SystemMetricsMonitor | None = None
        self._last_steps: dict[str, int] = {}
        self._failures = 0

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
        self._client = MlflowClient()
        saved = self.output / RUN_FILE
        given = os.environ.get("MLFLOW_RUN_ID")
        if saved.exists():
            self.run_id = run_id_of(self.output)
            self._client.set_terminated(self.run_id, "RUNNING")
            self._find_last_steps()
            if given and given != self.run_id:
                self._client.set_tag(given, "fovea.continues", self.run_id)
        elif given:
            self.run_id = given
            self._client.set_tag(given, "mlflow.runName", self._run_name)
        else:
            found = self._client.get_experiment_by_name(self._experiment_name)
            experiment_id = found.experiment_id if found else self._client.create_experiment(self._experiment_name)
            self.run_id = self._client.create_run(experiment_id, run_name=self._run_name).info.run_id
        tags = self._tags | _provenance()
        self._client.log_batch(self.run_id, tags=[RunTag(key, str(value)[:PARAM_LIMIT]) for key, value in tags.items()])
        self.output.mkdir(parents=True, exist_ok=True)
        saved.write_text(json.dumps({"run_id": self.run_id, "tracking_uri": mlflow.get_tracking_uri()}))
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()
        self._system = SystemMetricsMonitor(self.run_id, resume_logging=saved.exists())
        self._system.start()

    def _find_last_steps(self) -> None:
        assert self.run_id
        for key in self._client.get_run(self.run_id).data.metrics:
            if not key.startswith("system/"):
                self._last_steps[key] = max(m.step for m in self._client.get_metric_history(self.run_id, key))
        for file in self._client.list_artifacts(self.run_id, "images"):
            key, _, rest = Path(file.path).name.replace("%", "+").partition("+step+")  # see MlflowClient.log_image
            key, step = key.replace("~", "/"), int(rest.split("+")[0])
            self._last_steps[key] = max(self._last_steps.get(key, -1), step)

    def _is_new(self, key: str, step: int) -> bool:
        return step > self._last_steps.get(key, -1)

    def _send(self) -> None:
        """Sends what is queued, until None; metrics that pile up go together."""
        pending: list[Metric] = []
        done = False
        while not done:
            items = [self._queue.get()]
            while len(items) < BATCH_LIMIT and not self._queue.empty():
                items.append(self._queue.get_nowait())
            pending += [item for item in items if isinstance(item, Metric)]
            done = None in items
            try:
                while pending:
                    self.experiment.log_batch(self.run_id, metrics=pending[:BATCH_LIMIT])
                    del pending[:BATCH_LIMIT]
                for item in items:
                    if callable(item):
                        item()
            except Exception as error:
                self._failures += 1
                if self._failures == 1:
                    rank_zero_warn(f"MLflow does not take what is logged; training goes on. ({error})")
            for _ in items:
                self._queue.task_done()
        if pending:
            lost = self.output / "unsent-metrics.jsonl"
            lost.write_text("".join(json.dumps(dict(metric)) + "\n" for metric in pending))
            rank_zero_warn(f"{len(pending)} metrics could not be sent to MLflow; they are kept in {lost}.")

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Queues metrics of a step."""
        _ = self.experiment
        now, step = int(time.time() * 1000), step or 0
        for key, value in metrics.items():
            if key != "epoch" and self._is_new(key, step):
                self._last_steps[key] = step
                self._queue.put(Metric(key, float(value), now, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the command line logs its whole configuration with `log_config`."""

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Queues pictures, uint8 H×W×3, as points of the series ``key``."""
        client, step = self.experiment, step or 0
        if self._is_new(key, step):
            for image in images:
                self._queue.put(lambda image=image: client.log_image(self.run_id, image, key=key, step=step))

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int | None = None) -> None:
        """Queues a table as a JSON artifact; the last one of a key stands."""
        client = self.experiment
        table = {"columns": columns, "data": rows}
        self._queue.put(lambda: client.log_dict(self.run_id, table, f"tables/{key.replace('/', '_')}.json"))

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
    def flush(self) -> None:
        """Waits until all that is queued is sent."""
        if self._thread:
            self._queue.join()

    @rank_zero_only
    def finish(self, error: BaseException | None = None) -> None:
        """Ends the run with what is true: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED, with the error."""
        client = self.experiment
        if self._thread:
            self._queue.put(None)
            self._thread.join()
        if self._system:
            self._system.finish()
        if error is not None:
            client.set_tag(self.run_id, "error", f"{type(error).__name__}: {error}"[-PARAM_LIMIT:])
            client.log_text(self.run_id, "".join(traceback.format_exception(error)), "error.txt")
        killed = isinstance(error, KeyboardInterrupt | SIGTERMException)
        client.set_terminated(self.run_id, "KILLED" if killed else "FAILED" if error else "FINISHED")

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
        if self._images and 0 < seconds < time.perf_counter():  # an epoch that was begun by another process has no start
            pl_module.log("train/images_per_second", self._images / seconds)

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
