"""Finding images by the names in annotation files."""

import os
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from datamodules.errors import DataError
from datamodules.images import EXTENSIONS, folded, images_in
from datamodules.paths import Paths
from datamodules.tables import Notes

if TYPE_CHECKING:
    import pandas as pd

UNUSUAL = r"^$|\\|\x00|//|(?:^|/)\.(?:/|$)|/$"  # what pathlib writes otherwise


def parts_of(written: str) -> list[str]:
    """Returns possible readings of a path in a file: with backslashes, as a URL, as Label Studio writes it."""
    plain = written.strip().replace("\\", "/")
    found = [written, plain]
    if "://" in plain or plain.startswith("/data/"):
        try:
            address = urlsplit(plain)
        except ValueError:
            return [written]
        found = [written, unquote(address.path), *parse_qs(address.query).get("d", [])[::-1]]
    elif "%" in plain:
        found.append(unquote(plain))
    return list(dict.fromkeys(found))


def found_in(folder: Path, written: str) -> Path | None:
    """Finds a file or folder below another one from a path of another machine or folder: its longest ending that
    exists."""
    for name in parts_of(written):
        if name and os.path.exists(folder / name):
            return folder / name
        parts = PurePosixPath(name).parts
        for start in range(len(parts)):
            place = Path(folder, *(part for part in parts[start:] if part not in ("/", "..", ".")))
            if place != folder and os.path.exists(place):
                return place
    return None


def shared_parts(file: Path, parts: Sequence[str]) -> int:
    """Counts the trailing parts of a file's path that match, case-insensitively; the last one with or without its
    extension."""
    own = [folded(part) for part in file.parts]
    if parts and own and folded(parts[-1]) == folded(file.stem):
        own[-1] = folded(file.stem)
    pairs = enumerate(zip(own[::-1], map(folded, parts[::-1]), strict=False))
    return next((k for k, (a, b) in pairs if a != b), min(len(own), len(parts)))


class Finder:
    """Finds images by the names that annotation files give them.

    Args:
        root: folder below which images are searched if they are in none of the folders.
        folders: folders that are searched first.
        notes: where images found elsewhere are noted.
        least: last parts of a path that must agree where it was found elsewhere.
    """

    def __init__(self, root: Path, folders: Iterable[Path], notes: Notes, least: int = 1) -> None:
        self.root, self.notes = root, notes
        self.folders = list(dict.fromkeys(folders))
        self._least = least

    @cached_property
    def _known(self) -> dict[str, list[Path]]:
        """Images below the root by name."""
        known: dict[str, list[Path]] = {}
        for file in images_in(self.root):
            known.setdefault(folded(file.name), []).append(file)
        return known

    @cached_property
    def _stems(self) -> dict[str, list[Path]]:
        """Images below the root by name without extension."""
        stems: dict[str, list[Path]] = {}
        for files in self._known.values():
            for file in files:
                stems.setdefault(folded(file.stem), []).append(file)
        return stems

    def at(self, name: str) -> Path | None:
        """Finds the image of this name in one of the folders."""
        for folder in self.folders:
            if os.path.isfile(folder / name):
                if folder != self.folders[0]:  # the others are most probably there too
                    self.folders.remove(folder)
                    self.folders.insert(0, folder)
                self._least = 1000  # the paths are correct: other missing files are missing
                return folder / name
        return None

    def find(self, written: str, by: object) -> Path | None:
        """Finds the image of this name: relative to one of the folders; or below the root, if its name is unique there.

        The latter applies to all images of a file or to none: a single image that is not where the others are is
        missing.

        Raises:
            DataError: several images match.
        """
        if not written or "\0" in written:
            raise DataError(
                f"{by} names the image {quoted(written)}, which is not a file name: write where the image is."
            )
        names = parts_of(written)
        if (found := next((path for name in names if (path := self.at(name)) is not None), None)) is not None:
            return found
        spelled = [[folded(part) for part in PurePosixPath(name).parts] for name in names]
        bare = [
            [*parts[:-1], parts[-1].rpartition(".")[0]] for parts in spelled if parts and parts[-1].endswith(EXTENSIONS)
        ]
        for parts in (*spelled, *bare):
            unhashed = re.sub(r"^[0-9a-f]{8}-", "", parts[-1]) if parts else ""  # Label Studio's uploads
            for last in dict.fromkeys((*parts[-1:], unhashed)):
                whole = last.endswith(EXTENSIONS) and parts not in bare
                files = (self._known if whole else self._stems).get(last, [])
                ends = [shared_parts(file, [*parts[:-1], last]) for file in files]
                best = [file for file, end in zip(files, ends, strict=True) if end == max(ends)]
                here = [
                    file
                    for file in best
                    if len(file.parts) > len(parts) and file.parents[len(parts) - 1] in self.folders
                ]
                if len(here) == 1 and max(ends) == len(parts):
                    if parts in bare:
                        self.notes.add(
                            "An image has another extension than is said", f"{by}: {written} is {here[0].name}"
                        )
                    return here[0]  # only the case or the extension differs
                if not best or max(ends) < self._least or (parts in bare and len(here) < 2):
                    continue
                if len(best) > 1:
                    raise DataError(
                        f"{by} names the image {written}, which may be {best[0]} or {best[1]}: write its path relative to "
                        f"{self.root.resolve()}."
                    )
                self._least = max(ends)
                if max(ends) < len(parts):
                    self.notes.add(
                        "An image is not at the path that is given, and was found by its name", f"{by}: {written}"
                    )
                return best[0]
        return None


def paths_in(column: "pd.Series[Any]", file: Path) -> Paths:
    """Finds the images in a column of a table, relative to the table; see `Finder`."""
    names = column.astype(str)
    folder = "" if file.parent == Path() else os.path.join(file.parent, "")
    paths = Paths.below(folder, names)  # as most are, without a search for each of millions
    found = (paths.signatures[:, 0] >= 0) & ~names.str.contains(UNUSUAL).to_numpy(bool)
    if found.all():
        return paths
    notes, searched = Notes(), paths.tolist()
    finder = Finder(file.parent, [file.parent, file.parent / "images"], notes, 1000 if found.any() else 1)
    for place in np.flatnonzero(~found).tolist():
        name, row = names.iloc[place], names.index[place]
        searched[place] = os.fspath(finder.find(name, f"{file}, row {row + 1}") or file.parent / name)
    notes.tell()
    return Paths.of(searched)


def quoted(value: object) -> str:
    """Formats a value for a message, shortened."""
    return repr(value) if len(repr(value)) < 80 else f"{repr(value)[:80]}…"


def child(folder: Path, *names: str) -> Path | None:
    """Returns the first of these names that exists in a folder, case-insensitively."""
    for name in names:
        place: Path | None = folder
        for part in Path(name).parts:
            if place is not None and not (place / part).exists():
                known = place.iterdir() if place.is_dir() else ()
                place = next((child for child in known if folded(child.name) == folded(part)), None)
            elif place is not None:
                place = place / part
        if place is not None:
            return place
    return None


def words_of(file: Path) -> set[str]:
    """Returns the words in a file's name, in lower case, without numbers."""
    return set(re.findall("[a-z]+", file.stem.casefold()))
