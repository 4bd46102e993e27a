"""The commands that users start: one file for each task and each tool."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its import would ask the network what to report
