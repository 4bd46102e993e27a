"""A registered model answers about files, through MLflow and over HTTP, and runs nothing that was put into it."""

import base64
import io
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import uvicorn
import yaml
from PIL import Image
from sklearn.datasets import load_sample_image

import fovea
from datamodules import DataError, ImageFolder
from datamodules.videos import Video
from modules import ClassificationModule
from modules.answers import Answers
from modules.spec import DataSpec
from pipelines import app, predict
from pipelines.classification import classification
from pipelines.engine.cli import VisionCLI
from pipelines.engine.command import command
from pipelines.engine.disk import write_image
from pipelines.serving import registry
from pipelines.serving import store as storage
from pipelines.serving.answers import Told
from pipelines.serving.files import find
from pipelines.serving.model import VisionModel
from pipelines.serving.page import Asked, page
from pipelines.serving.subject import Subject
from pipelines.serving.video import Drawing

MODEL = "models:/asked/1"
SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> VisionCLI:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        return classification(["fit", *SMALL, "--trainer.max_epochs", "3", "--model.optimization.lr", "0.003",
                               "--register", "asked", "--output", "out"])  # fmt: skip


def write_digits(trained: VisionCLI, *files: str) -> None:
    for i, file in enumerate(files):
        Path(file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(trained.datamodule.sources["test"][i]["image"][..., 0]).save(file)


def ask(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        command(predict.predict, [MODEL, *args])
    return int(end.value.code or 0)


def test_files_folders_and_patterns_are_found_once() -> None:
    names = ["a/1.png", "a/b/1.JPG", "a/b/[1].png", "a/notes.txt", "c/2.gif", "a/out/1.png"]
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    below = ["a/1.png", "a/b/1.JPG", "a/b/[1].png"]
    assert find(["a"], "a/out") == (below, [], os.path.abspath("a"))
    assert find(["a/b/[1].png", "c/*", "a/1.png", "a", "x/*", "y.png"], os.path.abspath("a/out")) == (
        ["a/b/[1].png", "c/2.gif", "a/1.png", "a/b/1.JPG"],
        ["x/*", "y.png"],
        os.getcwd(),
    )
    assert find(["**/*.png"])[0] == ["a/1.png", "a/b/[1].png", "a/out/1.png"]
    assert find(["none"]) == ([], ["none"], "")


def test_a_folder_is_answered_drawn_and_its_bad_files_are_named(
    trained: VisionCLI, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["in/a.png", "in/b.jpg", *(f"in/s/{name}.png" for name in "abcdefg"), "in/t/a.tif"]  # in three batches
    write_digits(trained, *files)
    Path("in/bad.png").write_bytes(Path("in/a.png").read_bytes()[:60])
    Path("in/empty.png").touch()
    good = sorted(files)
    assert ask("in", "in/none.png", "--out", "in/out", "--json", "true", "--batch_size", "4") == 1
    out = capsys.readouterr()
    rows = [json.loads(line) for line in out.out.splitlines()]
    assert [row.pop("path") for row in rows] == good
    model = registry.load(MODEL)
    for file, row in zip(good, rows, strict=True):
        (one,) = model.predict(None, [file]).to_dict("records")
        assert (row["label"], row["top"]) == (one["label"], pytest.approx(one["top"], abs=1e-4))
    assert all(f"in/{name}.png" in out.err for name in ("bad", "empty", "none"))
    assert "3 of 13 files could not be read." in out.err
    assert Path("in/out/predictions.jsonl").read_text() == out.out
    drawn = {str(path.relative_to("in/out")) for path in Path("in/out").rglob("[!.]*") if path.is_file()}
    assert drawn == {"predictions.jsonl", *(file.removeprefix("in/") for file in good)}
    drawing = np.asarray(Image.open("in/out/s/a.png"))
    assert drawing.shape[0] > drawing.shape[1] == 112
    assert np.array_equal(drawing[-112::14, ::14, 0], np.asarray(Image.open("in/s/a.png")))
    assert (drawing[:-112] < 100).any(), "the caption"

    assert ask("in/a.png", "in/s", "--out", "in/out") == 0
    out = capsys.readouterr()
    assert len([line for line in out.out.splitlines() if "in/" in line]) == 8
    assert f"{rows[0]['probability']:.3f}" in out.out
    assert not out.err
    assert len(Path("in/out/predictions.jsonl").read_text().splitlines()) == 8


def test_a_mistake_is_one_line_and_exit_code_2(trained: VisionCLI, capsys: pytest.CaptureFixture[str]) -> None:
    write_digits(trained, "in/a.png")
    before = Path("in/a.png").read_bytes()
    Path("empty").mkdir()
    for args, message in [
        (["empty", "none"], "No images were found"),
        (["train-000000.tar"], "measured by pipelines.evaluate"),
        (["http://me:pw@127.0.0.1/a%20b.JPG?size=2"], "http://127.0.0.1/a%20b.JPG?size=2 is a picture"),
        (["in", "--out", "in"], "would replace"),
        (["in", "--device", "cuda:99"], "The device cuda:99 cannot be used"),
        (["in", "--batch_size", "0"], "at least 1"),
        (["in", "--form", "yolo"], "say where with --out"),
        (["in", "--form", "yolo", "--out", "o"], "for the answers of detectors"),
        (["in", "--form", "mot", "--out", "o", "--truth", "t.json"], "--form coco"),
    ]:
        assert ask(*args) == 2, args
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) <= 2
    assert Path("in/a.png").read_bytes() == before


def test_no_more_than_two_batches_are_held(trained: VisionCLI) -> None:
    taken = []
    images = (taken.append(i) or np.full((8, 8), i, np.uint8) for i in range(100))
    answers = registry.load(MODEL).stream(images, 8)
    for i in range(1, 101):
        assert "label" in next(answers)
        assert len(taken) <= i + 16
    assert next(answers, None) is None


def test_every_form_of_an_image_is_seen_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 30, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    Path("in/x").mkdir(parents=True)
    colour.save("in/x/turned.png", exif=turned)
    colour.save("in/x/turned.jpg", exif=turned)
    colour.quantize(16).save("in/x/palette.png")
    colour.convert("L").save("in/x/grey.png")
    Image.fromarray(rng.integers(0, 2**16, (20, 30), np.uint16)).save("in/x/deep.png")
    Image.fromarray(rng.integers(0, 256, (20, 30, 4), np.uint8)).save("in/x/clear.png")
    shutil.copytree("in/x", "in/y")
    data = ImageFolder("in", image_size=12, num_workers=0, batch_size=16)
    data.prepare_data()
    data.setup("test")
    storage.save_model(
        Path("model"),
        ClassificationModule(DataSpec(num_classes=2, image_size=12)),
        data.preprocessing,
        "classification",
    )
    model = VisionModel().load(Path("model"))
    split, transform = data.sources["train"], data.transform(False)
    for i, path in enumerate(split.paths):
        expected = transform(image=split[i]["image"])["image"]
        file = Path(path).read_bytes()
        text = base64.encodebytes(file).decode()
        for form in (path, Path(path), file, text, f"data:image/png;base64,{text}", Image.open(io.BytesIO(file))):
            assert np.array_equal(model.prepare(form), expected), (path, type(form))
        if "grey" in path or "clear" in path:
            assert np.array_equal(model.prepare(np.asarray(Image.open(path))), expected), path
    for form, message in [
        ("in/x/none.png", "in/x/none.png is neither a file nor an image in base64"),
        ("abcd", "abcd is neither a file"),
        (np.zeros((3, 12, 12), np.uint8), "not 3×12×12"),
        (np.zeros((12, 12)), "not float64"),
        (None, "An image is a path, .*, not None"),
        (" ", "An empty text is neither a file"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.prepare(form)
    with pytest.raises(DataError, match="the given data"):
        model.prepare(b"no image")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DataError, match="pixels; cut it into pieces"):
        model.prepare("in/x/palette.png")


def test_a_large_photograph_is_answered_as_in_training_and_nearly_as_its_pixels() -> None:
    for name in ("china", "flower"):
        Path("in", name).mkdir(parents=True)
        for i in range(8):
            picture = np.roll(load_sample_image(f"{name}.jpg"), 50 * i, 1)
            Image.fromarray(picture).save(f"in/{name}/{i}.jpg", quality=90)
    data = ImageFolder("in", image_size=64, num_workers=0, batch_size=16)
    torch.manual_seed(0)
    module = ClassificationModule(DataSpec(num_classes=2, image_size=64))
    storage.save_model(Path("model"), module, data.preprocessing, "classification")
    model = VisionModel().load(Path("model"))
    dataset = data.dataset("train", augmented=False)
    paths, pixels = data.sources["train"].paths.tolist(), [sample["image"] for sample in data.sources["train"]]
    for i, path in enumerate(paths):
        assert np.array_equal(model.prepare(path), dataset[i, 0]["image"])
    small, whole = (pd.DataFrame(model.stream(given))["top"].map(lambda top: top["0"]) for given in (paths, pixels))
    assert 0 < (small - whole).abs().max() < 0.02


def test_mlflow_s_own_loading_takes_every_form(trained: VisionCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path[:])  # to which it adds the model's code
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    write_digits(trained, "a.png")
    model, data = mlflow.pyfunc.load_model(MODEL), Path("a.png").read_bytes()
    text, picture = base64.b64encode(data).decode(), Image.open("a.png")
    pixels = np.asarray(picture)
    expected = registry.load(MODEL).predict(None, ["a.png"] * 2)
    for form in ("a.png", Path("a.png"), data, text, picture, pixels, pixels[..., None], np.stack([pixels] * 3, -1)):
        both = [form, form]
        for given in (pd.DataFrame({"image": both}), {"image": both}, [{"image": form}] * 2):
            pd.testing.assert_frame_equal(model.predict(given), expected)
    with pytest.raises(mlflow.MlflowException, match="missing inputs"):
        model.predict(["a.png"])
    with pytest.raises(mlflow.MlflowException, match="Image 2 of 2: no"):  # which a server tells its client
        model.predict({"image": ["a.png", "no.png"]})
    for name in ("Image", "path"):
        table = pd.DataFrame({name: ["a.png"] * 2})
        pd.testing.assert_frame_equal(registry.load(MODEL).predict(None, table), expected)
        assert fovea.load(MODEL).predict(table) == expected.to_dict("records")


def test_a_served_model_answers_as_the_local_one(trained: VisionCLI) -> None:
    write_digits(trained, "a.png")
    text = base64.b64encode(Path("a.png").read_bytes()).decode()
    expected = registry.load(MODEL).predict(None, [text, text]).to_dict("records")
    Path("a.png").unlink()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
                    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}  # fmt: skip
    serve = [sys.executable, "-P", "-m", "mlflow", "models", "serve", "-m", MODEL, "--env-manager", "local",
               "--port", str(port), "--host", "127.0.0.1"]  # fmt: skip
    address = f"http://127.0.0.1:{port}"
    with open("log", "w") as log:
        server = subprocess.Popen(serve, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(f"{address}/ping", timeout=5)
                break
            except OSError:
                assert server.poll() is None, Path("log").read_text()
                time.sleep(0.2)
        both = [{"image": text}, {"image": text}]
        for body in ({"dataframe_records": both}, {"inputs": {"image": [text, text]}}, {"instances": both}):
            request = urllib.request.Request(f"{address}/invocations", json.dumps(body).encode(),
                                             {"Content-Type": "application/json"})  # fmt: skip
            with urllib.request.urlopen(request, timeout=60) as response:
                assert json.load(response)["predictions"] == expected
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(20)
        finally:
            if server.poll() is None:
                os.killpg(server.pid, signal.SIGKILL)


class Payload:
    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (os.path.abspath("executed"), "w")


def test_code_in_a_model_s_folder_is_not_run(trained: VisionCLI, monkeypatch: pytest.MonkeyPatch) -> None:
    write_digits(trained, "a.png")
    expected = registry.load(MODEL).predict(None, ["a.png"])
    shutil.copytree(mlflow.artifacts.download_artifacts(MODEL), "model")
    evil = pickle.dumps(Payload())
    flavours = yaml.safe_load(Path("model/MLmodel").read_text())
    flavour = flavours["flavors"]["python_function"]
    del flavour["model_code_path"]
    Path("model/MLmodel").write_text(yaml.safe_dump(flavours | {"flavors": {"python_function": flavour}}))
    flavour["python_model"] = "python_model.pkl"
    Path("model/MLmodel").write_text(yaml.safe_dump(flavours))
    Path("model/python_model.pkl").write_bytes(evil)
    for code in (
        "model.py",
        "code/pipelines/serving/model.py",
        "code/modules/__init__.py",
        "code/evil.py",
        "__init__.py",
    ):
        Path("model", code).write_text(f"open({os.path.abspath('executed')!r}, 'w')\n")
    assert registry.load("model").predict(None, ["a.png"]).equals(expected)
    assert predict.predict("model", ["a.png"]) == 0

    monkeypatch.syspath_prepend(os.getcwd())
    (description,) = Path("model").rglob("architecture.yaml")
    weights, plain = description.with_name("model.safetensors"), yaml.safe_load(description.read_text())
    torch.save({"conv1.weight": Payload()}, "evil.pth")
    options = {"backbone": os.path.abspath("evil.pth"), "backbone_options": {"architecture": "lenet5"}}
    for text in (
        "!!python/object/apply:builtins.open [executed, w]",
        yaml.safe_dump(plain | {"class_path": "os.system"}),
        yaml.safe_dump(plain | {"class_path": "model.code.evil.Evil"}),  # Python would find it from here
        yaml.safe_dump(plain | {"module": plain["module"] | options}),
    ):
        description.write_text(text)
        with pytest.raises(ValueError, match="is not a model that Fovea saved"):
            registry.load("model")
    for later, said in (
        (plain | {"module": plain["module"] | {"novelty": 1}}, "a setting that this version .* 'novelty'"),
        (plain | {"class_path": "modules.Novelty"}, "no modules.Novelty in this version of Fovea"),
    ):
        description.write_text(yaml.safe_dump(later))
        with pytest.raises(ValueError, match=said):
            registry.load("model")
    description.write_text(yaml.safe_dump(plain))
    weights.write_bytes(evil)
    with pytest.raises(ValueError, match="is not a model that Fovea saved"):
        registry.load("model")
    assert not Path("executed").exists()

    monkeypatch.setattr(sys, "path", sys.path[:])
    with suppress(Exception):
        mlflow.pyfunc.load_model("model")
    assert Path("executed").exists()  # by MLflow, which trusts a model


@pytest.mark.parametrize(
    "args", [["fit", "--ckpt_path", "evil.ckpt"], ["test", "--ckpt_path", "evil.ckpt"], ["fit"], ["test"]]
)
def test_code_in_a_checkpoint_is_not_run(args: list[str]) -> None:
    Path("out").mkdir()
    for file in ("evil.ckpt", "out/last.ckpt", "out/best.ckpt"):
        torch.save({"state_dict": Payload()}, file)
    with pytest.raises((SystemExit, pickle.UnpicklingError)):
        classification([*args, *SMALL, "--output", "out", "--trainer.max_epochs", "1"])
    assert not Path("executed").exists()
    torch.load("evil.ckpt", weights_only=False)
    assert Path("executed").exists()  # it would have been


def test_so_many_images_go_through_the_network_together_as_are_asked_for(trained: VisionCLI) -> None:
    model = registry.load(MODEL)
    sizes: list[int] = []
    model.module.backbone.register_forward_hook(lambda part, given, made: sizes.append(len(given[0])))
    images = [trained.datamodule.sources["test"][i]["image"] for i in range(150)]
    for size, expected in ((128, [128, 22]), (100, [100, 50]), (64, [64, 64, 22])):
        sizes.clear()
        assert len(list(model.stream(images, size))) == 150
        assert sizes == expected


def test_a_task_without_a_drawing_shows_the_image() -> None:
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4, 1)
    drawing = Answers().draw(grey, {})
    assert drawing.shape == (3, 4, 3)
    assert (drawing == grey).all()


@contextmanager
def served(*models: str) -> Iterator[str]:
    """The page of `app`, at its address."""
    asked = [Asked(subject, VisionModel().load(subject.folder)) for subject in map(Subject.find, models)]
    with socket.create_server(("127.0.0.1", 0)) as listening, page(asked) as application:
        server = uvicorn.Server(uvicorn.Config(application, log_level="warning"))
        thread = Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def fetched(address: str, content: bytes | None = None, **headers: str) -> tuple[int, bytes]:
    request = urllib.request.Request(address, content, headers, method="GET" if content is None else "PUT")
    try:
        with urllib.request.urlopen(request) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_a_page_answers_about_dropped_pictures_and_videos_and_shows_the_pictures_of_the_run(trained: VisionCLI) -> None:
    write_digits(trained, "one.png", "a/ü & 2.png")
    frames = [np.asarray(Image.open(name).convert("RGB").resize((64, 64))) for name in ("one.png", "a/ü & 2.png")]
    with Drawing("film.mp4", 2) as film:
        for number, frame in enumerate(frames * 2):
            film.write(frame, number / 2)
    with served(MODEL) as place:
        assert "Drop pictures or a video here" in fetched(place)[1].decode()
        assert json.loads(fetched(f"{place}/models")[1]) == [{"address": MODEL, "kind": "Classification"}]
        for file in ("one.png", "a/ü & 2.png"):
            name = urllib.parse.quote(os.path.basename(file))
            told = json.loads(fetched(f"{place}/answer/0?name={name}", Path(file).read_bytes())[1])
            wanted = registry.load(MODEL).predict(None, [file])["label"][0]
            assert json.loads(told["answer"])["label"] == wanted
            drawing = Image.open(io.BytesIO(fetched(f"{place}/drawings/{told['drawing']}")[1]))
            assert min(drawing.size) >= 100
        told = json.loads(fetched(f"{place}/answer/0?name=film.MP4", Path("film.mp4").read_bytes())[1])
        assert [frame["seconds"] for frame in json.loads(told["answer"])] == [0, 0.5, 1, 1.5]
        Path("drawn.mp4").write_bytes(fetched(f"{place}/drawings/{told['drawing']}")[1])
        assert len([*Video("drawn.mp4")]) == 4
        status, said = fetched(f"{place}/answer/0?name=text.png", b"no picture")
        assert status == 422
        assert json.loads(said)["detail"].startswith("text.png is not an image")
        logged = json.loads(fetched(f"{place}/logged/0")[1])
        assert {"train/samples", "val/confusion_matrix"} & set(logged)
        picture = next(iter(next(iter(logged.values())).values()))
        assert Image.open(io.BytesIO(fetched(f"{place}/logged/0/{urllib.parse.quote(picture)}")[1])).width > 8
        for wrong in ("/answer/1?name=a.png", "/drawings/../page.py", "/drawings/0.jpg", "/logged/7"):
            assert fetched(place + wrong, b"" if "answer" in wrong else None)[0] == 404
        assert fetched(f"{place}/logged/0/images/..%2F..%2Fx+step+1+timestamp.png")[0] == 404
        assert fetched(place, Host="elsewhere.example")[0] == 400  # a page of another with a name for this machine


def test_a_page_answers_whatever_the_file_is_called_and_says_what_it_cannot_draw(trained: VisionCLI, tmp_path) -> None:
    write_digits(trained, "one.png")
    Image.new("L", (70_000, 1)).save("line.png")
    before = {*Path(tempfile.gettempdir()).glob("fovea-page-*")}
    with served(MODEL) as place:
        for name in ("a." + "x" * 300, "../../a.png", "a\0b.é"):
            status, told = fetched(
                f"{place}/answer/0?name={urllib.parse.quote(name, safe='')}", Path("one.png").read_bytes()
            )
            assert status == 200, told
        status, told = fetched(f"{place}/answer/0?name=line.png", Path("line.png").read_bytes())
        assert status == 422
        assert "70000 × " in json.loads(told)["detail"]
        (folder,) = {*Path(tempfile.gettempdir()).glob("fovea-page-*")} - before
        assert [each.suffix for each in folder.iterdir()] == [".jpg"] * 3


def test_a_picture_that_cannot_be_drawn_does_not_end_the_command(trained: VisionCLI, capsys) -> None:
    write_digits(trained, "all/a.jpg", "all/z.jpg")
    Image.new("L", (3000, 2)).save(
        "all/thin.jpg"
    )  # drawn so large that all of it is read, it would be 336,000 pixels long
    Image.new("L", (65_000, 30)).save("all/wide.jpg")
    predict.predict(MODEL, ["all"], out="drawn", json=True)
    assert sorted(
        os.path.basename(json.loads(line)["path"]) for line in capsys.readouterr().out.splitlines()
    ) == sorted(os.listdir("all"))
    assert Image.open("drawn/thin.jpg").width == 3000
    with pytest.raises(ValueError, match=r"70000 × 1 pixels"):
        write_image("line.jpg", np.zeros((1, 70_000, 3), np.uint8))


def test_a_port_that_is_taken_ends_the_page_in_one_paragraph(trained: VisionCLI, capsys) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(SystemExit) as end:
        command(app.app, [MODEL, "--port", str(taken.getsockname()[1]), "--browser", "false"])
    assert end.value.code == 2
    assert "The page cannot listen on" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no Chromium here")
def test_a_browser_shows_the_answer_for_a_picture_that_is_dropped(trained: VisionCLI, monkeypatch) -> None:
    write_digits(trained, "one.png")
    dropped = """<script>
      fetch("data:image/png;base64,IMAGE").then(response => response.blob()).then(blob => {
        const given = new DataTransfer();
        given.items.add(new File([blob], "one.png"));
        const wait = setInterval(() => { if (!models.length) return; clearInterval(wait);
          dispatchEvent(new DragEvent("drop", { dataTransfer: given })); }, 50);
      });</script>""".replace("IMAGE", base64.b64encode(Path("one.png").read_bytes()).decode())
    read = Path.read_text
    monkeypatch.setattr(Path, "read_text", lambda path, *args: read(path, *args) + dropped * (path.name == "page.html"))
    with served(MODEL, MODEL) as place:
        shown = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom", place],
            capture_output=True, text=True, timeout=120,
        ).stdout  # fmt: skip
    label = registry.load(MODEL).predict(None, ["one.png"])["label"][0]
    assert shown.count(f'"label": "{label}"') == 2  # of each model
    assert shown.count('alt="The answer for one.png"') == 2
    assert "Pictures of the run" in shown
    assert "at step" in shown


def test_a_table_of_answers_shows_no_picture_in_letters(capsys: pytest.CaptureFixture[str]) -> None:
    with Told(json=False) as told:
        told.add({"path": "a.jpg"}, {"pictures": {"enlarged": "data:image/png;base64," + "A" * 40_000}})
    said = " ".join(capsys.readouterr().out.split())
    assert "a.jpg │ a picture of 30 kB, saved with --out" in said
    assert "AAA" not in said
