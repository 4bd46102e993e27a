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
from torchvision.ops import box_iou

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
SLACK = 1e-3  # of the overlap of two boxes, which has the rounding of both


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
                way_out = ", of another size than trained with: leave --dynamic out" if network.free else ""
                raise ValueError(f"it answers with {tuple(its.shape)} to {count} images{way_out}")
            if len(mine):  # of boxes there may be none
                differences.append(float((its - mine).abs().max()) / max(1.0, float(mine.abs().max())))
    return max(differences, default=0.0)


@torch.no_grad()
def _difference_of_found(file: Path, module: Any, network: ExportedDetector) -> float:
    """Largest distance of the boxes that a file finds from those of the module, as a share of the image's side."""
    session = session_of(file)
    (image,) = network.example(module, 3)
    (given,) = network.given(image)
    found, labels, scores, which = (torch.from_numpy(v) for v in session.run(None, {"image": given.numpy()}))
    rows = torch.cat((found / max(image.shape[2:]), labels[:, None].float(), scores[:, None]), 1)
    seen = image if network.fitting is None else network.fitting(image).byte()
    boxes, places = module.detector.dense(module(seen))
    if network.fitting is not None:
        boxes = boxes * network.fitting.factors(image)
    boxes = boxes / max(image.shape[2:])
    return max(
        selection_error(rows[which == k], boxes[k], places[k], module.detector, network.threshold)
        for k in range(len(image))
    )


def selection_error(
    found: Tensor, boxes: Tensor, scores: Tensor, detector: OneStageDetector, threshold: float
) -> float:
    """Checks that the boxes found in an image are a non-maximum suppression of all places, class by class.

    Scores that are equal but for `TOLERANCE`, as all are before a detector has learned, may be taken in any order, of which
    the number of boxes depends: so what is compared is not another suppression, but that nothing was kept that another box
    suppresses, and nothing left out that none does.

    Args:
        found: float32 N×6 (box, class, score), at most `Detector.max_detections` of each class.
        boxes: float32 A×4, in the same unit.
        scores: float32 A×K.
        detector: its limits count.
        threshold: minimum score.

    Returns:
        The largest distance of a found box from its place.

    Raises:
        ValueError: a box is too many, or one lacks.
    """
    if scores.numel() > detector.candidates:
        threshold = max(threshold, float(scores.flatten().topk(detector.candidates + 1).values[-1]))
    distance = 0.0
    for label in range(scores.shape[1]):
        own, kept = scores[:, label], found[found[:, 4] == label]
        rows = torch.cat((boxes, own[:, None]), 1)[own > threshold - TOLERANCE]
        mine = kept[:, [0, 1, 2, 3, 5]]
        apart = torch.cdist(rows, mine, p=float("inf"))
        if len(mine):
            distance = max(distance, float(apart.amin(0).max()) if len(rows) else float("inf"))
        over = box_iou(mine[:, :4], mine[:, :4]).fill_diagonal_(0)
        if (over > detector.nms_iou + SLACK).any():
            raise ValueError(f"it keeps two boxes of class {label} that overlap by {float(over.max()):.3f}")
        better = mine[:, 4] >= rows[:, 4:] - TOLERANCE
        left = ~((apart <= TOLERANCE) | (better & (box_iou(rows[:, :4], mine[:, :4]) > detector.nms_iou - SLACK))).any(
            1
        )
        last = mine[:, 4].min() if len(mine) >= detector.max_detections else torch.tensor(threshold)
        if lacking := int((left & (rows[:, 4] > last + TOLERANCE)).sum()):
            raise ValueError(f"it lacks {lacking} boxes of class {label} beside the {len(mine)} that it finds")
    return distance
