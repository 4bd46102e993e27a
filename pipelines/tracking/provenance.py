"""Provenance of a run: code, machine, environment."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch


def flatten(config: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Flattens nested dictionaries to (dotted key, text) pairs; lists and None are written as JSON."""
    if isinstance(config, dict) and config:
        return [pair for key, value in config.items() for pair in flatten(value, f"{prefix}{key}.")]
    return [(prefix[:-1], config if isinstance(config, str) else json.dumps(config))]


def packages() -> list[str]:
    """The installed packages, as ``name==version``, from the names of their metadata folders; parsing the metadata
    takes half a second."""
    found: dict[str, str] = {}
    for folder in sys.path:  # of two of a name, the first is imported
        for place in (*Path(folder or ".").glob("*.dist-info"), *Path(folder or ".").glob("*.egg-info")):
            if told := re.fullmatch(r"(.+?)-([^-]+)(?:-py[\d.]+)?", place.stem):
                found.setdefault(told[1].replace("_", "-").lower(), told[2])
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _git(*args: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *args]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _provenance() -> dict[str, str]:
    from mlflow.utils.mlflow_tags import MLFLOW_GIT_COMMIT, MLFLOW_SOURCE_NAME

    return {
        MLFLOW_GIT_COMMIT: _git("rev-parse", "HEAD"),
        "git.dirty": str(bool(_git("status", "--porcelain"))).lower(),
        MLFLOW_SOURCE_NAME: Path(sys.argv[0]).name,
        "host": platform.node(),
    }


def surroundings(trainer: L.Trainer) -> dict[str, str]:
    """The environment of a training as tags: devices, processes, launcher, versions."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    launchers = {"TORCHELASTIC_RUN_ID": "torchrun", "SLURM_STEP_ID": "slurm", "MLFLOW_RUN_ID": "mlflow"}
    tags = {
        "devices": f"{trainer.world_size}×{name}",
        "world_size": str(trainer.world_size),
        "launcher": next((launcher for key, launcher in launchers.items() if key in os.environ), "python"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if job := os.environ.get("SLURM_JOB_ID"):
        tags["slurm.job_id"] = job
    return tags
