"""The logger of a tracked run; it sends to MLflow through the journal."""

import json
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import mlflow
import yaml
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT, MLFLOW_RUN_NAME
from PIL import Image

from pipelines.engine.disk import LockError, held, whole, write_text
from pipelines.engine.folders import RUN_FILE
from pipelines.engine.signals import stopped
from pipelines.engine.terminal import say
from pipelines.tracking.client import TrackingError, experiment_id, needed, stage_of, tracking_client
from pipelines.tracking.journal import SENT_FILE, Journal, MachineMonitor
from pipelines.tracking.provenance import _git, _provenance, flatten, packages
from pipelines.tracking.redaction import redact, without_login

PARAM_LIMIT = 6000  # MLflow's, in characters

os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # the table at the end has it


class RunLogger(Logger):
    """Logs a training to one MLflow run, from rank zero, without delaying the training.

    The run is the one named in the output folder's ``run.json`` (a training that goes on), else the one that
    ``MLFLOW_RUN_ID`` names (made by ``mlflow run``), else a new one; also that of a copy of a training's folder. Metrics, pictures and tables go through a `Journal`:
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
        """Name of the experiment."""
        return self._experiment_name

    @property
    def version(self) -> str | None:
        """Id of the run."""
        return self.run_id

    @property
    def save_dir(self) -> str:
        """Output folder."""
        return str(self.output)

    @property
    @rank_zero_experiment
    def experiment(self) -> MlflowClient:
        """The MLflow client; the first access starts or continues the run."""
        if self.run_id is None:
            self._start()
        return self._client

    @needed()
    def _start(self) -> None:
        uri = mlflow.get_tracking_uri()
        self._client = client = tracking_client()
        self._hold.enter_context(held(self.output))
        record = {"tracking_uri": without_login(uri), "folder": str(self.output.resolve())}
        saved, given, run_name = self.output / RUN_FILE, os.environ.get("MLFLOW_RUN_ID"), redact(self._run_name)
        before: dict[str, str] = {}
        if saved.exists():
            own = run_id_of(self.output)
            before = json.loads(saved.read_text()) | {"run_id": own}
        original = _original(before, record)
        lost = bool(before) and not original and not self._has_run(before["run_id"], before.get("tracking_uri"))
        if before and not original and not lost:
            run_id = before["run_id"]
            if given and given != run_id:
                client.set_tag(given, "continues", run_id)
        elif given:
            run_id = given
            client.set_tag(given, MLFLOW_RUN_NAME, run_name)
        else:
            run_id = client.create_run(experiment_id(client, self._experiment_name), run_name=run_name).info.run_id
        if original:
            say(
                f"{self.output} is a copy of {original}, whose run stays as it is: a new run gets everything "
                "recorded so far, and what follows."
            )
            self.tags["copy_of"] = before["run_id"]
        elif lost:
            say(
                f"{record['tracking_uri']} no longer has the run of {self.output}, as where its database was removed: a new "
                "run gets everything recorded so far, and what follows."
            )
        elif not before and (self.output / SENT_FILE).exists():
            say(f"{self.output} no longer says which run is its own: a new one gets everything recorded so far.")
        if original or lost or not before:
            (self.output / SENT_FILE).unlink(missing_ok=True)
        tags = redact(self.tags | _provenance())
        client.log_batch(run_id, tags=[RunTag(key, str(value)[:PARAM_LIMIT]) for key, value in tags.items()])
        self._experiment_id = client.get_run(run_id).info.experiment_id
        if before != (record := {"run_id": run_id, **record}):
            write_text(saved, json.dumps(record))
        self.journal = Journal(self.output, run_id, client)
        if before:  # in this order with what an earlier process could not send
            self.journal.write({"kind": "status", "value": "RUNNING"})
            self.journal.write({"kind": "tag", "key": "error", "value": None})
        self._machine = MachineMonitor(self.journal)
        self._machine.start()
        self.run_id = run_id

    def _has_run(self, run_id: str, uri: str | None) -> bool:
        """Whether the store still has the run of a resumed training.

        Raises:
            TrackingError: it was deleted, or is in another store.
        """
        stage, here = stage_of(run_id), without_login(mlflow.get_tracking_uri())
        if stage not in ("active", None):
            raise TrackingError(
                f"The run of {self.output}, {run_id}, was deleted: restore it with `mlflow runs restore --run-id "
                f"{run_id}`, or choose another --output."
            )
        if stage is None and uri != here:
            raise TrackingError(
                f"{self.output} belongs to run {run_id} in {uri or 'another store'}, which {redact(here)} does not have: set "
                "MLFLOW_TRACKING_URI to the former, or choose another --output."
            )
        return stage is not None

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs the metrics of a step.

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
        """Does nothing: the command line logs its whole configuration with `log_config`."""

    def _kept(self, file: Path, write: Callable[[Path], object]) -> bool:
        """Writes a file that is only for viewing and returns whether it exists. If the disk refuses it, the training
        continues without it or with the previous one."""
        try:
            with whole(self.output / file) as part:
                write(part)
        except OSError as error:
            if not self._told:
                rank_zero_warn(f"Left out of the run, which goes on without: {error}")
            self._told = True
        return (self.output / file).exists()

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        """Logs pictures, uint8 H×W×3, as points of the series ``key``."""
        _ = self.experiment
        for number, image in enumerate(images):
            file = Path("pictures", f"{key.replace('/', '_')}-{step or 0}{f'-{number}' if number else ''}.png")
            if self._kept(file, Image.fromarray(image).save):
                self.journal.write({"kind": "picture", "key": key, "step": step or 0, "file": str(file)})

    @rank_zero_only
    def log_film(self, key: str, frames: Iterable[Any], milliseconds: int = 50) -> None:
        """Logs pictures, uint8 H×W×3, as a GIF with the given duration per picture; replaces an earlier one of this
        key."""
        first, *others = map(Image.fromarray, frames)
        file = Path(f"{key.replace('/', '_')}.gif")
        options: dict[str, Any] = {"save_all": True, "append_images": others, "duration": milliseconds, "loop": 0}
        if self._kept(file, lambda part: first.save(part, "GIF", **options)):
            self.log_file(self.output / file, "films")

    @rank_zero_only
    def log_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int | None = None) -> None:
        """Logs a table as a JSON artifact; replaces an earlier one of this key."""
        file = Path("tables", f"{key.replace('/', '_')}.json")
        if self._kept(file, lambda part: part.write_text(json.dumps({"columns": columns, "data": rows}))):
            self.log_file(self.output / file, "tables")

    @rank_zero_only
    def log_text(self, key: str, text: str) -> None:
        """Logs a Markdown text as an artifact."""
        file = Path(f"{key}.md")
        if self._kept(file, lambda part: part.write_text(text)):
            self.log_file(self.output / file, "")

    @rank_zero_only
    def set_tag(self, key: str, value: str) -> None:
        """Sets a tag of the run."""
        _ = self.experiment
        self.journal.write({"kind": "tag", "key": key, "value": redact(value)[:PARAM_LIMIT]})

    @rank_zero_only
    @needed()
    def log_config(self, config: str) -> None:
        """Logs the resolved configuration: as a YAML artifact, and flattened as parameters."""
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
        """Logs the installed packages and the uncommitted changes."""
        client = self.experiment
        client.log_text(
            self.run_id, "\n".join([f"# Python {platform.python_version()}", *packages()]), "environment.txt"
        )
        if difference := _git("diff", "HEAD"):
            client.log_text(self.run_id, redact(difference), "uncommitted.diff")

    @rank_zero_only
    @needed()
    def log_data(self, data: Any) -> None:
        """Logs the data set and the files that were left out of it."""
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
        """Logs a file of the output folder."""
        _ = self.experiment
        self.journal.write({"kind": "file", "file": str(file.relative_to(self.output)), "folder": folder})

    def flush(self) -> bool:
        """Waits until everything is sent, as far as the server responds; returns whether it is."""
        _ = self.experiment
        return not self.journal.wait()

    def finish(self, error: BaseException | None = None) -> None:
        """Ends the run with its status: FINISHED, KILLED (Ctrl-C, SIGTERM) or FAILED, with the error."""
        if getattr(rank_zero_only, "rank", 0):
            if error is not None:
                with suppress(ValueError, OSError):  # it is told in any case
                    self._stand_in(error)
            return
        if self.run_id is None:  # it never began
            self._hold.close()
            return
        self._machine.finish()
        killed = stopped(error)
        if error is not None:
            self.set_tag("error", f"{type(error).__name__}: {error}")
        if error is not None and not killed:
            with suppress(OSError):  # of which the error may be the cause
                write_text(self.output / "error.txt", redact("".join(traceback.format_exception(error))))
                self.log_file(self.output / "error.txt", "")
        status = "KILLED" if killed else "FAILED" if error else "FINISHED"
        self.journal.write({"kind": "status", "value": status})
        if self.journal.close():
            why = redact(str(self.journal.error))[:300]
            rank_zero_warn(
                f"MLflow did not accept all of the run ({why}). What is left is kept in {self.output}; "
                f"once it answers, send it with: python -m pipelines.tracking {self.output}"
            )
        elif error is None:
            (self.output / "error.txt").unlink(missing_ok=True)  # of an attempt before
        self._hold.close()

    @needed()
    def _stand_in(self, error: BaseException) -> None:
        """Ends the run for the first process, where that was killed: as long as it lives, it holds the folder."""
        if not (self.output / RUN_FILE).exists():
            return
        with ExitStack() as hold:
            for attempt in range(10):  # the connection is closed a moment before the hold is
                try:
                    hold.enter_context(held(self.output))
                    break
                except LockError:
                    if attempt == 9:
                        return
                    time.sleep(0.1)
            journal = Journal(self.output, run_id_of(self.output), tracking_client())
            if journal.status in (None, "RUNNING"):
                message = f"the first process of the job was killed; of another: {type(error).__name__}: {error}"
                journal.write({"kind": "tag", "key": "error", "value": redact(message)[:PARAM_LIMIT]})
                journal.write({"kind": "status", "value": "FAILED"})
            journal.close(patience=5)

    def address(self) -> str:
        """Where to see the run: its page on a server, or its id in the embedded store."""
        uri = without_login(mlflow.get_tracking_uri())
        if uri.startswith("http"):
            return f"{uri}/#/experiments/{self._experiment_id}/runs/{self.run_id}"
        return f"{self.run_id} in {uri}"


def _original(before: Mapping[str, str], here: Mapping[str, str]) -> str | None:
    """The folder that this one was copied from, if it still exists and both have the same run in the same store.

    Args:
        before: what the folder says of itself.
        here: where it is, and its store.
    """
    place = before.get("folder")
    if place is None or before.get("tracking_uri") != here["tracking_uri"] or not Path(place, RUN_FILE).exists():
        return None
    if os.path.samefile(place, here["folder"]) or run_id_of(place) != before["run_id"]:
        return None
    return place


def run_id_of(output: str | Path) -> str:
    """Id of the run of the training in an output folder.

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
