"""A trained module as a file for other programs: written, opened again, and asked whether it answers as the module does."""

import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import onnxruntime
import torch
import yaml
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from typing_extensions import override

from modules import (
    ClassificationModule,
    DetectionModule,
    MultiLabelModule,
    RegressionModule,
    SegmentationModule,
    StylizationModule,
    VisionModule,
)
from modules.detection.detector import OneStageDetector
from pipelines.serving import registry

Format = Literal["onnx", "torchscript", "pt2", "safetensors"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt": "torchscript", ".pt2": "pt2", ".safetensors": "safetensors"}
METADATA = "metadata.json"  # the extra file of torchscript and pt2
TOLERANCE = 1e-4


class Exported(nn.Module):
    """A trained module without all that only training needs. By itself it answers with probabilities of preprocessed
    images, else with logits.

    Args:
        module: the trained module; it stays as it is.
        preprocessing: uint8 in, else normalised float32 in.
    """

    scale: Tensor
    shift: Tensor
    free: ClassVar[Mapping[int, Any]] = {}  # dimensions of images that may have any size, beside the first
    outputs: tuple[str, ...]  # names of what `forward` answers with
    meaning: str  # of them

    def __init__(self, module: VisionModule, preprocessing: bool) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        # Contiguous, so that no program that reads the file has to know of torch's other memory orders.
        self.backbone = deepcopy(module.backbone).to(memory_format=torch.contiguous_format)
        self.register_buffer("scale", module.scale.clone())
        self.register_buffer("shift", module.shift.clone())
        self.take(module)
        self.eval().requires_grad_(False)

    def take(self, module: Any) -> None:
        """Takes over what comes after the backbone, and says what the answers are."""
        raise NotImplementedError

    def answer(self, features: Any) -> tuple[Tensor, ...]:
        """What the network says, from what the backbone gives; the first dimension is that of the images."""
        head: Any = self.head
        return self._told(head(features))

    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        """What `forward` should say of uint8 images, from the module itself."""
        return self._told(module(image))

    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits.softmax(1) if self.preprocessing else logits,)

    def forward(self, image: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Images, B×C×S×S, to `outputs`."""
        if self.preprocessing:
            image = image.float() * self.scale + self.shift
        answers = self.answer(self.backbone(image))
        return answers if len(answers) > 1 else answers[0]


class ExportedClassifier(Exported):
    """Probabilities of preprocessed images, else logits; both float32 B×K."""

    @override
    def take(self, module: Any) -> None:
        self.head = deepcopy(module.head)
        self.outputs = ("probabilities" if self.preprocessing else "logits",)
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}"


class ExportedMultiLabel(ExportedClassifier):
    """Probabilities of each label of preprocessed images, else logits; both float32 B×K."""

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (logits.sigmoid() if self.preprocessing else logits,)


class ExportedRegression(Exported):
    """Quantities in their own units, float32 B×K."""

    outputs = ("values",)

    @override
    def take(self, module: Any) -> None:
        self.head, self.scaling = deepcopy(module.head), deepcopy(module.scaling)
        self.meaning = f"values float32 B×{module.num_classes}"

    @override
    def _told(self, logits: Tensor) -> tuple[Tensor, ...]:
        return (self.scaling.undo(logits),)

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)


class ExportedDetector(Exported):
    """Boxes and scores of all places of a one-stage detector, float32 B×A×4 and B×A×K; onnx goes on to choose."""

    outputs = ("boxes", "scores")

    @override
    def take(self, module: Any) -> None:
        if not isinstance(module.detector, OneStageDetector):
            raise ValueError(f"a {type(module.detector).__name__} is not exported, only one-stage detectors")
        if module.across_classes:
            raise ValueError(
                "a detector whose boxes are chosen across classes is not exported: onnx chooses within classes"
            )
        self.detector = deepcopy(module.detector).to(memory_format=torch.contiguous_format)
        self.threshold = float(module.threshold)
        self.meaning = f"boxes float32 B×A×4 (xyxy, pixels of the input), scores float32 B×A×{module.num_classes}"

    @override
    def answer(self, features: Any) -> tuple[Tensor, ...]:
        return self.detector.dense(self.detector(features))

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return module.detector.dense(module(image))


class ExportedSegmenter(Exported):
    """Probabilities of each pixel's classes of preprocessed images, else logits; both float32 B×K×S×S."""

    @override
    def take(self, module: Any) -> None:
        if any(side % module.multiple for side in module.size):
            raise ValueError(
                f"images of {module.image_size} pixels are not a multiple of the network's {module.multiple}"
            )
        self.head = deepcopy(module.decoder).to(memory_format=torch.contiguous_format)
        self.outputs = ("probabilities" if self.preprocessing else "logits",)
        self.meaning = f"{self.outputs[0]} float32 B×{module.num_classes}×{_text(module)}"


class ExportedStylizer(Exported):
    """The painted pictures, float32 in [0, 1] and of the images' size, whose sides four divides."""

    free: ClassVar[Mapping[int, Any]] = {2: 4 * torch.export.Dim("rows"), 3: 4 * torch.export.Dim("columns")}
    outputs = ("picture",)

    @override
    def take(self, module: Any) -> None:
        if any(side % 4 for side in module.size):
            raise ValueError(f"it was trained on images of {module.image_size} pixels, which is not a multiple of four")
        self.backbone = deepcopy(module.painter).to(memory_format=torch.contiguous_format)
        self.meaning = f"picture float32 B×{module.in_chans}×H×W in [0, 1]"

    @override
    def answer(self, features: Any) -> tuple[Tensor, ...]:
        return (((features - self.shift) / (255 * self.scale)).clamp(0, 1),)

    @override
    def expected(self, module: Any, image: Tensor) -> tuple[Tensor, ...]:
        return (module(image),)


def _text(module: VisionModule) -> str:
    return "×".join(map(str, module.size))


EXPORTED: dict[type[VisionModule], type[Exported]] = {
    ClassificationModule: ExportedClassifier,
    MultiLabelModule: ExportedMultiLabel,
    RegressionModule: ExportedRegression,
    DetectionModule: ExportedDetector,
    SegmentationModule: ExportedSegmenter,
    StylizationModule: ExportedStylizer,
}


def with_suppression(file: Path, network: ExportedDetector) -> None:
    """Adds to an onnx file with boxes and scores of all places the choice among them, by onnx's NonMaxSuppression.

    Its outputs are then, for all N boxes found in a batch, up to 100 of each class in an image: ``boxes`` float32 N×4 (xyxy, in pixels of the input),
    ``labels`` int64 N, ``scores`` float32 N, ``image_index`` int64 N. The input ``threshold``
    float32 1 may be left out; it is then the one that was best in validation.
    """
    model = onnx.load(str(file))
    graph, detector = model.graph, network.detector
    for node in graph.node:  # free the names
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = {"boxes": "all_boxes", "scores": "all_scores"}.get(name, name)
    scores = next(output for output in graph.output if output.name == "scores").type.tensor_type.shape.dim
    limit = detector.candidates
    values: dict[str, NDArray[Any]] = {
        "most": np.array([detector.max_detections], np.int64),
        "iou": np.array([detector.nms_iou], np.float32),
        "threshold": np.array([network.threshold], np.float32),
        "columns": np.array([1, 1, 1], np.int64),
        "last": np.array([1], np.int64),
        "pair": np.array([0, 2], np.int64),
        "triple": np.array([0, 2, 1], np.int64),
        "flat": np.array([0, -1], np.int64),
        "sorted": np.array([limit + 1], np.int64),
        "next": np.array([limit], np.int64),
        "none": np.array(0, np.float32),
    }  # fmt: skip
    graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    make = onnx.helper.make_node
    candidates = "all_scores"
    if scores[1].dim_value * scores[2].dim_value > limit:  # of each image, as `OneStageDetector.detect` does
        candidates = "candidates"
        graph.node.extend(
            [
                make("Reshape", ["all_scores", "flat"], ["flat_scores"]),
                make("TopK", ["flat_scores", "sorted"], ["sorted_scores", "_order"]),
                make("Gather", ["sorted_scores", "next"], ["next_score"], axis=1),
                make("Unsqueeze", ["next_score", "last"], ["bound"]),
                make("Greater", ["all_scores", "bound"], ["is_candidate"]),
                make("Where", ["is_candidate", "all_scores", "none"], ["candidates"]),
            ]
        )
    graph.node.extend(
        [
            make("Transpose", [candidates], ["by_class"], perm=[0, 2, 1]),
            make("NonMaxSuppression", ["all_boxes", "by_class", "most", "iou", "threshold"], ["chosen"]),
            make("Split", ["chosen", "columns"], ["image_column", "label_column", "_place"], axis=1),
            make("Squeeze", ["image_column", "last"], ["image_index"]),
            make("Squeeze", ["label_column", "last"], ["labels"]),
            make("Gather", ["chosen", "pair"], ["image_and_place"], axis=1),
            make("GatherND", ["all_boxes", "image_and_place"], ["boxes"]),
            make("Gather", ["chosen", "triple"], ["image_place_label"], axis=1),
            make("GatherND", ["all_scores", "image_place_label"], ["scores"]),
        ]
    )
    kinds = onnx.TensorProto
    described: list[tuple[str, int, list[str | int]]] = [("boxes", kinds.FLOAT, ["n", 4]), ("labels", kinds.INT64, ["n"]), ("scores", kinds.FLOAT, ["n"]),
                 ("image_index", kinds.INT64, ["n"])]  # fmt: skip
    del graph.output[:]
    graph.output.extend(onnx.helper.make_tensor_value_info(name, kind, shape) for name, kind, shape in described)
    graph.input.append(onnx.helper.make_tensor_value_info("threshold", kinds.FLOAT, [1]))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, str(file))


def exported(model: str, module: VisionModule, preprocessing: bool) -> Exported | None:
    """The network of a registered model as it is exported; None where only its weights are.

    Raises:
        ValueError: its parts or settings are not exported.
    """
    kind = EXPORTED.get(type(module))
    try:
        return kind(module, preprocessing) if kind else None
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
    """Writes a file, if it answers as the module does; one that is there is replaced at once.

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


def describe_export(model: str, folder: Path, module: Any, network: Exported | None, format: Format) -> dict[str, str]:
    """What a program needs to know that runs the file; lists and dictionaries are JSON."""
    saved = yaml.safe_load((folder / "architecture.yaml").read_text())
    if "@" in model:  # an alias moves on, the version stays
        model = registry.pinned(model)
    std = 1 / (255 * module.scale.flatten())
    values = {
        "model": model,
        "task": saved["task"],
        "label_names": getattr(module, "label_names", None) or [],
        "architecture": saved["module"],
        "preprocessing": saved["preprocessing"],
        "mean": [round(x, 6) for x in (-module.shift.flatten() * std).tolist()],
        "std": [round(x, 6) for x in std.tolist()],
        "input": f"{'uint8' if network is None or network.preprocessing else 'normalised float32'} "
        f"B×{module.in_chans}×" + (_text(module) if not (network and network.free) else "H×W"),
        "output": network.meaning if network else "nothing by itself",
    }
    if format == "onnx" and isinstance(network, ExportedDetector):
        values["output"] = (
            "boxes float32 N×4 (xyxy, pixels of the input), labels int64 N, scores float32 N, image_index int64 N"
        )
        values["threshold"] = network.threshold
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}


def _images(module: Any, count: int, preprocessing: bool) -> tuple[Tensor, Tensor]:
    """Random images as the module takes them, and as the file does."""
    size = (count, module.in_chans, *module.size)
    image = torch.randint(256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(count))
    return image, image if preprocessing else module.normalize(image).contiguous()


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
    example = (_images(module, 2, network.preprocessing)[1],)  # of one image, exporters would take the 1 for a constant
    extra = {METADATA: json.dumps(metadata)}
    if format == "torchscript":
        torch.jit.save(torch.jit.trace(network, example, check_trace=False), file, _extra_files=extra)
        return
    sizes = ({0: torch.export.Dim("batch"), **network.free},)
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
        input_names=["image"],
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


def _session(file: Path) -> onnxruntime.InferenceSession:
    """An onnx file in onnxruntime, which is to say nothing but what is wrong."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _open(file: Path, format: Format) -> Callable[[Tensor], Any]:
    """A written file as a function of images, opened as another program would."""
    if format == "onnx":
        session = _session(file)
        return lambda image: [torch.from_numpy(value) for value in session.run(None, {"image": image.numpy()})]
    if format == "torchscript":
        return torch.jit.load(file)
    return torch.export.load(file).module()


@torch.no_grad()
def _difference(file: Path, format: Format, module: VisionModule, network: Exported | None) -> float:
    """The greatest difference between a file's answers and the module's, for one image and for three.

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
        image, given = _images(module, count, network.preprocessing)
        got = answer(given)
        for mine, its in zip(network.expected(module, image), [got] if isinstance(got, Tensor) else got, strict=True):
            if its.shape != mine.shape:
                raise ValueError(f"it answers with {tuple(its.shape)} to {count} images")
            differences.append(float((its - mine).abs().max()) / max(1.0, float(mine.abs().max())))
    return max(differences)


@torch.no_grad()
def _difference_of_found(file: Path, module: Any, network: ExportedDetector) -> float:
    """The greatest difference between the boxes that a file finds and those that the module does, in shares of the side."""
    session = _session(file)
    image, given = _images(module, 3, network.preprocessing)
    boxes, labels, scores, which = (torch.from_numpy(v) for v in session.run(None, {"image": given.numpy()}))
    difference = 0.0
    for i, found in enumerate(module.detector.detect(module(image))):
        sure = found["scores"] > network.threshold
        rows = [(found["boxes"][sure], found["labels"][sure], found["scores"][sure])]
        rows.append((boxes[which == i], labels[which == i], scores[which == i]))
        # In any order: equal scores have none.
        ours, its = (torch.cat((b / max(module.size), k[:, None].float(), s[:, None]), 1) for b, k, s in rows)
        most = module.detector.max_detections  # of an image; the file's are of each class
        if len(its) != len(ours) and not (len(its) > len(ours) == most):
            raise ValueError(f"it finds {len(its)} boxes where the model finds {len(ours)}")
        if len(ours):
            apart = (ours[:, None] - its).abs().amax(2)
            difference = max(difference, float(apart.amin(1).max()))
            if len(its) == len(ours):
                difference = max(difference, float(apart.amin(0).max()))
    return difference
