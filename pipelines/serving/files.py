"""Expansion of a command's paths: files, folders, patterns."""

import glob
import os
from collections.abc import Iterable

from datamodules import images, videos


def find(paths: list[str], without: str | None = None) -> tuple[list[str], list[str], str]:
    """Images and videos matching paths, folders and patterns, sorted within each, without duplicates.

    Args:
        paths: files, folders (with all folders below), patterns.
        without: folder that is not looked into.

    Returns:
        The files; those of the paths that lead to nothing; the folder that the former have in common.
    """
    found: dict[str, str] = {}
    missing, roots = [], []
    for path in paths:
        matches = [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))
        missing += [] if matches else [path]
        for match in matches:
            roots.append(os.path.abspath(match if os.path.isdir(match) else os.path.dirname(match)))
            for file in sorted(_below(match, without)) if os.path.isdir(match) else [match]:
                found.setdefault(os.path.abspath(file), file)
    return list(found.values()), missing, os.path.commonpath(roots) if roots else ""


def _below(folder: str, without: str | None) -> Iterable[str]:
    kinds = images.EXTENSIONS + videos.EXTENSIONS
    left_out = without and os.path.realpath(without)
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(place, name)) != left_out]
        yield from (os.path.join(place, file) for file in files if file.lower().endswith(kinds))
