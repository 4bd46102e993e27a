"""What a user starts."""

import os

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # its import would ask the network what to report
