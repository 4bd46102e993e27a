"""Pairing of images and masks by their names."""

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.errors import DataError, listed
from datamodules.images import folded, images_in


def files_below(folder: Path, places: Collection[Path] = ()) -> list[Path]:
    """Image files below a folder, sorted.

    Args:
        folder: the folder.
        places: folders that are handled separately; files below nested ones are skipped.
    """
    nested = [place for place in places if folder in place.parents]
    return [file for file in images_in(folder) if not any(place in file.parents for place in nested)]


def matched(
    images: Sequence[Path], masks: Sequence[Path], images_root: Path, masks_root: Path, suffix: str = ""
) -> list[tuple[Path, Path | None]]:
    """Pairs masks with images: same folder and name, otherwise the same name in another case or folder.

    A mask's name may be that of its image with the extension (``a.jpg.png``). If no image has a mask of its name and no
    suffix is given, a common prefix or suffix, as in ``a_mask.png`` or ``mask_a.png``, is detected and reported. Masks
    without an image are reported.

    Args:
        images: the images.
        masks: the masks.
        images_root: folder that the images' folders are relative to.
        masks_root: folder that the masks' folders are relative to.
        suffix: suffix of the mask's name after that of its image, or in place of the images' common suffix.

    Returns:
        The images, each with its mask, None if there is none.

    Raises:
        DataError: two images would share a mask, an image has two, or several suffixes match.
    """
    home = {image: image.relative_to(images_root).with_suffix("").as_posix() for image in images}
    own = {mask: mask.relative_to(masks_root).with_suffix("").as_posix() for mask in masks}

    def with_suffix(suffix: str) -> dict[Path, Path]:
        whole = {image: image.relative_to(images_root).as_posix() + suffix for image in images}
        return _by_name({image: (whole[image], name + suffix) for image, name in home.items()}, own)

    found = with_suffix(suffix)
    if masks and not found:
        known = [mask for mask in masks if mask.stem.endswith(suffix)]
        ending = suffix or _found_suffix([image.stem for image in images], [mask.stem for mask in masks])
        found = with_suffix(ending) if ending else {}
        cores, others = _cores(images), _cores(known)
        if not found and len(set(cores.values())) == len(images) and set(cores.values()) <= set(others.values()):
            found = _by_name({image: (name,) for image, name in cores.items()}, others)
        if found:
            image, mask = next(iter(found.items()))
            rank_zero_warn(f"Masks seem to be named like {mask.name} for {image.name}.")
    owners: dict[Path, Path] = {}
    for image, mask in found.items():
        if mask in owners:
            raise DataError(
                f"{owners[mask]} and {image} share the mask {mask}: give each a mask of its own, called "
                f"{owners[mask].name}{suffix}{mask.suffix} and {image.name}{suffix}{mask.suffix}, or move one away."
            )
        owners[mask] = image
    if unused := [mask for mask in masks if mask not in owners]:
        rank_zero_warn(f"{len(unused)} of {len(masks)} masks belong to no image; the first: {unused[0]}.")
    return [(image, found.get(image)) for image in images]


def _by_name(wanted: Mapping[Path, tuple[str, ...]], masks: Mapping[Path, str]) -> dict[Path, Path]:
    """Finds the mask of each image by candidate names, the likeliest first."""
    found: dict[Path, Path] = {}
    keys: tuple[Callable[[str], str], ...] = (
        str,
        folded,
        lambda name: Path(name).name,
        lambda name: folded(Path(name).name),
    )
    for key in keys:
        table: dict[str, list[Path]] = {}
        for mask, name in masks.items():
            table.setdefault(key(name), []).append(mask)
        for image, names in wanted.items():
            there = next((table[key(name)] for name in names if key(name) in table), [])
            if image not in found and len(there) > 1 and len({mask.parent for mask in there}) == 1:
                raise DataError(f"{image} has two masks, {there[0]} and {there[1]}: keep one.")
            if image not in found and len(there) == 1:
                found[image] = there[0]
    return found


def _found_suffix(images: Sequence[str], masks: Sequence[str]) -> str:
    """Suffix that masks add to the names of at least half of the images; empty if there is none."""
    stems = {folded(name) for name in images}
    rests: Counter[str] = Counter()
    for mask in masks:
        length = next((n for n in range(len(mask) - 1, 0, -1) if folded(mask[:n]) in stems), 0)
        if length and not mask[length].isalnum():
            rests[mask[length:]] += 1
    likely = [rest for rest, count in rests.most_common() if 2 * count >= len(stems)]
    if len(likely) > 1:
        raise DataError(
            f"Each image has several masks, whose names end in {listed(likely)}: choose with --data.mask_suffix {likely[0]}."
        )
    return likely[0] if likely else ""


def _cores(files: Sequence[Path]) -> dict[Path, str]:
    """Names without their common prefix and suffix, except for digits."""
    stems = [file.stem for file in files]
    before = re.sub(r"\d+$", "", os.path.commonprefix(stems))  # noqa: RUF071  # characters are meant
    rests = [stem[len(before) :] for stem in stems]
    after = re.sub(r"^\d+", "", os.path.commonprefix([rest[::-1] for rest in rests])[::-1])  # noqa: RUF071
    return {file: rest[: len(rest) - len(after)] for file, rest in zip(files, rests, strict=True)}


def by_stem(folder: Path) -> dict[str, Path]:
    """Files below a folder by `folded` path and name, with and without extension."""
    result: dict[str, Path] = {}
    for file in images_in(folder):
        path = file.relative_to(folder)
        for name in (path.as_posix(), path.with_suffix("").as_posix(), path.name, path.stem):
            result.setdefault(folded(name), file)
    return result
