"""Registration of trained modules as model versions."""

import base64
import io
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import tifffile
import torch
from mlflow.entities import Metric
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import ModelSignature, infer_signature
from mlflow.tracking import MlflowClient
from mlflow.types.schema import AnyType, ColSpec, DataType, Schema
from PIL import Image

from datamodules import VisionDataModule
from datamodules.augmentations import sides
from datamodules.digests import digest_of
from datamodules.options import Preprocessing
from modules import VisionModule
from pipelines.serving.model import VisionModel
from pipelines.serving.registry import versions_of
from pipelines.serving.store import save_model
from pipelines.tracking.client import TrackingError
from pipelines.tracking.journal import RunGoneError
from pipelines.tracking.logger import RunLogger
from pipelines.tracking.redaction import redact

ROOT = Path(__file__).parents[2]
NEEDED = (
    "albumentations", "faiss-cpu", "faster-coco-eval", "filelock", "fsspec", "jsonargparse", "lazy-loader", "lightning", "matplotlib", "mlflow",
    "numpy", "opencv-python-headless", "pandas", "pillow", "psutil", "pyarrow", "pytorch-metric-learning", "rich",
    "safetensors", "scikit-learn", "segmentation-models-pytorch", "tifffile", "timm", "torch", "torchmetrics", "torchvision",
)  # fmt: skip


def _of_parts(module: VisionModule) -> list[str]:
    """Packages besides `NEEDED` that a module's parts come from."""
    makers = {type(part).__module__.partition(".")[0] for part in module.modules()}
    return sorted(makers & {"transformers"})


def check_name(name: str) -> None:
    """Checks that a name is valid for a registered model and for its address ``models:/name@alias``.

    Raises:
        TrackingError: it cannot; the message says why.
    """
    bad = [sign for sign in '/:@#?%"\\' if sign in name] + [repr(sign) for sign in name if not sign.isprintable()]
    if bad or not name.strip() or name != name.strip() or name in (".", ".."):
        why = f"it has {' and '.join(bad)}" if bad else "it is empty, or begins or ends with a space, or is . or .."
        raise TrackingError(
            f"--register {name!r}: MLflow cannot keep a model under this name, since {why}. Choose another."
        )


def register(
    name: str,
    module: VisionModule,
    data: VisionDataModule,
    data_config: dict[str, Any],
    task: str,
    run_id: str,
    metrics: dict[str, float],
    code: Sequence[Path] = (),
) -> ModelVersion:
    """Registers a trained module as a new version.

    Args:
        name: name of the registered model.
        module: the module with the weights to keep.
        data: the data module it learned from; says how pictures are prepared.
        data_config: its class path and arguments.
        task: name of the task.
        run_id: the run that trained it.
        metrics: its figures, kept as tags of the version.
        code: files of the user's own code that the model carries.

    Returns:
        The new version.
    """
    client, measured = MlflowClient(), _measured(run_id, module, data)
    with tempfile.TemporaryDirectory() as temporary, mlflow.start_run(run_id=run_id), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Hint: Inferred schema")  # that whole numbers have no missing ones
        folder = Path(temporary, "model")
        save_model(folder, module, data.preprocessing, task, data_config, code)
        example = pd.DataFrame([{"image": _example(data.preprocessing), **_example_beside(module, data.preprocessing)}])
        info = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(ROOT / "pipelines" / "serving" / "model.py"),
            artifacts={"model": str(folder)},
            code_paths=[str(ROOT / package) for package in ("modules", "datamodules", "pipelines")],
            pip_requirements=[f"{package}=={installed(package)}" for package in (*NEEDED, *_of_parts(module))],
            signature=_signature(module, data.preprocessing, example),
            input_example=example,
            model_type=task,
            step=min((metric.step for metric in measured), default=0),
        )
    # MLflow gives the model what the run logged at its step; this is the rest, for the page on which models are sorted.
    there = {metric.key for metric in client.get_logged_model(info.model_id).metrics or []}
    rest = [metric for metric in measured if metric.key not in there]
    for metric in rest:
        metric._model_id = info.model_id
    client.log_batch(run_id, metrics=rest)
    digest = digest_of("".join(source.digest for source in data.sources.values()).encode())
    tags = {"task": task, "data": data.title, "data_digest": digest, "monitor": module.monitor, "mode": module.mode}
    tags |= {f"digest.{split}": source.digest for split, source in data.sources.items()}
    if labels := module.architecture.get("label_names"):
        tags["labels"] = ", ".join(labels)[:5000]
    if module.licence:  # that of what it started from goes on
        tags["weights_licence"] = module.licence
    tags |= {key.replace("/", "."): f"{value:.6f}" for key, value in metrics.items()}
    version = mlflow.register_model(f"models:/{info.model_id}", name, tags=tags)
    client.update_model_version(name, version.version, _card(module, data, task, run_id, metrics))
    return version


def _measured(run_id: str, module: VisionModule, data: VisionDataModule) -> list[Metric]:
    """Metrics of a run's best checkpoint, with the data set they were measured on."""
    client, identity = MlflowClient(), data.identity()
    histories = {key: client.get_metric_history(run_id, key) for key in client.get_run(run_id).data.metrics
                 if key.partition("/")[0] in identity["splits"] and not key.startswith("train/")}  # fmt: skip
    # Where there was nothing to measure it on, the loss chose.
    monitor, mode = (module.monitor, module.mode) if module.monitor in histories else ("val/loss", "min")
    seen = sorted((m for m in histories.get(monitor, []) if m.value == m.value), key=lambda m: m.step)
    if not seen:
        return []
    losses, sign = {m.step: m.value for m in histories.get("val/loss", [])}, 1 if mode == "max" else -1
    best = max(seen, key=lambda m: (sign * m.value, -losses.get(m.step, 0.0), m.step))  # as `BestCheckpoint` judges
    chosen = [
        metric
        for key, history in histories.items()
        for metric in history
        if metric.step == (best.step if key.startswith("val/") else max(m.step for m in history))
    ]
    return [  # of the same time: they are the run's own, which they must not double
        Metric(m.key, m.value, m.timestamp, m.step, dataset_name=identity["name"],
               dataset_digest=identity["splits"][m.key.partition("/")[0]]["digest"][:36])
        for m in chosen
    ]  # fmt: skip


def _card(module: VisionModule, data: VisionDataModule, task: str, run_id: str, metrics: dict[str, float]) -> str:
    """Model card of a version, in Markdown."""
    architecture = module.architecture
    lines = [
        f"**{task}** with `{architecture['backbone']}`, learned from {data.title} ({data.extent}) in run `{run_id}`.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {key} | {value:.4f} |" for key, value in sorted(metrics.items()) if not key.startswith("train/")),
        "",
    ]
    if labels := architecture.get("label_names"):
        lines += [f"Labels: {', '.join(labels[:50])}{' …' if len(labels) > 50 else ''}.", ""]
    reading = data.preprocessing.reading
    takes = "uint8, as a viewer shows it" if reading.seen else f"{reading.channels} bands of {reading.bits} bits"
    return "\n".join([*lines, f'Takes `{{"image": path, bytes, base64 or array}}`; {takes}.'])


def _example(preprocessing: Preprocessing) -> str | list[float]:
    """A synthetic picture of the right shape, as a base64 PNG (or TIFF for bands), for the model's page and a first
    request; pictures from the data might be private. Zeros for numeric input."""
    if preprocessing.numbers:
        return [0.0] * preprocessing.in_chans
    height, width = sides(preprocessing.image_size)
    down, across = np.mgrid[0 : 255 : height * 1j, 0 : 255 : width * 1j]
    reading = preprocessing.reading
    if not reading.seen:
        count = max(reading.bands or (reading.channels,))
        bands = np.stack([across, down] * count, 2)[..., :count]
        file = io.BytesIO()
        kind = np.uint16 if reading.deep else np.uint8
        tifffile.imwrite(file, np.moveaxis(bands, 2, 0).astype(kind), photometric="minisblack")
        return base64.b64encode(file.getvalue()).decode()
    channels = [across, down, 255 - across, np.full_like(across, 255)][: min(preprocessing.in_chans, 4)]
    buffer = io.BytesIO()
    pixels = np.stack(channels, -1).astype(np.uint8)
    Image.fromarray(pixels[..., 0] if len(channels) == 1 else pixels).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _example_beside(module: Any, preprocessing: Preprocessing) -> dict[str, float]:
    """Tabular inputs for the example image: the means of the training set, and keypoints that do not coincide."""
    height, width = sides(preprocessing.image_size)
    values = {
        name: float(k % width if name.endswith("x") else k * k % height) for k, name in enumerate(preprocessing.columns)
    }
    names, means = module.tabular_names or [], [] if not preprocessing.columns else module.fusion.scaling.mean.tolist()
    return values | {
        name: value for name, value in zip(names, means, strict=True) if name in (preprocessing.tabular or [])
    }


def _signature(module: VisionModule, preprocessing: Preprocessing, example: pd.DataFrame) -> ModelSignature | None:
    """Signature of a model with tabular inputs; None for others, whose signature MLflow infers from the example.

    MLflow would refuse whole numbers where the example has others, and ask for the landmarks that the model finds itself.
    """
    if not preprocessing.columns:
        return None
    answering = VisionModel().take(module, preprocessing)
    beside = [ColSpec(AnyType(), name, name in answering.asks_for) for name in preprocessing.columns]
    answer = infer_signature(example, answering.predict(None, example))
    return ModelSignature(Schema([ColSpec(DataType.string, "image"), *beside]), answer.outputs)


def register_best(name: str, best: Path, logger: RunLogger, register: Callable[[str, str], ModelVersion]) -> str:
    """Registers the best weights of a training, once; if MLflow does not respond, the training is unaffected.

    Returns:
        The registered model's address, or why there is none.
    """
    step = str(torch.load(best, "cpu", weights_only=True, mmap=True)["global_step"])
    step += " (average)" if best.stem == "average" else ""
    try:
        if not logger.flush():
            error = logger.journal.error
            raise ConnectionError(str(error) if isinstance(error, RunGoneError) else "MLflow does not answer.")
        known = [version for version in versions_of(name) if version.run_id == logger.run_id]
        there = [version for version in known if version.tags.get("step") == step]  # it was registered before
        for torn in (version for version in known if not version.tags and not version.aliases):
            MlflowClient().delete_model_version(name, torn.version)  # begun by a command that was cut off
        version = there[0] if there else register(name, str(logger.run_id))
        MlflowClient().set_model_version_tag(name, version.version, "step", step)  # last, so that all of it is there
    except (MlflowException, OSError) as error:
        logger.set_tag("registered", f"no: {error}")
        return (
            f"no: {redact(str(error))[:300]} To register it, give the same command again with "
            f"--output {best.parent}: it does not train again what is trained."
        )
    address = f"models:/{version.name}/{version.version}"
    logger.set_tag("registered", address)
    return address
