"""Exports a registered model to a file: ``python -m pipelines.export models:/NAME@ALIAS FILE``."""

from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from pipelines.engine.command import command
from pipelines.serving.formats import SUFFIXES, Format, Precision

if TYPE_CHECKING:
    from modules import VisionModule
    from pipelines.serving.exports.base import Exported


def export(
    model: str,
    file: Path,
    format: Format | None = None,
    opset: int | None = None,
    preprocessing: bool = True,
    with_preprocessing: bool = False,
    dynamic: bool = False,
    precisions: list[Precision] | str | None = None,
) -> str:
    """Exports a registered model to a file that runs without Fovea, with any batch size.

    The file is opened again and asked about random images; it is only kept if it answers as the model does, up to
    1e-4. Label names, preprocessing and architecture go along as metadata: in ``metadata_props`` of onnx, in the header
    of safetensors, in the extra file ``metadata.json`` of torchscript and pt2.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        file: the file to write; an existing one is replaced only once the new one is complete and checked.
        format: onnx, torchscript (opened with ``torch.jit.load``), pt2 (``torch.export.load``), or safetensors, the
            weights only. Default: by the suffix (.onnx, .pt, .pt2, .safetensors).
        opset: version of the ONNX operators. Default: the exporter's own.
        preprocessing: true: the file takes pixels, uint8 B×C×S×S, and a classifier returns probabilities, float32 B×K;
            false: it takes normalised pixels, float32 (pixels / 255 − mean) / std, and a classifier returns logits. The
            outputs of other tasks are described in `pipelines.serving.exports` and in the metadata.
        with_preprocessing: include the resizing, so that the file takes pictures of any size, uint8 B×C×H×W; boxes are then in
            the pixels of the picture. Otherwise the user of the file resizes as the metadata describe.

        dynamic: true: a segmentation network takes images of any height and width divisible by its strides. Networks for
            super-resolution, translation and stylization always do.
        precisions: also write fp16 (half precision) and int8 (calibrated on 256 training images), onnx only:
            ``FILE.fp16.onnx`` and ``FILE.int8.onnx`` beside FILE.onnx. A table, also logged as a run, compares accuracy on
            validation data, latency and size.

    Returns:
        A summary, with the largest difference between the file's outputs and the model's.

    Raises:
        ValueError: there is no such model, the options do not go together, the model cannot be written in this
            format, or the outputs of the file differ.
    """
    from pipelines.serving import registry
    from pipelines.serving import store as storage
    from pipelines.serving.exporting import describe_export, exported, write

    chosen = format or SUFFIXES.get(file.suffix.lower())
    if chosen is None:
        raise ValueError(f"{file}: the suffix does not name a format; add --format onnx|torchscript|pt2|safetensors.")
    if opset is not None and chosen != "onnx":
        raise ValueError(f"--opset is for onnx; {chosen} has none.")
    if chosen == "safetensors" and not preprocessing:
        raise ValueError("safetensors holds the weights alone: leave --preprocessing out.")
    if with_preprocessing and not preprocessing:
        raise ValueError("--with_preprocessing true takes pixels: leave --preprocessing false out.")
    if isinstance(precisions, str):  # as the command line has it: fp16,int8
        precisions = cast(list[Precision], [name.strip() for name in precisions.split(",")])
    if unknown := [name for name in precisions or () if name not in get_args(Precision)]:
        raise ValueError(f"--precisions has no {unknown[0]}, but {', '.join(get_args(Precision))}.")
    if with_preprocessing and precisions:
        raise ValueError("--precisions are measured on prepared images: leave --with_preprocessing out.")
    if precisions and chosen != "onnx":
        raise ValueError(f"--precisions is for onnx; {chosen} has none.")
    folder = registry.model_folder(model)
    module, prepared = storage.load_model(folder)
    network = (
        None
        if chosen == "safetensors"
        else exported(model, module, prepared, preprocessing, with_preprocessing, dynamic)
    )
    if network is None and chosen != "safetensors":
        raise ValueError(
            f"{model} is a {type(module).__name__}, which no format holds but safetensors, its weights alone: name a file "
            "that ends in .safetensors."
        )
    metadata = describe_export(model, folder, module, network, chosen)
    difference = write(model, file, chosen, module, network, metadata, opset)
    said = (
        f"{file}: {chosen}, {file.stat().st_size / 1e6:.2f} MB, {metadata['input']} to {metadata['output']}. "
        f"The greatest difference from the model's answers is {difference:.1e}."
    )
    if not (network and precisions):
        return said
    return f"{said}\n{_reduced(model, file, network, module, precisions)}"


def _reduced(model: str, file: Path, network: "Exported", module: "VisionModule", precisions: list[Precision]) -> str:
    """Exports in further precisions and returns the comparison table, which is logged."""
    from pipelines.engine.terminal import table
    from pipelines.serving.precisions import CALIBRATED, compared, inputs_of, reduced
    from pipelines.serving.subject import Subject

    subject = Subject.find(model)
    data = subject.prepare(None)
    if "val" not in data.sources:
        raise ValueError(
            f"{file} is written, but {data.title} has no validation split on which to measure {precisions}."
        )
    files = {"fp32": file}
    for precision in dict.fromkeys(precisions):
        files[precision] = file.with_suffix(f".{precision}{file.suffix}")
        reduced(file, files[precision], precision, inputs_of(network, module, data, "train", CALIBRATED))
    rows = compared(files, network, subject.folder, data)
    with subject.run("export", data, None, None) as logger:
        logger.log_metrics({f"{name}/{key}": value for name, row in rows.items() for key, value in row.items()})
        columns = ["precision", *rows["fp32"]]
        logger.log_table("precisions", columns, [[name, *row.values()] for name, row in rows.items()])
    return table(
        {"precision": name, **{key: f"{value:.4g}" for key, value in row.items()}, "file": str(files[name])}
        for name, row in rows.items()
    )


if __name__ == "__main__":
    command(export)
