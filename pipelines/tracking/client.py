"""MLflow's client with short time-outs and clear errors."""

import errno
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import mlflow
import requests
from filelock import FileLock
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from sqlalchemy.exc import SQLAlchemyError

from pipelines.engine.command import UsageError
from pipelines.engine.disk import disk_error
from pipelines.tracking.redaction import redact

PATIENCE = 5  # seconds in which a server must say that it is there


class TrackingError(UsageError):
    """MLflow cannot be reached or rejects the run; the message says what to do."""


@contextmanager
def needed() -> Iterator[None]:
    """Context that turns MLflow's errors into one paragraph, for commands that cannot continue without it.

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
        if "out-of-date database schema" in str(error):  # older ones are brought up to date
            raise TrackingError(
                f"The tables of {uri} are of another version of MLflow than {mlflow.__version__}, which is here: install that version, or "
                "name another store with MLFLOW_TRACKING_URI."
            ) from error
        raise TrackingError(f"MLflow at {uri} refuses: {redact(str(error))}") from error
    except SQLAlchemyError as error:  # of the embedded store
        raise TrackingError(
            f"{redact(mlflow.get_tracking_uri())} cannot be used as MLflow's store ({getattr(error, 'orig', error)}): put a copy "
            "of it back, or name another with MLFLOW_TRACKING_URI."
        ) from error
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise TrackingError(
                f"MLflow cannot write {error.filename} ({error.strerror}). Without a server, it keeps runs in the current folder: start the "
                "command in one that you may write to, or name a server with MLFLOW_TRACKING_URI."
            ) from error
        raise disk_error(error, Path(tempfile.gettempdir(), "what is to be sent")) or error from None


@needed()
def reach(*uris: str) -> None:
    """Checks within a few seconds that MLflow responds; its own client would retry for minutes.

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
    """An MLflow client; prepares the embedded store for its first use.

    MLflow makes a new store's tables when it is first opened, and fails where two processes do so at the same moment: here
    they take turns.

    Raises:
        TrackingError: MLflow does not answer.
    """
    reach()
    file = Path(mlflow.get_tracking_uri().removeprefix("sqlite:///"))
    if not mlflow.get_tracking_uri().startswith("sqlite:///") or not file.parent.is_dir():
        return MlflowClient()
    with ExitStack() as turn:
        try:
            turn.enter_context(FileLock(f"{file}.lock"))
        except OSError:
            if not file.exists():  # else somebody else's, which may be read
                raise
        return MlflowClient()


@contextmanager
def active_run(experiment: str, name: str) -> Iterator[mlflow.ActiveRun]:
    """MLflow's active run of an experiment's id. A signal or Ctrl-C ends it as KILLED, like that of a training."""
    from pipelines.engine.signals import stopped

    with mlflow.start_run(experiment_id=experiment, run_name=name) as run:
        try:
            yield run
        except BaseException as error:
            if stopped(error):
                mlflow.end_run("KILLED")
            raise


def stage_of(run_id: str) -> str | None:
    """Lifecycle stage of a run, ``active`` or ``deleted`` (it can be restored); None if the store does not know the
    id."""
    try:
        return str(MlflowClient().get_run(run_id).info.lifecycle_stage)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None


def experiment_id(client: MlflowClient, name: str) -> str:
    """Id of the experiment of a name; the first of several processes creates it.

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
