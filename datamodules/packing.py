"""Writing data as tar files for WebDataset, with what belongs to each picture beside it."""

import csv
import io
import itertools
import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from datamodules.annotated.boxes import BoxSource
from datamodules.annotated.class_maps import MaskPictures
from datamodules.annotated.detection import DetectionDataModule
from datamodules.annotated.readers.masks import Classes
from datamodules.annotated.sample import IGNORE
from datamodules.annotated.scenes import DigitTasks
from datamodules.annotated.segmentation import SegmentationDataModule, WindowSource
from datamodules.base import VisionDataModule
from datamodules.clips import ClipDataModule
from datamodules.domains import DigitAttributes, DigitTextures
from datamodules.errors import DataError
from datamodules.images import EXTENSIONS
from datamodules.labelled.base import NamedDataModule
from datamodules.labelled.label_columns import LabelColumnsSource
from datamodules.labelled.manifest import TabularTable
from datamodules.labelled.people import FaceDataModule
from datamodules.labelled.quantities import RegressionDataModule
from datamodules.labelled.sources import LabelSetSource, PeopleSource, QuantitySource, TabularSource
from datamodules.loading import Sample
from datamodules.paths import Paths, content_of
from datamodules.writing import new_folder

SHARD = 256 << 20  # bytes of pictures in a file that is written
Members = list[tuple[str, bytes]]  # what follows the point in the name, and content


def write_shards(data: VisionDataModule, folder: str) -> None:
    """Writes all splits as tar files for WebDataset, from which the same batches are read.

    The files are ``train-000000.tar`` and so on, with members such as ``00000000.jpg``. Image and mask files are copied unchanged.
    Beside a picture is, for

    * a class, ``.cls``, its index; with further inputs, ``.json`` with the key ``label`` and one for each of them;
    * a person, ``.json`` with the key ``identity``, or the column that the person was in;
    * several labels, ``.json`` with the list ``labels``; several columns of classes or quantities, with a key for each, and for
      further inputs;
    * boxes, ``.json`` with the list ``objects``; see `read_boxes`;
    * a class map, ``.mask.png``, or with the suffix of its file.

    ``classnames.txt`` has the names of the classes in their order, ``classes.csv`` the meaning of the values of masks.

    Args:
        data: the data set.
        folder: output folder; it must not exist yet.

    Raises:
        DataError: the folder exists, the images do not have 8 bits, or the data are of another kind.
    """
    kinds: Any = (NamedDataModule, RegressionDataModule, FaceDataModule, DetectionDataModule, SegmentationDataModule)
    # Counts, clips and contents have no place in shards.
    without: Any = (DigitTasks, ClipDataModule, DigitAttributes, DigitTextures)
    if not isinstance(data, kinds) or isinstance(data, without):
        raise DataError(
            "--form webdataset writes pictures with classes, labels, quantities, people, boxes or class maps, and "
            f"{type(data).__name__} has others: give another --data or --form."
        )
    if isinstance(data, FaceDataModule) and getattr(data, "pairs", None):
        raise DataError("The pairs of --data.pairs have no place in shards: leave them out.")
    with new_folder(folder) as part:
        part.mkdir()
        for split, source in data.sources.items():
            samples = enumerate(_samples(data, source))
            pending = next(samples, None)
            for number in itertools.count():
                if pending is None:
                    break
                with tarfile.open(part / f"{split}-{number:06}.tar", "w") as archive:
                    size = 0
                    while pending is not None and size < SHARD:
                        index, members = pending
                        for kind, content in members:
                            member = tarfile.TarInfo(f"{index:08}.{kind}")
                            member.size = len(content)
                            archive.addfile(member, io.BytesIO(content))
                        size, pending = size + len(members[0][1]), next(samples, None)
        if names := _names(data, next(iter(data.sources.values()))):
            (part / "classnames.txt").write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
        _write_classes(data, part / "classes.csv")


def _names(data: Any, source: Any) -> list[str]:
    """Returns the names of the classes that have an index in shards: not those of quantities, columns, people and masks."""
    if isinstance(source, WindowSource):
        return list(data.label_names[1:]) if isinstance(source.pictures, BoxSource) else []
    return [] if isinstance(source, QuantitySource | LabelColumnsSource | PeopleSource) else list(data.label_names)


def _write_classes(data: Any, file: Path) -> None:
    """Writes the meaning of the values of masks; see `read_classes`."""
    source: Any = next(iter(data.sources.values()))
    pictures = source.pictures if isinstance(source, WindowSource) else None
    if pictures is None or isinstance(pictures, BoxSource):
        return
    names = list(data.label_names)
    classes = (
        pictures.classes if isinstance(pictures, MaskPictures) else Classes(names, {k: k for k in range(len(names))})
    )
    if classes.kind == "binary":
        return
    coloured = classes.kind == "colours"
    order = sorted(classes.numbers.items(), key=lambda pair: pair[1])
    with file.open("w", newline="", encoding="utf-8") as table:
        rows = csv.writer(table)
        rows.writerow(["name", *("rgb" if coloured else ["value"])])
        for value, number in order:
            name = "ignore" if number == IGNORE else classes.names[number]
            rows.writerow([name, *((value >> 16, value >> 8 & 255, value & 255) if coloured else [value])])


def _samples(data: Any, source: Any) -> Iterator[Members]:
    """Returns the members of each sample, its picture first.

    Raises:
        DataError: see `write_shards`.
    """
    inner = source.pictures if isinstance(source, WindowSource) else source
    if isinstance(inner, BoxSource):
        for k in range(len(inner.annotations)):
            yield [_file(inner.annotations.paths, k), _json({"objects": _annotated(inner, k, _names(data, source))})]
    elif isinstance(inner, MaskPictures):
        for k in range(len(inner)):
            kind, content = _file(inner.masks, k)
            yield [_file(inner.paths, k), (f"mask.{kind}", content)]
    elif isinstance(source, WindowSource):
        for k in range(len(inner)):
            sample = inner[k]
            yield [_png(sample["image"]), ("mask.png", _png(sample["mask"][..., None])[1])]
    elif isinstance(data, DetectionDataModule):
        for k in range(len(source)):
            sample = source[k]
            yield [_png(sample["image"]), _json({"objects": _drawn(sample, data.label_names)})]
    else:
        for k in range(len(source)):
            picture = _png(source[k]["image"]) if source.paths is None else _file(source.paths, k)
            yield [picture, _described(data, source, k)]


def _described(data: Any, source: Any, k: int) -> tuple[str, bytes]:
    """Returns the member that says what a labelled picture is."""
    if isinstance(source, PeopleSource):
        return _json({getattr(data, "person_column", "identity"): str(source.people[k])})
    names, values, inputs = data.label_names, source.labels[k], dict[str, float]()
    if isinstance(source, TabularSource) and isinstance(data, TabularTable):
        numbers = [*source.keypoints[k].ravel().tolist(), *source.tabular[k].tolist()]
        inputs = dict(zip(data.tabular_names or [], numbers, strict=True))
    if isinstance(source, QuantitySource):
        pairs = zip(names, values.tolist(), strict=True)
        return _json({name: None if math.isnan(value) else value for name, value in pairs} | inputs)
    if isinstance(source, LabelSetSource):
        return _json({"labels": [name for name, has in zip(names, values, strict=True) if has]} | inputs)
    if isinstance(source, LabelColumnsSource):
        return _json({column: value for column, _, value in (names[number].partition("/") for number in values)})
    if inputs:
        return _json({data.label_column: names[values]} | inputs)
    return "cls", str(int(values)).encode()


def _annotated(source: BoxSource, k: int, names: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a picture in files, with the outlines as they are kept."""
    a = source.annotations
    rows = slice(a.starts[k], a.starts[k + 1])
    found = _objects(a.boxes[rows], a.labels[rows], a.ignore[rows], None if a.areas is None else a.areas[rows], names)
    if a.outlines is not None:
        for entry, code in zip(found, a.outlines[rows], strict=True):
            entry["segmentation"] = {"size": a.sizes[k].tolist(), "counts": code.decode()}
    return found


def _drawn(sample: Sample, names: list[str]) -> list[dict[str, Any]]:
    """Returns the objects of a picture that is no file."""
    found = _objects(sample["boxes"], sample["labels"], sample["ignore"], sample.get("area"), names)
    for entry, mask in zip(found, sample.get("masks", ()), strict=False):
        code = rle.encode(np.asfortranarray(mask))
        entry["segmentation"] = {"size": list(mask.shape), "counts": code["counts"].decode()}
    return found


def _objects(boxes: Any, labels: Any, ignore: Any, areas: Any, names: list[str]) -> list[dict[str, Any]]:
    """Returns objects with the keys of COCO; x and width in float64, from which the right edge is the same float32."""
    found = []
    for k, (x1, y1, x2, y2) in enumerate(np.asarray(boxes, np.float64).tolist()):
        entry = {"bbox": [x1, y1, x2 - x1, y2 - y1], "category": names[labels[k]], "iscrowd": int(ignore[k])}
        found.append(entry if areas is None else entry | {"area": float(areas[k])})
    return found


def _json(content: dict[str, Any]) -> tuple[str, bytes]:
    return "json", json.dumps(content, ensure_ascii=False).encode()


def _file(paths: Paths, k: int) -> tuple[str, bytes]:
    """Returns suffix and content of an image file."""
    suffix = PurePath(paths[k]).suffix.lower()
    if suffix not in EXTENSIONS:
        raise DataError(f"{paths[k]} is no picture, and shards hold pictures: give other data with --data.")
    return suffix.lstrip("."), content_of(paths.at(k))


def _png(pixels: NDArray[Any]) -> tuple[str, bytes]:
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise DataError("Shards hold pictures of 8 bits, grey or RGB: these data have others.")
    return "png", cv2.imencode(".png", pixels if pixels.shape[2] == 1 else pixels[..., ::-1])[1].tobytes()
