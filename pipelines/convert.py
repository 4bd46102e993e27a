"""Writes data in another form: ``python -m pipelines.convert FOLDER --data NAME --form coco``."""

from pathlib import Path
from typing import Literal

from datamodules import DataError, DetectionDataModule, VisionDataModule
from datamodules.forms import FileFormat
from pipelines.engine.command import command


def convert(folder: str, *, data: VisionDataModule, form: FileFormat | Literal["webdataset"] = "coco") -> str:
    """Writes all splits of data to a folder: with boxes, so that other tools can be run on them; or of any task, as shards.

    Args:
        folder: output folder; it must not exist yet.
        data: any data with boxes, such as ``DigitScenes`` or ``VOCDetection --data.root FOLDER``; for shards, also of classes, labels,
            quantities, people or class maps, such as ``ImageFolder``.
        form: of boxes ``coco`` or ``yolo`` (with outlines where ``--data.masks true``), ``voc`` or ``csv``; or ``webdataset``, tar
            files of pictures and all that belongs to them. Those of classes alone are read by ``--data Shards``, others by the
            data of their task, given the folder in place of their files.

    Raises:
        DataError: the folder already exists, or the data cannot be used.
    """
    if form == "webdataset":
        from datamodules.packing import write_shards

        write_shards(data, folder)
    elif isinstance(data, DetectionDataModule):
        data.write(folder, form)
    else:
        raise DataError(
            f"--form {form} is for data with boxes, such as COCODetection, and {type(data).__name__} is not: give another --data or "
            "--form webdataset."
        )
    sizes = ", ".join(f"{len(source):,} {name}" for name, source in data.sources.items())
    return f"{data.title} is in {Path(folder).resolve()} in the format {form}: {sizes} images."


if __name__ == "__main__":
    command(convert)
