"""The MLflow model registry: what a registered model contains, and how it is promoted and found."""

import base64
import hashlib
import io
import tempfile
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import torch
import yaml
from jsonargparse import auto_cli
from mlflow.entities.model_registry import ModelVersion
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import load_file, save_file

import modules
from modules import VisionModule

ROOT = Path(__file__).parents[1]
NEEDED = (
    "albumentations", "jsonargparse", "lightning", "matplotlib", "mlflow", "numpy", "opencv-python-headless", "pandas",
    "pillow", "pyarrow", "safetensors", "scikit-learn", "timm", "torch", "torchmetrics", "torchvision",
)  # fmt: skip


def save_model(folder: Path, module: VisionModule, preprocessing: dict[str, Any], task: str) -> None:
    """Writes a model as data: ``model.safetensors`` and ``architecture.yaml``. Nothing in it is code.

    Args:
        folder: where; it is made.
        module: the trained module.
        preprocessing: what turns a picture into its input.
        task: name of the task.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in module.state_dict().items()}, folder / "model.safetensors")
    description = {
        "task": task,
        "class": type(module).__name__,
        "module": module.architecture,
        "preprocessing": preprocessing,
    }
    (folder / "architecture.yaml").write_text(yaml.safe_dump(description, sort_keys=False, allow_unicode=True))


def load_model(folder: Path) -> tuple[VisionModule, dict[str, Any]]:
    """Rebuilds what `save_model` wrote.

    Returns:
        The module in evaluation mode, and its preprocessing.
    """
    description = yaml.safe_load((folder / "architecture.yaml").read_text())
    if description["class"] not in modules.__all__:
        raise ValueError(f"{folder} holds a {description['class']}, which this version of Fovea does not know.")
    module: VisionModule = getattr(modules, description["class"])(**description["module"])
    module.load_state_dict(load_file(folder / "model.safetensors"))
    return module.eval(), description["preprocessing"]


def register(
    name: str, module: VisionModule, data: Any, task: str, run_id: str, metrics: dict[str, float]
) -> ModelVersion:
    """Registers a trained module as a new version.

    Args:
        name: name of the registered model.
        module: the module with the weights to keep.
        data: the data module it learned from; says how pictures are prepared.
        task: name of the task.
        run_id: the run that trained it.
        metrics: its figures, kept as tags of the version.

    Returns:
        The new version.
    """
    example = pd.DataFrame({"image": [_example(data)]})
    with tempfile.TemporaryDirectory() as temporary, mlflow.start_run(run_id=run_id):
        folder = Path(temporary, "model")
        save_model(folder, module, data.preprocessing, task)
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "pipelines" / "pyfunc.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(ROOT / package) for package in ("modules", "datamodules", "pipelines")],
            pip_requirements=[f"{package}=={installed(package)}" for package in NEEDED],
            input_example=example,
            registered_model_name=name,
        )
    client = MlflowClient()
    version = client.get_model_version(name, str(info.registered_model_version))
    digest = hashlib.blake2b("".join(s.digest for s in data.sources.values()).encode(), digest_size=16).hexdigest()
    tags = {"task": task, "data": data.name, "data_digest": digest, "monitor": module.monitor, "mode": module.mode}
    for key, value in (tags | {key: f"{value:.6f}" for key, value in metrics.items()}).items():
        client.set_model_version_tag(name, version.version, key.replace("/", "."), value)
    return version


def _example(data: Any) -> str:
    """A picture of the data as a PNG in base64, for the model's page and for a first request to a server."""
    image = next(iter(data.sources.values()))[0]["image"]
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def promote(name: str, version: str | None = None, alias: str = "champion", force: bool = False) -> str:
    """Gives a version an alias, if it beats the version that has it now.

    Compared is the monitored metric on the test split, as the versions' tags hold it; it only means something where
    both were measured on the same data.

    Args:
        name: the registered model.
        version: its version; the newest by default.
        alias: the alias.
        force: promote whatever the figures say.

    Returns:
        What was done, and why.

    Raises:
        ValueError: there is no such model.
    """
    client = MlflowClient()
    versions = {str(v.version): v for v in client.search_model_versions(f"name='{name}'")}
    if not versions:
        known = ", ".join(model.name for model in client.search_registered_models()) or "none"
        raise ValueError(f"No model {name!r} is registered in {mlflow.get_registry_uri()}; registered are: {known}.")
    candidate = versions.get(str(version) if version else max(versions, key=int))
    if candidate is None:
        raise ValueError(f"{name} has no version {version}; it has {', '.join(sorted(versions, key=int))}.")
    current = client.get_registered_model(name).aliases.get(alias)
    champion = versions.get(str(current)) if current else None
    why = "there was none before" if champion is None else "forced"
    if champion is not None and champion.version != candidate.version and not force:
        key = candidate.tags.get("monitor", "").replace("val/", "test.")
        new, old = (float(v.tags.get(key, "nan")) for v in (candidate, champion))
        if candidate.tags.get("data_digest") != champion.tags.get("data_digest"):
            return f"Kept {name} version {champion.version} as {alias}: version {candidate.version} was measured on other data."
        better = new > old if candidate.tags.get("mode") == "max" else new < old
        why = f"{key} {new} against {old} of version {champion.version}"
        if not better:
            return f"Kept {name} version {champion.version} as {alias}: {why} is not better."
    client.set_registered_model_alias(name, alias, candidate.version)
    client.set_model_version_tag(name, candidate.version, f"promoted.{alias}", why)
    return f"{name} version {candidate.version} is {alias}: {why}."


def load(address: str, device: str = "cpu") -> Any:
    """Looks up a registered model.

    Args:
        address: ``models:/name@alias`` or ``models:/name/version``.
        device: where it shall run.

    Returns:
        Its `pipelines.pyfunc.VisionModel`, whose ``predict(None, images)`` takes paths, bytes, arrays and pictures.

    Raises:
        ValueError: there is no such model.
    """
    try:
        model = mlflow.pyfunc.load_model(address).unwrap_python_model()
    except mlflow.MlflowException as error:
        raise ValueError(f"{address} is not in the registry {mlflow.get_registry_uri()}: {error.message}") from None
    model.module.to(torch.device(device))
    return model


if __name__ == "__main__":
    try:
        print(auto_cli({"promote": promote}, as_positional=True))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
