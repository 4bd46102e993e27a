"""Export of a trained module to a file, which is opened again and compared with the module."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from datamodules.options import Preprocessing
from modules import (
    AutoencodingModule,
    ClassificationModule,
    DetectionModule,
    FaceNetModule,
    FewShotModule,
    GANModule,
    InstanceSegmentationModule,
    MaskedAutoencodingModule,
    MultiLabelModule,
    MultiTaskModule,
    QLearningModule,
    RegressionModule,
    SegmentationModule,
    SelfSupervisedModule,
    SequenceModule,
    StylizationModule,
    SuperResolutionModule,
    TranslationModule,
    VisionModule,
)
from modules.detection.detector import OneStageDetector
from pipelines.serving import registry
from pipelines.serving.exports.base import Exported
from pipelines.serving.exports.boxes import ExportedDetector, ExportedTwoStage, with_default, with_suppression
from pipelines.serving.exports.embeddings import (
    ExportedAutoencoder,
    ExportedFaceNet,
    ExportedFewShot,
    ExportedMaskedAutoencoder,
)
from pipelines.serving.exports.labels import (
    ExportedClassifier,
    ExportedMultiLabel,
    ExportedQLearning,
    ExportedRegression,
    ExportedSegmenter,
    ExportedSequence,
)
from pipelines.serving.exports.multi_task import ExportedMultiTask
from pipelines.serving.exports.pictures import ExportedEnlarger, ExportedGenerator, ExportedStylizer, ExportedTranslator
from pipelines.serving.formats import Format

METADATA = "metadata.json"  # the extra file of torchscript and pt2
TOLERANCE = 1e-4


EXPORTED: dict[type[VisionModule], type[Exported]] = {
    ClassificationModule: ExportedClassifier,
    MultiLabelModule: ExportedMultiLabel,
    RegressionModule: ExportedRegression,
    SequenceModule: ExportedSequence,
    DetectionModule: ExportedDetector,
    InstanceSegmentationModule: ExportedTwoStage,
    SegmentationModule: ExportedSegmenter,
    FaceNetModule: ExportedFaceNet,
    FewShotModule: ExportedFewShot,
    SelfSupervisedModule: ExportedFewShot,
    AutoencodingModule: ExportedAutoencoder,
    MaskedAutoencodingModule: ExportedMaskedAutoencoder,
    MultiTaskModule: ExportedMultiTask,
    GANModule: ExportedGenerator,
    SuperResolutionModule: ExportedEnlarger,
    TranslationModule: ExportedTranslator,
    StylizationModule: ExportedStylizer,
    QLearningModule: ExportedQLearning,
}


def exported(
    model: str,
    module: VisionModule,
    preprocessing: Preprocessing,
    pixels: bool,
    fitted: bool = False,
    dynamic: bool = False,
) -> Exported | None:
    """The exportable network of a registered model; None if only its weights are needed.

    Raises:
        ValueError: its parts or settings are not exported.
    """
    kind = EXPORTED.get(type(module))
    if kind is ExportedDetector and not isinstance(module.detector, OneStageDetector):
        kind = ExportedTwoStage
    try:
        return kind(module, preprocessing, pixels, fitted, dynamic) if kind else None
    except ValueError as error:
        raise ValueError(f"{model}: {error}.") from None


def write(
    model: str,
    file: Path,
    format: Format,
    module: VisionModule,
    network: Exported | None,
    metadata: dict[str, str],
    opset: int | None,
) -> float:
    """Writes a file atomically, after checking that its outputs agree with the module's.

    Returns:
        The greatest difference of its answers.

    Raises:
        ValueError: the model cannot be written in this format or at this place, or the file answers differently.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        with tempfile.TemporaryDirectory(prefix=".export-", dir=file.parent) as temporary:
            new = Path(temporary, f"model.{format}")
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what exporters say of their own insides
                    _write(new, format, module, network, metadata, opset)
                    difference = _difference(new, format, module, network)
                    if format == "onnx" and isinstance(network, ExportedDetector):
                        with_suppression(new, network)
                        difference = max(difference, _difference_of_found(new, module, network))
                    if format == "onnx" and isinstance(network, ExportedTwoStage):
                        with_default(new, "threshold", network.threshold)
            except OSError:
                raise
            except Exception as error:  # exporters and runtimes have no common class of errors
                reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
                raise ValueError(f"{model} cannot be written as {format}: {reason}") from error
            if not difference <= TOLERANCE:
                raise ValueError(
                    f"{file} was not written: as {format} the model answers differently, by up to {difference:.1e}."
                )
            os.replace(new, file)
    except OSError as error:
        raise ValueError(f"{file} cannot be written: {error.strerror}.") from None
    return difference


def describe_export(
    model: str, folder: Path, module: VisionModule, network: Exported | None, format: Format
) -> dict[str, str]:
    """Metadata for programs that run the file; lists and dictionaries are JSON."""
    saved = yaml.safe_load((folder / "architecture.yaml").read_text())
    if "@" in model:  # an alias moves on, the version stays
        model = registry.pinned(model)
    scale, shift = (getattr(network or module, name).flatten() for name in ("scale", "shift"))
    std = 1 / (module.full * scale)
    values = {
        "model": model,
        "task": saved["task"],
        "label_names": getattr(module, "label_names", None) or [],
        "architecture": saved["module"],
        "preprocessing": saved["preprocessing"],
        "mean": [round(x, 6) for x in (-shift * std).tolist()],
        "std": [round(x, 6) for x in std.tolist()],
        "input": network.accepts(module) if network else "nothing by itself",
        "output": network.meaning if network else "nothing by itself",
    }
    if format == "onnx" and isinstance(network, ExportedDetector):
        values["output"] = (
            "boxes float32 N×4 (xyxy, pixels of the input), labels int64 N, scores float32 N, image_index int64 N"
        )
    if isinstance(network, ExportedDetector | ExportedTwoStage):
        values["threshold"] = network.threshold
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _write(
    file: Path,
    format: Format,
    module: VisionModule,
    network: Exported | None,
    metadata: dict[str, str],
    opset: int | None,
) -> None:
    if format == "safetensors":
        file.write_bytes(save({key: value.contiguous() for key, value in module.state_dict().items()}, metadata))
        return
    assert network is not None
    example = network.given(*network.example(module, 2))  # of one image, exporters would take the 1 for a constant
    extra = {METADATA: json.dumps(metadata)}
    if format == "torchscript":
        torch.jit.save(torch.jit.trace(network, example, check_trace=False), file, _extra_files=extra)
        return
    sizes = network.sizes()
    program = torch.export.export(network, example, dynamic_shapes=sizes)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # the paths of this machine
    if format == "pt2":
        torch.export.save(program, file, extra_files=extra)
        return
    for library in ("onnxscript", "torch.onnx"):
        logging.getLogger(library).setLevel(logging.ERROR)
    written = torch.onnx.export(
        program,
        dynamo=True,
        opset_version=opset,
        input_names=list(network.inputs),
        output_names=list(network.outputs),
        dynamic_shapes=sizes,
        verbose=False,
    )
    assert written is not None
    if opset not in (None, got := written.model.opset_imports[""]):  # it tells so only in its log
        raise ValueError(f"the exporter cannot write opset {opset}, only {got}")
    for part in written.model.graph.all_nodes():
        part.metadata_props.clear()  # the exporter's notes, with the paths of this machine
    written.model.metadata_props.update(metadata)
    written.save(str(file), external_data=False)


def session_of(file: Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session that only logs errors."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _open(file: Path, format: Format) -> Callable[..., Any]:
    """Opens an exported file, as another program would, as a function of its inputs."""
    if format == "onnx":
        session = session_of(file)
        names = [given.name for given in session.get_inputs()]
        return lambda *given: [
            torch.from_numpy(value)
            for value in session.run(None, {name: x.numpy() for name, x in zip(names, given, strict=True)})
        ]
    if format == "torchscript":
        return torch.jit.load(file)
    return torch.export.load(file).module()


@torch.no_grad()
def _difference(file: Path, format: Format, module: VisionModule, network: Exported | None) -> float:
    """Largest difference between the outputs of a file and of the module, for one image and for three.

    It is absolute, but for values over one (pixels), where it is a share of the greatest.
    """
    if format == "safetensors":
        state, differences = load_file(file), []
        for key, value in module.state_dict().items():
            differences.append(float((state.pop(key).double() - value.double()).abs().max()) if value.numel() else 0.0)
        return max(differences) if not state else float("inf")
    assert network is not None
    answer, differences = _open(file, format), []
    for count in (1, 3):
        example = network.example(module, count)
        got = answer(*network.given(*example))
        for mine, its in zip(network.wanted(module, *example), [got] if isinstance(got, Tensor) else got, strict=True):
            if its.shape != mine.shape:
                raise ValueError(f"it answers with {tuple(its.shape)} to {count} images")
            if len(mine):  # of boxes there may be none
                differences.append(float((its - mine).abs().max()) / max(1.0, float(mine.abs().max())))
    return max(differences, default=0.0)


@torch.no_grad()
def _difference_of_found(file: Path, module: Any, network: ExportedDetector) -> float:
    """Largest difference between the boxes found by a file and by the module, as a share of the image's side."""
    session = session_of(file)
    (image,) = network.example(module, 3)
    (given,) = network.given(image)
    boxes, labels, scores, which = (torch.from_numpy(v) for v in session.run(None, {"image": given.numpy()}))
    difference = 0.0
    seen = image if network.fitting is None else network.fitting(image).byte()
    for i, found in enumerate(module.detector.detect(module(seen))):
        if network.fitting is not None:
            found["boxes"] = found["boxes"] * network.fitting.factors(image)
        sure = found["scores"] > network.threshold
        rows = [(found["boxes"][sure], found["labels"][sure], found["scores"][sure])]
        rows.append((boxes[which == i], labels[which == i], scores[which == i]))
        # In any order: equal scores have none.
        ours, its = (torch.cat((b / max(image.shape[2:]), k[:, None].float(), s[:, None]), 1) for b, k, s in rows)
        most = module.detector.max_detections  # of an image; the file's are of each class
        if len(its) != len(ours) and not (len(its) > len(ours) == most):
            raise ValueError(f"it finds {len(its)} boxes where the model finds {len(ours)}")
        if len(ours):
            difference = max(difference, apart(ours, its, most))
    return difference


def apart(ours: Tensor, its: Tensor, most: int) -> float:
    """Largest difference between detections of an image and the nearest ones that were found otherwise.

    Of nearly equal scores at the end of a full choice, either may have others: those are not compared.

    Args:
        ours: float32 N×6 (box, class, score), the ``most`` best at most.
        its: the same, the ``most`` best of each class at most.
        most: see above.
    """
    choices = [(ours, None), *((its[its[:, 4] == label], label) for label in its[:, 4].unique())]

    def certain(rows: Tensor) -> Tensor:
        for chosen, label in choices:
            if len(chosen) == most:
                others = rows[:, 4] != label if label is not None else rows.new_zeros(len(rows), dtype=torch.bool)
                rows = rows[others | (rows[:, 5] > chosen[:, 5].min() + TOLERANCE)]
        return rows

    pairs = [(certain(ours), its), *([(certain(its), ours)] if len(its) == len(ours) else [])]
    return max(
        (float((one[:, None] - other).abs().amax(2).amin(1).max()) for one, other in pairs if len(one)), default=0.0
    )
