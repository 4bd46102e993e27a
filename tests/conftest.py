"""One MLflow store for all tests, and real processes that start fast.

The process that only shares out the tests reads this too, so what is heavy is imported where it is needed."""

# isort: off
import sys

from pipelines.engine.process import Deferring

sys.meta_path.insert(0, Deferring)  # before Lightning is imported, as a command does

# isort: on
import hashlib
import multiprocessing
import os
import shutil
import signal
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from inspect import signature
from itertools import chain
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse._deprecated
import numpy as np
import pytest
from PIL import Image
from threadpoolctl import threadpool_limits

if TYPE_CHECKING:
    import torch

    from modules import VisionModule

THREADS = int(os.environ.get("THREADS", "1"))  # see `make portable`
os.environ["OMP_NUM_THREADS"] = str(THREADS)  # for torch, and for processes with imports of their own
os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library reads it
ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests'}"

# Children are forked from a server that has the heavy imports done and no threads: real processes, without their cost.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["preloaded"])


def prepare() -> None:
    """Makes this process one that tests run in: with few threads, and with what it and the others remember."""
    import torch

    from datamodules.labelled import published
    from modules.measures import extractors

    torch.set_num_threads(THREADS)
    threadpool_limits(
        THREADS
    )  # two idle threads of OpenBLAS spin, which takes ten times what two test processes compute
    extractors._train = partial(_trained, extractors._train)
    published._glyphs = cache(partial(_drawn, published._glyphs))


def _trained(train: Callable[..., None], network: "torch.nn.Module", *args: Any) -> None:
    """Remembers, for all tests and their processes, what an adversarial training's judge learned of the same images."""
    import torch

    given = hashlib.blake2b(digest_size=16)
    for part in (*chain(*network.state_dict().items()), *args):  # by content: no two pickles of a tensor are the same
        given.update(part.cpu().numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    file = Path(os.environ["XDG_CACHE_HOME"], f"judge-{given.hexdigest()}")
    if not file.exists():
        train(network, *args)
        file.parent.mkdir(exist_ok=True)
        torch.save(network.state_dict(), file.with_suffix(f".{os.getpid()}"))
        file.with_suffix(f".{os.getpid()}").replace(file)
    network.load_state_dict(torch.load(file))
    network.train()


def _drawn(draw: Callable[[], tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Remembers, for all tests and their processes, the characters, whose drawing takes seconds."""
    file = Path(os.environ["XDG_CACHE_HOME"], "glyphs.npz")
    if not file.exists():
        file.parent.mkdir(exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.npz")
        np.savez(part, *draw())
        part.replace(file)
    with np.load(file) as kept:
        return kept["arr_0"], kept["arr_1"]


def written_table(text: str, images: int) -> str:
    """A table in the working folder, and the images that it may name, ``0.png`` and on; returns the table's name."""
    for k in range(images):
        if not Path(f"{k}.png").exists():
            Image.fromarray(np.full((16, 16, 3), 6 * k, np.uint8)).save(f"{k}.png")
    Path("t.csv").write_text(text)
    return "t.csv"


def built(kind: "type[VisionModule]", **options: Any) -> Any:
    """A module of settings that are not yet grouped, as a registered model has them.

    Args:
        kind: its class.
        options: fields of `DataSpec`, ``backbone`` and what else a `Backbone` takes, and parts of the module's own.
    """
    from modules import DataSpec
    from pipelines.engine.settings import upgraded

    parts = upgraded({"model": options})["model"]
    data = DataSpec(**{key: parts.pop(key) for key in [*parts] if key in DataSpec.__dataclass_fields__})
    backbone = signature(kind).parameters["backbone"].default
    return kind(data, replace(backbone, **parts.pop("backbone", {})), **parts)


LONGEST = ("test_contract", "test_resume", "test_tracking", "test_transfer", "test_translation")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets the files that take longest begin, so that none of them goes on alone at the end."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store of MLflow's to copy, since making one takes seconds."""
    from mlflow.tracking import MlflowClient

    file = tmp_path_factory.mktemp("empty") / "mlflow.db"
    MlflowClient(f"sqlite:///{file}").search_experiments()
    return file


@pytest.fixture(scope="session", autouse=True)
def _store(tmp_path_factory: pytest.TempPathFactory, empty: Path) -> None:
    prepare()
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(empty, folder)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")


@pytest.fixture(autouse=True)
def _current(monkeypatch: pytest.MonkeyPatch) -> None:
    """What we ask of jsonargparse that its version 5 will not have is an error; commands silence its warnings."""
    library = Path(jsonargparse.__file__).parent

    def refused(component: object, message: str, stacklevel: int = 1) -> None:
        files = (Path(frame.f_code.co_filename) for frame, _ in traceback.walk_stack(None))
        caller = next(file for file in files if file != Path(__file__) and library not in file.parents)
        assert not caller.is_relative_to(ROOT) or ".venv" in caller.parts, message

    monkeypatch.setattr(jsonargparse._deprecated, "deprecation_warning", refused)


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def _interruptible() -> Iterator[None]:
    """Ctrl-C interrupts also a process that was started in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def _run(command: Callable[[list[str]], object], args: list[str], folder: str, environment: dict[str, str]) -> None:
    import torch

    os.chdir(folder)
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # for loading workers: what a process of its own would do
    torch.set_num_threads(THREADS)
    command(args)


def start(
    command: Callable[[list[str]], object],
    args: list[str],
    world_size: int = 1,
    slurm: bool = False,
    agent: bool = False,
) -> list[int | None]:
    """Runs a command line in as many processes as torchrun or srun would, and returns their exit codes; with ``agent``, once
    one of them has ended the others get SIGTERM."""
    environment = {key: os.environ[key] for key in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME", "PATH")}
    if world_size > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        if slurm:
            environment |= {"SLURM_JOB_ID": "4242", "SLURM_STEP_ID": "0", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0",
                            "SLURM_NTASKS": str(world_size), "SLURM_NTASKS_PER_NODE": str(world_size)}  # fmt: skip
        else:
            environment |= {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": str(world_size),
                            "LOCAL_WORLD_SIZE": str(world_size)}  # fmt: skip
    names = ("SLURM_PROCID", "SLURM_LOCALID") if slurm else ("RANK", "LOCAL_RANK")
    ranks = [environment | (dict.fromkeys(names, str(r)) if world_size > 1 else {}) for r in range(world_size)]
    started = [processes.Process(target=_run, args=(command, args, os.getcwd(), rank)) for rank in ranks]
    for process in started:
        process.start()
    if agent:
        wait([process.sentinel for process in started], 300)
        time.sleep(0.1)  # between torchrun's looks
        for process in started:
            process.terminate()
    for process in started:
        process.join(300)
        if process.exitcode is None:
            process.kill()
    return [process.exitcode for process in started]
