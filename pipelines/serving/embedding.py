"""Embeddings of pictures by a registered model, and few-shot classes from support pictures."""

import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch

from datamodules.errors import listed
from modules import Backbone, DataSpec, FewShotModule
from pipelines.serving.answers import readable
from pipelines.serving.files import find
from pipelines.serving.gallery import Floats
from pipelines.serving.model import VisionModel


def embed(answering: VisionModel, files: Sequence[str]) -> tuple[list[str], Floats]:
    """Readable files, N, and their embeddings, float32 N×D; unreadable ones are reported and skipped.

    Raises:
        ValueError: none can be read.
    """
    answers = dict(readable(files, answering.stream(map(Path, files)), partial(print, file=sys.stderr)))
    if not answers:
        raise ValueError("None of the pictures can be read.")
    return [*answers], np.asarray([answer["embedding"] for answer in answers.values()], np.float32)


def taught(answering: VisionModel, model: str, support: str) -> VisionModel:
    """A model that recognises the classes of a few support pictures, without training.

    Args:
        answering: a registered model; one of another task lends its backbone's features, scaled to length one.
        model: its address.
        support: folder with a sub-folder of pictures for each class.

    Raises:
        ValueError: the folder has fewer than two classes, or the model is not shown whole pictures.
    """
    module, preprocessing = answering.module, answering.preprocessing
    if not isinstance(module, FewShotModule):
        if preprocessing.columns:
            raise ValueError(
                f"--support needs a model that is shown pictures alone, and {model} takes {listed(preprocessing.columns)} with "
                "each: choose a model without such inputs."
            )
        if preprocessing.tile or preprocessing.frames or preprocessing.fit == "native":
            kind = type(module).__name__
            raise ValueError(f"--support needs a model that is shown whole pictures of one size, and {model}, a {kind}, is shown clips, tiles, or pictures as they are: choose another.")  # fmt: skip
        data = DataSpec(preprocessing.in_chans, preprocessing.image_size)
        module = FewShotModule(data, Backbone(model), unit=True).to(module.device)
        answering = VisionModel().take(module, preprocessing)
    if not os.path.isdir(support):
        raise ValueError(
            f"There is no folder {support}: give one with a sub-folder of pictures for each class with --support."
        )
    inner = {file: Path(os.path.relpath(file, support)).parts for file in find([support])[0]}
    classes = {file: parts[0] for file, parts in inner.items() if len(parts) > 1}
    names = sorted(set(classes.values()))
    if len(names) < 2:
        there = f"only {names[0]}" if names else "none with pictures"
        raise ValueError(
            f"--support {support} needs a sub-folder for each class, at least two, with a few pictures in each, and has {there}."
        )
    module.taught = None  # so that it embeds
    files, embeddings = embed(answering, [*classes])
    folders = {each.name for each in Path(support).iterdir() if each.is_dir() and not each.name.startswith(".")}
    if lacking := folders - {classes[file] for file in files}:
        raise ValueError(
            f"--support {support}: no picture of {listed(sorted(lacking))} can be read: add some, or remove the folder."
        )
    module.teach(torch.from_numpy(embeddings), [classes[file] for file in files])
    return answering
