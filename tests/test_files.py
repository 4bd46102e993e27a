"""A full disk, a second process and a torn file cost no training."""

import errno
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import albumentations as A
import lightning as L
import mlflow
import numpy as np
import pytest
import torch
from conftest import _run, processes
from mlflow.tracking import MlflowClient
from PIL import Image
from safetensors.torch import save_file

from datamodules import ImageFolder, decoded
from modules import SegmentationModule
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine.checkpoint import WholeCheckpoints
from pipelines.engine.disk import DiskError, LockError, held, whole, write_text
from pipelines.engine.films import make_films
from pipelines.serving import registration, registry
from pipelines.serving.answers import drawn
from pipelines.tracking.journal import Journal
from pipelines.tracking.logger import RunLogger, run_id_of

SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.enable_progress_bar", "false",
         "--trainer.max_epochs", "2"]  # fmt: skip


def photographs(count: int = 12) -> None:
    """Folders of two classes of large pictures."""
    pictures = np.random.default_rng(1).integers(0, 255, (count, 60, 80, 3), np.uint8).repeat(4, 1).repeat(4, 2)
    for i, picture in enumerate(pictures):
        file = Path("large", "ab"[i % 2], f"{i}.jpg")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(file, quality=90)


def cached(cache: str, workers: int = 0) -> ImageFolder:
    return ImageFolder("large", image_size=32, batch_size=4, num_workers=workers, augmentation="light", cache=cache)


def epochs(data: ImageFolder, spoil: bool = False) -> list[np.ndarray]:
    """The images of two epochs of training; the files may be gone before the second."""
    loader, seen = data.loader("train"), []
    for epoch in range(2):
        loader.set_epoch(epoch)
        seen += [batch["image"].numpy() for batch in loader]
        for path in data.sources["train"].paths if spoil and epoch == 0 else ():
            Path(path).unlink()
    loader.close()
    return seen


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where decoded images are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "fovea" / "decoded"


@pytest.mark.parametrize(("cache", "workers"), [("memory", 0), ("memory", 2), ("disk", 2)])
def test_images_are_decoded_once_and_are_the_same(cache: str, workers: int, place: Path) -> None:
    photographs(22)
    plain = epochs(cached("none"))
    data = cached(cache, workers)
    assert len(data.sources["train"]) == 16  # whole batches, so that the first epoch has all
    assert np.array_equal(epochs(data, spoil=True), plain)
    assert len([*place.rglob("*-3-*")]) == (16 if cache == "disk" else 0)


class Brighter(A.ImageOnlyTransform):
    """Writes into the image that it gets."""

    def apply(self, img: np.ndarray, **_: object) -> np.ndarray:
        img += 1
        return img


def test_a_transform_that_writes_into_its_images_leaves_those_that_are_kept(place: Path) -> None:
    photographs()
    settings = {"image_size": "240x320", "fit": "stretch", "augmentation": [{f"{__name__}.Brighter": {"p": 1}}]}
    kept, plain = (epochs(ImageFolder("large", batch_size=4, cache=c, **settings)) for c in ("memory", "none"))
    assert np.array_equal(kept, plain)


def test_of_the_images_that_were_kept_only_those_that_changed_are_decoded_again(place: Path) -> None:
    photographs()
    epochs(cached("disk"))
    kept = {*place.rglob("*-3-*")}
    changed = Path(cached("disk").sources["train"].paths[0])
    Image.new("RGB", (320, 240), "red").save(changed)
    torn, *_ = sorted(kept)
    torn.write_bytes(torn.read_bytes()[:1000])  # as a machine that stops may leave it
    now = cached("disk")
    assert np.array_equal(epochs(now), epochs(cached("none")))
    assert len({*place.rglob("*-3-*")} - kept) == 1
    assert torn.stat().st_size > 1000


def keep_and_forget(place: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(place.parents[1])
    while True:
        shutil.rmtree(place, ignore_errors=True)
        epochs(cached("disk"))


def test_a_process_that_is_killed_while_it_keeps_images_leaves_none_that_is_torn(place: Path) -> None:
    photographs()
    plain = epochs(cached("none"))
    child = processes.Process(target=keep_and_forget, args=(place,))
    child.start()
    while not [*place.rglob("*-3-*")]:
        time.sleep(0.001)
    child.kill()
    child.join()
    assert np.array_equal(epochs(cached("disk")), plain)


@pytest.mark.parametrize("cache", ["disk", "memory"])
def test_without_room_images_are_decoded_each_time_and_that_is_told(
    cache: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photographs()
    plain = epochs(cached("none"))
    monkeypatch.setattr(decoded, "SPARED", 1 << 60)
    with pytest.warns(UserWarning, match="are available. The others are decoded each time"):
        assert np.array_equal(epochs(cached(cache)), plain)
    assert not list(place.rglob("*-3-*"))


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A file system with so much room."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may mount no file systems")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for half a megabyte."""
    with mounted(tmp_path / "disk", "512k") as folder:
        yield folder


def fill(disk: Path) -> None:
    """Leaves no room on a disk."""
    with suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
        while True:
            stream.write(bytes(4096))


LARGE = torch.rand(300_000)
NOISE = np.random.default_rng(0).integers(0, 255, (600, 600, 3), np.uint8)
WRITERS = {
    "text.md": lambda part: part.write_text("x" * 2_000_000),
    "picture.png": lambda part: Image.fromarray(NOISE).save(part),
    "film.gif": lambda part: Image.fromarray(NOISE).save(
        part, save_all=True, append_images=[Image.fromarray(255 - NOISE)]
    ),
    "weights.safetensors": lambda part: save_file({"a": LARGE}, part),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_is_whole_or_what_it_was_before(disk: Path, name: str) -> None:
    file = disk / name
    for former in (None, "former"):
        if former:
            write_text(file, former)
        with (
            pytest.raises(
                DiskError, match=rf"{name} could not be written: No space left on device; .* free on the disk"
            ),
            whole(file) as part,
        ):
            WRITERS[name](part)
        assert [(f.name, f.read_text()) for f in disk.iterdir()] == ([(name, former)] if former else [])


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_the_former_one(disk: Path) -> None:
    file = disk / "last.ckpt"
    WholeCheckpoints().save_checkpoint({"step": 1}, file)
    with pytest.raises(DiskError, match=r"last\.ckpt could not be written: No space left"):
        WholeCheckpoints().save_checkpoint({"step": 2, "weights": LARGE}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert list(disk.iterdir()) == [file]


@pytest.mark.parametrize("links", [True, False])
def test_a_checkpoint_of_several_names_is_one_file_where_the_disk_has_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    disk = tmp_path / "out"

    def refuse(*names: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    files = [disk / "best.ckpt", disk / "kept" / "7.ckpt"]
    write_text(files[0], "former")
    writer = WholeCheckpoints()
    writer.twins = files
    writer.save_checkpoint({"step": 1}, disk / "last.ckpt")
    assert all(torch.load(file, weights_only=True) == {"step": 1} for file in files)
    assert all(file.samefile(disk / "last.ckpt") == links for file in files)
    writer.twins = ()
    writer.save_checkpoint({"step": 2}, disk / "last.ckpt")
    assert torch.load(files[0], weights_only=True) == {"step": 1}
    assert {file.name for file in disk.rglob("*.ckpt")} == {"last.ckpt", "best.ckpt", "7.ckpt"}


def test_pictures_of_answers_are_whole_or_absent_on_a_full_disk(disk: Path) -> None:
    """The drawing and what goes beside it, such as a mask."""
    Image.fromarray(NOISE).save("a.png")
    module = SegmentationModule(DataSpec(num_classes=2, image_size=64), Backbone("test_resnet")).eval()
    (answer,) = module.predict({"image": torch.from_numpy(NOISE).permute(2, 0, 1)[None]})
    drawn(module, "a.png", answer, "free/a.png", Path("free/a.png"))
    assert {file.name for file in Path("free").iterdir()} == {"a.png", "a.mask.png"}
    with pytest.raises(DiskError, match=r"a\.png could not be written: No space left on device"):
        drawn(module, "a.png", answer, str(disk / "a.png"), disk / "a.png")
    assert list(disk.iterdir()) == []


class Fill(L.Callback):
    """Fills the disk in a step of a training."""

    def __init__(self, disk: str, step: int) -> None:
        self.disk, self.step = Path(disk), step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.step:
            fill(self.disk)


def test_decoded_images_that_the_disk_has_no_room_for_are_not_kept(disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    photographs()
    plain = epochs(cached("none"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(disk))
    monkeypatch.setattr(decoded._Disk, "room", lambda self: 1 << 60)  # as on a disk that others fill
    data = cached("disk")
    data.prepare_data()
    fill(disk)
    with pytest.warns(UserWarning, match=r"No space left on device\. The others are decoded each time"):
        assert np.array_equal(epochs(data), plain)
    assert not list(disk.rglob("*-3-*"))


@pytest.mark.filterwarnings("ignore:Left out of the run")
@pytest.mark.parametrize("interval", ["1", "1000"])
def test_a_training_on_a_full_disk_fails_with_the_reason_and_goes_on_when_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: str
) -> None:
    """In the first case the journal finds no room, in the second a checkpoint."""
    with mounted(tmp_path / "disk", "8m") as disk:
        out = disk / "out"
        command = ["fit", *SMALL, "--output", str(out), "--trainer.log_every_n_steps", interval]
        fault = ["--trainer.callbacks+=test_files.Fill", "--trainer.callbacks.disk", str(disk),
                 "--trainer.callbacks.step", "25"]  # fmt: skip
        with pytest.raises(SystemExit) as end:
            classification([*command, *fault])
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert f"free on the disk of {out}" in message
        assert "Traceback" not in message
        run = MlflowClient().get_run(run_id_of(out))
        assert run.info.status == "FAILED"
        assert "No space left on device" in run.data.tags["error"]
        step = torch.load(out / "last.ckpt", weights_only=True)["global_step"]
        assert not list(out.glob(".*.part*"))
        (disk / "filler").unlink()
        cli = classification(command)
        assert 0 < step < cli.trainer.global_step
        run = MlflowClient().get_run(run.info.run_id)
        assert run.info.status == "FINISHED"
        assert "error" not in run.data.tags
        assert "test/accuracy" in run.data.metrics


class Remove(L.Callback):
    """Removes the folder of a training in its second epoch."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 1:
            shutil.rmtree("out")


def test_a_training_whose_folder_is_removed_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        classification(["fit", *SMALL, "--output", "out"], [Remove()])
    assert end.value.code == 2
    assert f"{Path('out').absolute()} was removed while this command wrote to it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:Left out of the run")
def test_pictures_and_tables_that_the_disk_has_no_room_for_are_left_out(disk: Path) -> None:
    logger = RunLogger(disk / "out", "files", "full", {})
    logger.log_image("train/samples", [NOISE], 0)
    logger.log_table("mistakes", ["a"], [["x" * 1000]] * 1000)
    logger.log_text("note", "x" * 2_000_000)
    logger.log_metrics({"loss": 0.5}, 0)
    logger.finish()
    run = MlflowClient().get_run(str(logger.run_id))
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == 0.5
    assert [file for file in (disk / "out").rglob("*") if file.suffix in (".png", ".json", ".md")] == [
        disk / "out/run.json"
    ]


def test_a_model_that_the_disk_has_no_room_for_is_not_registered(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk of temporary files, through which MLflow sends."""
    command = ["fit", *SMALL, "--trainer.max_epochs", "1", "--output", "out", "--register", "roomless"]
    cli = classification(command[:-2])
    fill(disk)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(DiskError, match="No space left on device"):
        registration.register(
            "roomless", cli.model, cli.datamodule, {}, "classification", str(cli.trainer.logger.run_id), {}
        )
    with pytest.raises(SystemExit) as end:
        classification(command)
    assert end.value.code == 2
    assert f"No space left on device; 0.0 MB are free on the disk of {disk}" in capsys.readouterr().err
    assert registry.versions_of("roomless") == []
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert classification(command).rows["registered"] == "models:/roomless/1"


@pytest.mark.filterwarnings("ignore:MLflow does not accept film")
def test_torn_pictures_fail_no_training() -> None:
    command = ["fit", *SMALL, "--trainer.max_epochs", "1", "--output", "out"]
    classification(command)
    for number in (1, 2, 3):
        Image.fromarray(NOISE[number : number + 16, :16]).save(f"out/pictures/film-{number}.png")
    whole_picture = Path("out/pictures/film-2.png").read_bytes()
    Path("out/pictures/film-2.png").write_bytes(whole_picture[:300])
    logger = RunLogger(Path("out"), "classification", "x", {})
    make_films(Path("out"), ["film"], logger)
    logger.log_image("film", [NOISE[:8, :8]], 9)
    Path("out/pictures/film-9.png").write_bytes(whole_picture[:300])
    logger.log_metrics({"after": 1.0}, 1)
    logger.finish()
    with Image.open("out/film.gif") as film:
        assert film.n_frames == 2
    assert MlflowClient().get_run(str(logger.run_id)).data.metrics["after"] == 1.0


def test_a_torn_journal_is_read_but_for_the_torn_lines() -> None:
    client = MlflowClient()
    run_id = client.create_run("0").info.run_id
    out = Path("out")
    out.mkdir()
    line = '{{"kind": "metric", "key": "loss", "value": 1.0, "step": {}, "timestamp": 5}}\n'
    torn = (
        line.format(1)
        + line.format(2)[:30]
        + line.format(3)
        + "\0" * 50
        + "\n"
        + "[1]\n"
        + line.format(4)
        + line.format(5)[:-5]
    )
    (out / "journal.jsonl").write_text(torn)
    (out / "journal.sent").write_text("0" * 17 + "9999")
    journal = Journal(out, run_id, client)
    assert journal.last == {"loss": 4}
    journal.write({"kind": "metric", "key": "loss", "value": 2.0, "step": 5})
    assert journal.close() == 0
    assert client.get_run(run_id).data.metrics == {"loss": 2.0}
    (out / "journal.sent").write_bytes(b"\0" * 20)
    assert Journal(out, run_id, client).close() == 0
    assert [m.step for m in client.get_metric_history(run_id, "loss")] == [1, 4, 5]


def hold(args: list[str]) -> None:
    with held(Path("out")):
        Path("ready").touch()
        time.sleep(60)


def test_a_second_training_in_a_folder_is_refused_until_the_first_is_dead(capsys: pytest.CaptureFixture[str]) -> None:
    environment = {key: os.environ[key] for key in ("MLFLOW_TRACKING_URI", "XDG_CACHE_HOME")}
    first = processes.Process(target=_run, args=(hold, [], os.getcwd(), environment))
    first.start()
    while not Path("ready").exists():
        time.sleep(0.01)
    with pytest.raises(SystemExit) as end:
        classification(["fit", *SMALL, "--output", "out"])
    assert end.value.code == 2
    message = capsys.readouterr().err
    assert f"{Path('out').absolute()} is in use by process {first.pid} on " in message
    assert not Path("out/config.yaml").exists()
    with pytest.raises(LockError), held(Path("out")):
        pass
    first.kill()
    first.join()
    with held(Path("out")), held(Path("out")):
        pass


def test_a_refused_training_leaves_no_folder_but_a_users_own() -> None:
    Path("own").mkdir()
    for output in ([], ["--output", "new"], ["--output", "own"]):
        with pytest.raises(SystemExit):
            classification(["fit", "--data", "ImageFolder", "--data.root", "gone", *output])
    assert not Path("new").exists()
    assert Path("own").exists()
    assert not [*Path("outputs").rglob(".lock")]


def test_two_trainings_that_start_within_a_second_have_folders_of_their_own() -> None:
    command = ["fit", *SMALL, "--trainer.limit_train_batches", "1", "--trainer.limit_val_batches", "1",
               "--trainer.limit_test_batches", "1", "--trainer.max_epochs", "1"]  # fmt: skip
    at = time.time()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.engine.folders.time.time", lambda: at)
        first, second, third = (classification(command) for _ in range(3))
    folders = [cli.output for cli in (first, second, third)]
    assert len(set(folders)) == len(list(Path("outputs/classification").iterdir())) == 3
    assert [json.loads((f / "run.json").read_text())["run_id"] for f in folders] == [
        cli.trainer.logger.run_id for cli in (first, second, third)
    ]
    assert mlflow.get_run(run_id_of(folders[1])).info.run_name == folders[1].name
