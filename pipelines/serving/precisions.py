"""ONNX files in lower precision: fp16, or int8 calibrated on training data; with the accuracy lost and time gained."""

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from onnxruntime.transformers.float16 import convert_float_to_float16
from torch import Tensor
from typing_extensions import override

from datamodules import DetectionDataModule, VisionDataModule
from modules import VisionModule
from pipelines.serving.exporting import session_of
from pipelines.serving.exports.base import Exported
from pipelines.serving.formats import Precision
from pipelines.serving.store import load_model

CALIBRATED = 256  # training images whose activations set the ranges of int8
COMPARED = 64  # validation images on which answers are compared
QUANTIZED = ["Conv", "ConvTranspose", "Gemm", "MatMul"]  # where the time goes; the rest stays exact
ROUNDS = 15  # of timing


class _Calibration(CalibrationDataReader):
    """Calibration inputs, one picture at a time."""

    def __init__(self, inputs: Mapping[str, NDArray[Any]]) -> None:
        self.rows: Iterator[dict[str, NDArray[Any]]] = _each(inputs)

    @override
    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self.rows, None)


def _each(inputs: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
    """Splits a batch of inputs into single pictures, 1×…."""
    count = len(next(iter(inputs.values())))
    return ({name: values[k : k + 1] for name, values in inputs.items()} for k in range(count))


def inputs_of(
    network: Exported, module: VisionModule, data: VisionDataModule, split: str, count: int
) -> dict[str, NDArray[Any]]:
    """Inputs of a file from a data split: pictures and whatever else the file takes; noise if it takes no pictures."""
    batch = data.samples(split, count)
    example = dict(zip(network.inputs, network.example(module, count), strict=True))
    if "image" in example:
        given = {"image": batch["image"], **{key: batch[key] for key in example.keys() & {"length", "tabular"}}}
        if "domain" in example:
            given["domain"] = example["domain"][: len(batch["image"])]
    else:
        given = example
    return {name: x.numpy() for name, x in zip(given, network.given(*given.values()), strict=True)}


def reduced(file: Path, new: Path, precision: Precision, inputs: Mapping[str, NDArray[Any]]) -> None:
    """Converts an ONNX file to lower precision; the types of inputs and outputs and the metadata are kept.

    Args:
        file: the one in float32.
        new: the one to write.
        precision: ``fp16``, half precision; ``int8``, whole numbers for weights, a scale for each channel, and for what goes
            into and comes out of convolutions and matrix products.
        inputs: of the pictures that set the ranges of ``int8``.
    """
    exact = onnx.load(str(file))
    with warnings.catch_warnings(), _root_logger_quiet(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        if precision == "fp16":
            written = convert_float_to_float16(exact, keep_io_types=True)
            _drop_copies(written.graph)
        else:
            prepared = Path(folder, "prepared.onnx")
            onnxruntime.set_default_logger_severity(3)
            quant_pre_process(str(file), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(new),
                _Calibration(inputs),
                QuantFormat.QDQ,
                QUANTIZED,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            written = onnx.load(str(new))
    onnx.helper.set_model_props(written, {entry.key: entry.value for entry in exact.metadata_props})
    onnx.save(written, str(new))


@contextmanager
def _root_logger_quiet() -> Iterator[None]:
    """Context in which what onnxruntime tells the root logger is not printed, unless somebody listens to that."""
    nobody = logging.NullHandler()
    logging.getLogger().addHandler(nobody)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(nobody)


def _drop_copies(graph: onnx.GraphProto) -> None:
    """Removes duplicate casts that the converter writes, one for each use."""
    written: set[str] = set()
    for node in [*graph.node]:
        if written.issuperset(node.output):
            graph.node.remove(node)
        written.update(node.output)


def compared(
    files: Mapping[str, Path], network: Exported, folder: Path, data: VisionDataModule
) -> dict[str, dict[str, float]]:
    """Metric, latency and size of several precisions of a network, by name.

    Returns:
        Of each file ``megabytes``; the figure that chose the checkpoint, on validation data, where the file can answer in the
        module's place, else ``difference``, the mean distance of its answers to validation pictures from those of the first;
        and ``milliseconds`` for one picture, the least of rounds in which each file has its turn: other work only adds to it.
    """
    sessions = {name: session_of(file) for name, file in files.items()}
    rows = {name: {"megabytes": file.stat().st_size / 1e6} for name, file in files.items()}
    pictures = [*_each(inputs_of(network, load_model(folder)[0], data, "val", COMPARED))]
    exact = None
    for name, session in sessions.items():
        module, _ = load_model(folder)
        if network.stand_in(module, _answers(session, network)):
            rows[name][module.monitor] = _figure(module, data)
        else:
            answers = [session.run(None, one) for one in pictures]
            exact = exact or answers
            rows[name]["difference"] = _apart(exact, answers)
    times: dict[str, list[float]] = {name: [] for name in files}
    for k in range(ROUNDS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, pictures[k % len(pictures)])
            times[name].append(1000 * (time.perf_counter() - start))
    for name, row in rows.items():
        row["milliseconds"] = min(times[name])
    return rows


def _answers(session: InferenceSession, network: Exported) -> Callable[..., list[Tensor]]:
    """An ONNX file as a function of the module's inputs and, by name, of further ones."""

    def run(*given: Tensor, **more: Tensor) -> list[Tensor]:
        inputs = dict(zip(network.inputs, network.given(*given), strict=False)) | more
        return [torch.from_numpy(x) for x in session.run(None, {name: x.numpy() for name, x in inputs.items()})]

    return run


def _figure(module: VisionModule, data: VisionDataModule) -> float:
    """The module's `monitor` on validation data, at the size that a file takes."""
    if isinstance(data, DetectionDataModule) and data.pad_multiple:
        padded = copy.copy(data)
        padded.pad_multiple = None
        data = padded
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(**quiet, accelerator="cpu", devices=1, use_distributed_sampler=False)
    (figures,) = trainer.validate(module, datamodule=data, verbose=False)
    return float(figures[module.monitor])


def _apart(exact: list[Any], answers: list[Any]) -> float:
    """Mean distance between the outputs for several pictures."""
    pairs = [pair for one, two in zip(exact, answers, strict=True) for pair in zip(one, two, strict=True)]
    return float(np.mean([np.abs(a.astype(np.float64) - b).mean() for a, b in pairs]))
