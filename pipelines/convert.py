"""Converts a data set with boxes to another format: ``python -m pipelines.convert FOLDER --data NAME --form coco``."""

from pathlib import Path

from datamodules import DetectionDataModule
from datamodules.forms import FileFormat
from pipelines.engine.command import command


def convert(folder: str, *, data: DetectionDataModule, form: FileFormat = "coco") -> str:
    """Writes all splits of data with boxes to a folder, so that other tools can be run on them.

    Args:
        folder: output folder; it must not exist yet.
        data: any data with boxes, such as ``DigitScenes`` or ``VOCDetection --data.root FOLDER``.
        form: ``coco`` or ``yolo`` (with outlines where ``--data.masks true``), ``voc`` or ``csv``.

    Returns:
        A summary.

    Raises:
        DataError: the folder already exists, or the data cannot be used.
    """
    data.write(folder, form)
    sizes = ", ".join(f"{len(source):,} {name}" for name, source in data.sources.items())
    return f"{data.title} is in {Path(folder).resolve()} in the format {form}: {sizes} images."


if __name__ == "__main__":
    command(convert)
