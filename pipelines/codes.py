"""Codes of a registered autoencoder: encode, decode, nearest; and points, a demonstration without images."""

import math
import os
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch

from datamodules import PointCloud
from modules import AutoencodingModule
from modules.autoencoding import PointAutoencoder
from modules.autoencoding.points import draw_points
from modules.pictures.sheets import sheet, to_uint8
from modules.ranges import Positive, PositiveInt
from pipelines.engine.disk import whole, write_image
from pipelines.engine.terminal import table
from pipelines.serving import registry
from pipelines.serving.answers import readable
from pipelines.serving.files import find
from pipelines.serving.model import VisionModel
from pipelines.tracking.logger import RunLogger


def _load(model: str, device: str = "cpu") -> tuple[VisionModel, AutoencodingModule]:
    return registry.load_as(AutoencodingModule, model, ": codes are made by an autoencoder.", device)


def encode(model: str, images: str, out: str = "codes.npz", batch_size: PositiveInt = 64, device: str = "auto") -> str:
    """Encodes the images of a folder into one file: ``codes``, ``paths`` (relative to ``root``), ``root``, ``model``.

    Numbers are kept in 16 bits, entries of a codebook in 8 or 16. The images are first cut to the network's input.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``.
        images: a folder, with all folders below, a pattern, or a file.
        out: the file.
        batch_size: number of images per batch.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        A summary, including any files that cannot be read.

    Raises:
        ValueError: there is no such model, or no image.
    """
    answering, module = _load(model, device)
    files, _, root = find([images])
    codes, kept, bad = [], list[str](), list[str]()
    for file, answer in readable(files, answering.stream(map(Path, files), batch_size), bad.append):
        codes.append(np.asarray(answer["code"]))
        kept.append(os.path.relpath(os.path.abspath(file), root))
    if not kept:
        raise ValueError("\n".join([*bad[:5], f"No images were found in {images}."]))
    kind = np.float16 if not module.bottleneck.entries else np.uint8 if module.bottleneck.entries <= 256 else np.uint16
    array = np.stack(codes).astype(kind)
    with whole(out) as part, part.open("wb") as stream:  # a name without .npz stays what it is
        np.savez(stream, codes=array, paths=np.asarray(kept), root=root, model=registry.pinned(model))
    bits = 8 * array[0].nbytes / math.prod(module.size)
    original = sum(os.path.getsize(os.path.join(root, path)) for path in kept)
    done = f"{len(kept)} images ({original:,} bytes) as {array.nbytes:,} bytes of codes, {bits:.3f} bits a pixel, in {out}."
    return "\n".join([*bad, done])


def _codes(file: str, model: str | None) -> tuple[np.ndarray[Any, Any], list[str], str, str]:
    """Reads the codes, paths, root and model from a file that `encode` wrote."""
    try:
        with np.load(file, allow_pickle=False) as saved:
            return saved["codes"], saved["paths"].tolist(), str(saved["root"]), model or str(saved["model"])
    except (OSError, KeyError, ValueError, EOFError) as error:
        reason = getattr(error, "strerror", None) or "it is not one that encode wrote"
        raise ValueError(f"The codes in {file} cannot be read: {reason}.") from None


def _vectors(module: AutoencodingModule, codes: np.ndarray[Any, Any]) -> torch.Tensor:
    try:
        return module.bottleneck.load(
            torch.from_numpy(codes.astype(np.int64 if codes.dtype.kind == "u" else np.float32))
        )
    except RuntimeError:
        wanted = "×".join(map(str, module.bottleneck.shape))
        raise ValueError(f"Codes of shape {codes.shape[1:]} are not this model's, whose are {wanted}.") from None


@torch.no_grad()
def decode(codes: str, out: str, model: str | None = None, batch_size: PositiveInt = 64) -> str:
    """Decodes the codes in a file to images.

    Args:
        codes: a file that ``encode`` wrote.
        out: folder for the images, as PNG, under the paths of the originals.
        model: the model to use instead of the one that encoded.
        batch_size: number of codes per batch.

    Raises:
        ValueError: there is no such file or model, or an image would be replaced.
    """
    array, paths, root, address = _codes(codes, model)
    _, module = _load(address)
    if os.path.realpath(out) == os.path.realpath(root):
        raise ValueError(f"The images in {out} would be replaced: choose another folder.")
    for start in range(0, len(array), batch_size):
        made = to_uint8(module.decode(_vectors(module, array[start : start + batch_size]))).numpy()
        for image, path in zip(made, paths[start : start + batch_size], strict=True):
            place = Path(out, path if path.lower().endswith(".png") else f"{path}.png")
            write_image(place, image.transpose(1, 2, 0))
    height, width = module.size
    return f"{len(array)} images of {height}×{width} pixels are in {out}."


@torch.no_grad()
def nearest(
    codes: str, image: str, count: PositiveInt = 5, out: str | None = "nearest.png", model: str | None = None
) -> str:
    """Finds the images whose codes are nearest to that of a given image, in Euclidean distance.

    Args:
        codes: a file that ``encode`` wrote.
        image: the image to compare with.
        count: number of images to find.
        out: picture of the image and those found; null for none.
        model: the model to use instead of the one that encoded.

    Returns:
        A table: distance, path.

    Raises:
        ValueError: there is no such file or model, or the image cannot be read.
    """
    if out and os.path.realpath(out) == os.path.realpath(image):
        raise ValueError(f"--out {out} would replace the picture that is asked about: name another file.")
    array, paths, root, address = _codes(codes, model)
    answering, module = _load(address)
    (answer,) = answering.stream([Path(image)])
    if isinstance(answer, ValueError):
        raise answer
    asked = _vectors(module, np.asarray([answer["code"]]).astype(array.dtype))
    distance = (_vectors(module, array) - asked).flatten(1).square().sum(1).sqrt()
    order = distance.argsort()[:count].tolist()
    if out:
        places = [image, *(os.path.join(root, paths[k]) for k in order)]
        pixels = [answering.prepare(Path(place)) for place in places]
        captions = ["asked", *(f"{distance[k]:.3f}\n{Path(paths[k]).name}" for k in order)]
        write_image(out, sheet(pixels, 6, captions, side=112))
    found = table({"distance": float(distance[k]), "path": os.path.join(root, paths[k])} for k in order)
    return found + (f"\nThe picture is {out}." if out else "")


def points(
    shape: str = "spiral",
    code_size: PositiveInt = 1,
    hidden: tuple[int, ...] = (64, 64),
    passes: PositiveInt = 500,
    lr: Positive = 0.005,
    samples: PositiveInt = 1000,
    seed: int = 0,
    output: str | None = None,
) -> str:
    """Trains an autoencoder on points and draws the reconstruction after each epoch.

    Args:
        shape: ``wave``, ``spiral`` (2-D), ``helix``, ``swiss_roll`` (3-D), or a file of points, CSV or .npy.
        code_size: numbers in the code.
        hidden: sizes of the hidden layers of the encoder; the decoder has them in reverse.
        passes: number of epochs.
        lr: learning rate.
        samples: number of points of a shape.
        seed: random seed for points, weights and order.
        output: folder of the run; by default a new one in ``outputs/``.

    Returns:
        The path of the pictures.

    Raises:
        DataError: there is no such shape or file.
    """
    L.seed_everything(seed, verbose=False)
    data = PointCloud(shape, samples, seed=seed)
    name = f"points-{Path(shape).stem}-{datetime.now():%Y%m%d-%H%M%S}"
    folder = Path(output or Path("outputs", "autoencoding", name))
    logger = RunLogger(folder, "autoencoding", name, {"task": "autoencoding", "data": shape})
    module = PointAutoencoder(data.dimensions, code_size, hidden, lr)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = L.Trainer(
            max_epochs=passes, logger=logger, accelerator="cpu", default_root_dir=scratch, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=10,
        )  # fmt: skip
        try:
            trainer.fit(module, data)
        except BaseException as error:
            logger.finish(error)
            raise
    drawn = folder / "points.png"
    write_image(drawn, draw_points(module.frames))
    logger.log_file(drawn, "images")
    logger.finish()
    return f"Mean squared distance {module.frames[-1][4]:.4f} after {passes} passes. {drawn} shows them; run {logger.address()}."
