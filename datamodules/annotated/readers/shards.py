"""Boxes and outlines beside pictures in tar and Parquet files."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from datamodules.annotated.sample import Box, Record, Unknown, as_flag, as_number, as_size, four_numbers, occurring
from datamodules.errors import DataError
from datamodules.finding import quoted
from datamodules.images import composed

if TYPE_CHECKING:
    from datamodules.shards import ShardSet

CATEGORY = ("category", "categories", "label", "category_id")  # keys of an object's class


def read_boxes(shards: "ShardSet") -> tuple[dict[str, list[Record]], list[str]]:
    """Returns the images of each split, or of ``all``, and the class names.

    The key ``objects`` of an image's JSON, or its column in Parquet, is a list of objects, or an object of lists, as Hugging Face's
    data sets have it. Each has ``bbox`` (x, y, width, height in pixels) and ``category``, the name of a class or its index in
    ``classnames.txt`` or in the features of the Parquet file; and, as in COCO, ``iscrowd`` or ``difficult``, ``area`` and
    ``segmentation`` where they are known.

    Raises:
        DataError: an image has no such key, or it is neither of both.
    """
    names = shards.class_names("objects")
    splits: dict[str, list[Record]] = {}
    for place, (said, split) in enumerate(zip(shards.said, shards.splits.tolist(), strict=True)):
        path = shards.members[place]
        record = Record(path, path.rpartition("/")[0], as_size(said.get("height"), said.get("width")), place=place)
        for number, entry in enumerate(_objects(said, path), 1):
            category = next((entry[key] for key in CATEGORY if entry.get(key) is not None), None)
            ignore = as_flag(entry.get("iscrowd")) or as_flag(entry.get("difficult"))
            box = Box(four_numbers(entry.get("bbox")), _label(category, names), number, ignore)
            box.outline, box.area = entry.get("segmentation") or None, as_number(entry.get("area"))
            record.boxes.append(box)
        splits.setdefault(split, []).append(record)
    return splits, names or occurring(splits)


def _objects(said: dict[str, Any], path: str) -> Iterator[dict[str, Any]]:
    objects = said.get("objects")
    if isinstance(objects, dict) and all(isinstance(values, list) for values in objects.values()):
        if len({len(values) for values in objects.values()}) > 1:
            raise DataError(f"{path}: the lists of its 'objects' have different lengths: correct them.")
        objects = [dict(zip(objects, row, strict=True)) for row in zip(*objects.values(), strict=True)]
    if not isinstance(objects, list) or not all(isinstance(each, dict) for each in objects):
        raise DataError(
            f"{path} has no list 'objects' of boxes beside it, but {quoted(objects)}: put one into its JSON, which is empty for an image "
            "without objects."
        )
    yield from objects


def _label(category: Any, names: list[str]) -> Any:
    """Name of a class, from its name or its index, which may be written as 1.0."""
    if isinstance(category, list | dict | bool):
        return Unknown(quoted(category))
    if isinstance(category, float) and category.is_integer():
        category = int(category)
    if isinstance(category, int) and names:
        return names[category] if 0 <= category < len(names) else Unknown(str(category))
    return None if category is None else composed(str(category).strip())
