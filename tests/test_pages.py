"""Each page, as a reader works through it: its commands run in the order in which they stand, in a folder of their own, with
limits on what they train and made files in the place of the reader's."""

import os
import re
import runpy
import shutil
import struct
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from safetensors.torch import save_file
from test_docs import COMMANDS, words

from modules.networks.registered import timm

PAGES = list(dict.fromkeys(page for page, _ in COMMANDS))
QUICK = ("README.md", "architecture.md", "new_task.md")  # five seconds at most
NOT_RUN = {  # how commands begin that are left to other tests, and why
    "make": "test_demo runs the demonstration; the other targets are this suite and what CI does",
    "mlflow": "servers, which test_registry asks, and runs of the whole project, which test_tracking starts and restores",
    "(srun|sbatch|torchrun)": "test_launch and test_tracking start several processes",
    "pip install|python -m pipelines.datasets": "the network",
    "python -m pipelines.facenet (align|landmarks)": "the network, for the package with the weights; test_alignment and test_tabular "
    "have stand-ins",
    "python -m pipelines.classification fit --config configs/classification/landmarks": "its table",
    "python -m pipelines.app": "it serves until Ctrl-C; test_predict asks it",
    "python -m pipelines.facenet fit --config configs/facenet/dlib": "the network, for the package with the weights",
    "python -m pipelines.facenet (enrol models:/dlib-faces|identify people.parquet PHOTOGRAPHS)": "its model",
    "python -m pipelines.style CONTENT.jpg STYLE.jpg --out": "VGG19, a download of 574 MB",
    "python -m pipelines.(detection|segmentation) fit .*--start (hf-hub|torchvision):": "the network; test_start has files of the same form",
    "python -m benchmarks": "minutes to hours",
    "pipelines.predict models:/nobody": "it is refused, on purpose",
    "(python -m )?pipelines.cross_validate": "test_cross_validation trains all folds",
}
LESS = {  # what makes commands short that have this in themselves or their recipes
    r" fit\b(?!.*help)": "--trainer.max_epochs=1 --trainer.check_val_every_n_epoch=1 --trainer.limit_train_batches=1 "
    "--trainer.limit_val_batches=1 --trainer.limit_test_batches=1 --trainer.enable_progress_bar=false "
    "--data.batch_size=8 --data.num_workers=0",
    r"Digit(Scenes|Masks|Sets|Tasks)": "--data.scene_size=64 --data.train=24 --data.val=4 --data.test=4",
    r"sequences fit .*(moving|series)": "--data.train=64 --data.val=16 --data.test=16",
    r"/\w*folder.yaml|data (COCO|YOLO)Detection|data LabelColumns": "--data.image_size=64",
    r"facenet fit": "--trainer.limit_val_batches=1.0",  # strangers and mates, for the threshold
    r"few_shot fit": "--trainer.limit_val_batches=1.0 --trainer.limit_test_batches=1.0 --data.batch_size=16",
    r"q_learning fit": "--data.replay_start=20 --data.max_episode_steps=20 --data.val=2 --data.test=2 --data.epoch_batches=2",
    r"translation fit": "--model.judge_steps=10",
    r"gan fit": "--model.num_samples=64",
    r"gan fit .*FOLDER": "--data.image_size=28",
    r"super_resolution fit": "--data.image_size=32 --data.evaluation_size=64 --data.crops=1",
    r"points --shape": "--passes=2",
    r"gan enrich": "--steps=2 --seeds=1",
    r"gan dissect": "--count=16",
    r"style CONTENT": "--steps=2",
    r"sweep": "--trials=1",
}
BEFORE = {  # what a page takes for granted
    "annotations.md": ["convert FOLDER --data DigitScenes --form coco"],
    "audit.md": ["classification fit --data ImageFolder --data.root FOLDER --register NAME"],
    "detection.md": ["convert FOLDER --data DigitScenes --form yolo", "convert VOC --data DigitScenes --form voc"],
    "gan.md": ["segmentation fit --data DigitMasks --data.image_size 32 --backbone resnet10t --register segmenter"],
    "inspect.md": ["classification fit --data Digits --register NAME", "registry promote NAME"],
    "registry.md": ["classification fit --data ImageFolder --data.root FOLDER --output some --register NAME"],
    "multi_task.md": ["convert FOLDER --data DigitTasks --form coco"],
    "reliability.md": ["classification fit --data Digits"],
    "transfer.md": [
        "convert BOXES --data DigitScenes --form coco",
        "detection fit --data DigitScenes --register NAME",
        "registry promote NAME",
    ],
}


def picture(file: str) -> None:
    """Noise, of its own by its name."""
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    drawn = np.random.default_rng(list(file.encode())).integers(0, 256, (128, 128, 3), np.uint8)
    Image.fromarray(drawn).save(file, "png")


def folder(of: str, names: list[str], count: int) -> None:
    for name in names:
        for i in range(count):
            picture(f"{of}/{name}/{name}_{i + 1:04d}.png")


def published() -> None:
    """The files of Fashion-MNIST and CIFAR-10, with a few noisy pictures, and networks' weights, as downloads leave them."""
    random = np.random.default_rng(0)
    raw, batches = Path("data/FashionMNIST/raw"), Path("data/cifar-10-batches-bin")
    for path in (raw, batches):
        path.mkdir(parents=True)
    for name, count in (("train", 120), ("t10k", 40)):
        pixels, labels = random.integers(0, 256, (count, 28, 28), np.uint8), (np.arange(count) % 10).astype(np.uint8)
        Path(raw, f"{name}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 2051, count, 28, 28) + pixels.tobytes())
        Path(raw, f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 2049, count) + labels.tobytes())
    for name in (*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"):
        rows = random.integers(0, 256, (20, 3073), np.uint8)
        rows[:, 0] = np.arange(20) % 10
        Path(batches, f"{name}.bin").write_bytes(rows.tobytes())
    for name in ("resnet18", "resnet34"):
        network = timm.create_model(name)
        repository = Path("hub", "models--" + network.pretrained_cfg["hf_hub_id"].replace("/", "--"))
        Path(repository, "refs").mkdir(parents=True)
        Path(repository, "refs/main").write_text("0")
        Path(repository, "snapshots/0").mkdir(parents=True)
        save_file(network.state_dict(), Path(repository, "snapshots/0/model.safetensors"))


def readers(page: str) -> None:
    """Makes what the reader of a page has."""
    for file in ("PICTURES/1.png", "PICTURES/2.png", "PICTURE", "ONE.jpg", "OTHER.jpg", "CONTENT.jpg", "STYLE.jpg"):
        picture(file)
    Path("PATHx").symlink_to("PICTURES")  # for PATH…
    Path("IMAGEx").symlink_to("PICTURE")
    Path("SPACE.yaml").write_text("trainer.max_epochs: [1]\ntrainer.limit_train_batches: [1]\n")
    if page == "multi_task.md":
        folder("toys", ["square", "bar"], 10)
        rows = [
            f"{file},{file.parent.name},{('red', 'blue')[k % 2]}"
            for k, file in enumerate(sorted(Path("toys").rglob("*.png")))
        ]
        Path("TABLE.csv").write_text("\n".join(["path,shape,colour", *rows]))
    if page == "facenet.md":
        for people in ("FOLDER", "casia"):
            folder(people, [f"person{i}" for i in range(12)], 5)
        folder("lfw", ["ann", "bob", "eve"], 4)
        pairs = [f"{a}\t1\t2\n{b}\t1\t3\n{a}\t3\t{b}\t4\n{a}\t2\t{b}\t2\n" for a, b in (("ann", "bob"), ("bob", "eve"))]
        Path("lfw/pairs.txt").write_text(f"2\t2\n{''.join(pairs)}")
    elif page == "few_shot.md":
        folder("FOLDER", [f"class{i}" for i in range(12)], 11)
        folder("SUPPORT", ["one", "other"], 2)
    elif page == "segmentation.md":
        folder("FOLDER", ["images"], 12)
        Path("FOLDER/masks").mkdir()
        mask = np.zeros((128, 128), np.uint8)
        mask[30:80, 20:110] = 1
        for file in Path("FOLDER/images").iterdir():
            Image.fromarray(mask).save(f"FOLDER/masks/{file.name}")
    elif page in ("annotations.md", "detection.md", "multi_task.md", "style.md", "sequences.md"):
        film = cv2.VideoWriter("FILM.mp4", cv2.VideoWriter.fourcc(*"mp4v"), 10, (96, 96))
        for _ in range(3):
            film.write(np.zeros((96, 96, 3), np.uint8))
        film.release()
        for k in range(12):
            Path(f"VIDEOS/{'ab'[k % 2]}").mkdir(parents=True, exist_ok=True)
            Path(f"VIDEOS/{'ab'[k % 2]}/{k}.mp4").write_bytes(Path("FILM.mp4").read_bytes())
    else:
        for of in ("FOLDER", "ANOTHER_FOLDER"):
            folder(of, ["summer", "winter"], 12)
        files = sorted(Path("FOLDER").rglob("*.png"))
        rows = [
            f"{file},{file.parent.name}|{file.stem[-1]},{k},{file.parent.name},{20 + k},{k / 2}"
            for k, file in enumerate(files)
        ]
        Path("TABLE.csv").write_text("\n".join(["path,labels,number,label,age,width", *rows]))


def shortened(given: list[str]) -> list[str]:
    recipes = [Path(word).read_text() for word in given if word.endswith(".yaml")]
    said = " ".join([*given, *recipes])
    less = [option for pattern, options in LESS.items() if re.search(pattern, said) for option in options.split()]
    return [*given, *less]


def run(command: str) -> None:
    """Runs a command in this process.

    Raises:
        SystemExit: it ends otherwise than well.
    """
    newest = re.sub(r"(outputs/\w+)/…", lambda task: str(max(Path(task[1]).iterdir(), key=os.path.getmtime)), command)
    name, *given = words(newest)
    if name == "python":
        _, name, *given = given
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", shortened([name, *given]))
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            if end.code:
                raise


@pytest.mark.parametrize("page", [pytest.param(page, marks=[pytest.mark.slow] * (page not in QUICK)) for page in PAGES])
def test_the_commands_on_a_page_run(page: str, empty: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copy(empty, "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    Path("configs").symlink_to(ROOT / "configs")
    published()
    readers(page)
    lines = [line.removeprefix(".venv/bin/") for at, line in COMMANDS if at == page]
    for command in [*(f"pipelines.{line}" for line in BEFORE.get(page, [])), *lines]:
        if not any(re.match(start, command) for start in NOT_RUN):
            print(command)  # shown if it fails
            run(command)
