"""The commands that users start: one file for each task and each tool."""

import os
import sys

from pipelines.engine.process import Deferring, is_command

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its import would ask the network what to report
if is_command():  # not in a program or a notebook of yours
    sys.meta_path.insert(0, Deferring)
