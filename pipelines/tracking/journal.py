"""Write-ahead journal: a training's records go to disk first and are sent to MLflow by a separate thread."""

import json
import os
import shutil
import threading
import time
import uuid
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from mlflow.entities import Metric
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient
from mlflow.tracking.multimedia import COMPRESSED_IMAGE_SIZE
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_IMAGES
from PIL import Image

from pipelines.engine.disk import DiskError, disk_error
from pipelines.tracking.redaction import redact

SENT_FILE = "journal.sent"
BATCH_LIMIT = 1000  # records that are sent together, as MLflow takes so many metrics in a request
PATIENCE = 60  # seconds that a finished training waits for a server that does not answer
GATHER = 5.0  # seconds in which records gather before they are sent, since each request has its price
REFUSED = "INVALID_PARAMETER_VALUE"  # MLflow's word for what it will never take
ABSENT = "RESOURCE_DOES_NOT_EXIST"
RESERVE = 1 << 18  # bytes that are freed when the disk is full, so that there is room for how the run ended

# It tries again by itself, and must learn soon that it has to: MLflow's own way takes minutes.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")


class RunGoneError(ValueError):
    """The run was deleted; the message says how to restore it."""


class UnreadableError(ValueError):
    """A file to be sent cannot be read."""


class Journal:
    """Records for an MLflow run, written to disk before they are sent, so that neither a kill nor a lost server loses
    any.

    ``journal.jsonl`` in the output folder has a line for each metric, picture, file and status; ``journal.sent`` holds
    how many bytes of it the server has taken. A thread sends what is new, every five seconds at most, and tries again as long
    as it must. Lines that are torn, as by a machine that lost its power, are passed over. A run that was deleted is waited
    for like a server that does not answer.

    When the disk is full, ``fault`` says so, and a reserve is freed in which there is room for how the run ended.

    Args:
        output: folder of the training.
        run_id: the run.
        client: MLflow's client.
    """

    def __init__(self, output: Path, run_id: str, client: MlflowClient) -> None:
        self.output, self.run_id, self.client = output, run_id, client
        self.file, self._mark = output / "journal.jsonl", output / SENT_FILE
        self.error: Exception | None = None
        self.refused = 0  # entries that the server will never take
        self.last: dict[str, int] = {}  # the last step of each metric and picture
        self.fault: DiskError | None = None
        self.status: str | None = None  # that an earlier process wrote last
        lines = self.file.read_bytes() if self.file.exists() else b""
        lines = lines[: lines.rfind(b"\n") + 1]  # a kill may have cut the last line
        for line in lines.splitlines():
            entry = _entry(line)
            if "step" in entry:
                self.last[entry["key"]] = max(entry["step"], self.last.get(entry["key"], entry["step"]))
            if entry.get("kind") == "status":
                self.status = entry["value"]
        self._written = len(lines)
        mark = self._mark.read_bytes().strip() if self._mark.exists() else b""
        self._sent = min(int(mark), self._written) if mark.isdigit() else 0
        self._mark_stream = self._mark.open("r+b" if self._mark.exists() else "wb", buffering=0)
        self._stream = self.file.open("r+b" if self.file.exists() else "wb", buffering=0)
        self._stream.truncate(self._written)
        self._stream.seek(self._written)
        self._reserve = output / ".reserve"
        with suppress(OSError):
            self._reserve.write_bytes(os.urandom(RESERVE))
        self._news = threading.Condition()
        self._closing = self._hurry = self._gave_up = self._tagged = False
        self._progress = time.monotonic()
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def write(self, entry: dict[str, Any]) -> None:
        """Adds a record. A metric of a step that its series already has is dropped: an earlier process wrote it."""
        with self._news:
            if "step" in entry:
                if entry["step"] <= self.last.get(entry["key"], -2):
                    return
                self.last[entry["key"]] = entry["step"]
            if self.fault is None and not os.fstat(self._stream.fileno()).st_nlink:
                self.fault = DiskError(
                    f"{self.file.parent.absolute()} was removed while this command wrote to it, with all checkpoints until then: "
                    "give the command again, with another --output if something else removes that folder."
                )
            line = json.dumps(entry | {"timestamp": int(time.time() * 1000)}).encode() + b"\n"
            idle = self._sent == self._written
            try:
                self._append(line)
            except OSError as error:
                self.fault = self.fault or disk_error(error, self.file)
                if self.fault is None:
                    raise
                self._reserve.unlink(missing_ok=True)
                with suppress(OSError):
                    self._append(line)
            if idle:
                self._news.notify_all()

    def _append(self, line: bytes) -> None:
        """Appends a line, all or nothing."""
        rest = line
        try:
            while rest:  # as a disk that becomes full takes a part
                rest = rest[self._stream.write(rest) :]
        except OSError:
            self._stream.truncate(self._written)
            self._stream.seek(self._written)
            raise
        self._written += len(line)

    def wait(self, patience: float | None = None) -> int:
        """Waits until everything is sent, or for a few seconds if the server does not respond.

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
                silent = time.monotonic() - max(start, self._progress)
                if isinstance(self.error, RunGoneError) or (self.error is not None and silent > patience):
                    self._gave_up = True
                    break
                self._news.notify_all()
                self._news.wait(0.05)
            self._hurry = False
            return self._written - self._sent

    def close(self, patience: float | None = None) -> int:
        """Waits as in `wait`, which Ctrl-C cuts short, and stops the thread."""
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
        self._reserve.unlink(missing_ok=True)
        return left

    def _send_all(self) -> None:
        pause = 0.5
        with self.file.open("rb") as reader:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._closing or self._sent < self._written)
                    self._news.wait_for(lambda: self._closing or self._hurry, GATHER)
                    if self._closing:
                        return
                    end = self._written
                reader.seek(self._sent)
                lines = reader.read(min(end - self._sent, 1 << 20)).splitlines(keepends=True)
                if not lines[-1].endswith(b"\n"):
                    lines.pop()
                try:
                    for start in range(0, len(lines), BATCH_LIMIT):
                        self._send(lines[start : start + BATCH_LIMIT])
                except Exception as error:
                    if self.error is None:
                        what = "The run was deleted" if isinstance(error, RunGoneError) else "MLflow does not answer"
                        rank_zero_warn(
                            f"{what}; the training goes on, and sending is tried again. ({redact(str(error))[:300]})"
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
        """Sends complete lines: the metrics in one request, then the others in order.

        What was sent, but not marked as sent, is sent again: each entry is such that MLflow then has it once.
        """
        entries = [_entry(line) for line in lines]
        metrics = [
            Metric(entry["key"], float(entry["value"]), entry["timestamp"], entry["step"])
            for entry in entries
            if entry.get("kind") == "metric"
        ]
        if metrics:
            self._send_metrics(metrics)
        last = {(entry["file"], entry["folder"]): entry for entry in entries if entry.get("kind") == "file"}
        for entry, line in zip(entries, lines, strict=True):
            other = entry.get("kind") not in (None, "metric")
            # A file is sent once, as it is by now.
            if other and last.get((entry.get("file"), entry.get("folder")), entry) is entry:
                try:
                    self._send_other(entry)
                except (FileNotFoundError, UnreadableError, MlflowException) as error:
                    if isinstance(error, MlflowException):
                        self._check_refusal(error)
                    self._note_refusal(entry.get("key") or entry.get("file", ""), error)
            self._sent += len(line)
            if other or line is lines[-1]:
                self._progress = time.monotonic()
                os.pwrite(self._mark_stream.fileno(), b"%020d" % self._sent, 0)  # in one piece, whenever a kill comes

    def _send_metrics(self, metrics: list[Metric]) -> None:
        try:
            self.client.log_batch(self.run_id, metrics=metrics)
        except MlflowException as error:
            self._check_refusal(error)
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
            stem = "{}+step+{step}+timestamp+{timestamp}+{}".format(entry["key"].replace("/", "~"), unique, **entry)
            try:
                with Image.open(self.output / entry["file"]) as picture:
                    picture.load()
            except (OSError, SyntaxError) as error:
                raise UnreadableError(f"{entry['file']} is no whole picture: {error}") from None
            with TemporaryDirectory() as folder:
                whole, small = Path(folder, f"{stem}.png"), Path(folder, f"{stem}+compressed.webp")
                shutil.copyfile(self.output / entry["file"], whole)
                # MLflow's own enlarges small ones, and both take three times as long by default as so.
                picture.thumbnail((COMPRESSED_IMAGE_SIZE, COMPRESSED_IMAGE_SIZE), reducing_gap=1)
                picture.save(small, method=0)
                client.log_artifact(run_id, str(whole), "images")
                client.log_artifact(run_id, str(small), "images")
            if not self._tagged:
                client.set_tag(run_id, MLFLOW_LOGGED_IMAGES, "True")
                self._tagged = True
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

    def _check_refusal(self, error: MlflowException) -> None:
        """Skips a record that MLflow will never accept, unless the run was deleted and can be restored."""
        if error.error_code not in (REFUSED, ABSENT):
            raise error
        restore = f"restore it with: mlflow runs restore --run-id {self.run_id}"
        try:
            if self.client.get_run(self.run_id).info.lifecycle_stage != "active":
                raise RunGoneError(f"Run {self.run_id} was deleted: {restore}.") from error
        except MlflowException as gone:
            if gone.error_code == ABSENT:
                raise RunGoneError(
                    f"Run {self.run_id} no longer exists: the training's command, given again with --output {self.output}, puts "
                    "everything into a new run."
                ) from error
            raise
        if error.error_code == ABSENT:
            raise error

    def _note_refusal(self, name: str, error: Exception) -> None:
        self.refused += 1
        if self.refused == 1:
            rank_zero_warn(f"MLflow does not accept {name}, which is left out of the run: {redact(str(error))[:300]}")


def _entry(line: bytes) -> dict[str, Any]:
    """Parses a line of the journal; None for a torn line."""
    try:
        entry = json.loads(line)
    except ValueError:
        return {}
    return entry if isinstance(entry, dict) and "kind" in entry and "timestamp" in entry else {}


class MachineMonitor(SystemMetricsMonitor):
    """MLflow's system-metrics monitor, writing to a journal; MLflow's own stops at the first failed request.

    Args:
        journal: of the run.
    """

    def __init__(self, journal: Journal) -> None:
        super().__init__(journal.run_id)
        self.journal = journal
        steps = [step for key, step in journal.last.items() if key.startswith(self._metrics_prefix)]
        self._logging_step = max(steps, default=-1) + 1

    def monitor(self) -> None:
        """Samples until stopped."""
        while True:
            for _ in range(self.samples_before_logging):
                self.collect_metrics()
                if self._shutdown_event.wait(self.sampling_interval):
                    return
            self.publish_metrics(self.aggregate_metrics())

    def publish_metrics(self, metrics: dict[str, float]) -> None:
        """Writes samples to the journal."""
        prefix = self._metrics_prefix + (f"{self.node_id}/" if self.node_id else "")
        for key, value in metrics.items():
            self.journal.write({"kind": "metric", "key": prefix + key, "value": value, "step": self._logging_step})
        self._logging_step += 1
        for monitor in self.monitors:
            monitor.clear_metrics()
