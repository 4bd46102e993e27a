"""The commands that users start: one file for each task and each tool."""

import os
import sys

from pipelines.engine.process import Deferring

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its import would ask the network what to report
sys.meta_path.insert(0, Deferring)
