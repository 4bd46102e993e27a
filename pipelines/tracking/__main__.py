"""Sends pending records to MLflow: ``python -m pipelines.tracking OUTPUT``."""

import json
from pathlib import Path

from pipelines.engine.command import command
from pipelines.tracking.redaction import redact, without_login


def send(output: Path) -> str:
    """Sends to MLflow what a training could not send.

    Args:
        output: folder of the training.

    Returns:
        How it went.

    Raises:
        ValueError: it is no folder of a training, or the server still does not answer.
    """
    import mlflow
    from mlflow.tracking import MlflowClient

    from pipelines.engine.disk import held
    from pipelines.engine.folders import RUN_FILE
    from pipelines.tracking.client import TrackingError, reach
    from pipelines.tracking.journal import Journal
    from pipelines.tracking.logger import run_id_of

    if not (output / RUN_FILE).exists():
        raise ValueError(f"{output.resolve()} is not the folder of a training: it has no {RUN_FILE}.")
    run_id, uri = run_id_of(output), json.loads((output / RUN_FILE).read_text())["tracking_uri"]
    if without_login(mlflow.get_tracking_uri()) == uri:
        uri = mlflow.get_tracking_uri()  # which may have the login
    try:
        reach(uri)
    except TrackingError:
        raise ValueError(f"MLflow at {redact(uri)} still does not accept it: it does not answer.") from None
    with held(output):
        journal = Journal(output, run_id, MlflowClient(uri))
        if journal.close(patience=5):
            raise ValueError(f"MLflow at {redact(uri)} still does not accept it: {redact(str(journal.error))[:300]}")
    return f"All of {output} is in run {journal.run_id}."


if __name__ == "__main__":
    command(send, name="tracking")
