"""Numbers and points beside images: tables, augmentation, training, and what becomes of a registered model."""

import json
import signal
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from conftest import start
from PIL import Image

import fovea
from datamodules import DataError, Manifest, MultiLabelTable, RegressionTable
from datamodules.augmentations import normalized_keypoints
from datamodules.images import read_image
from datamodules.labelled.alignment import POINTS
from datamodules.options import point_columns
from modules import Backbone, BackboneError, ClassificationModule, DataSpec, FewShotModule
from modules.warm_start import warm_start
from pipelines import alignment, evaluate, export, predict
from pipelines.classification import classification
from pipelines.multi_label import multi_label
from pipelines.regression import regression
from pipelines.serving import model as serving
from pipelines.serving import registry

NAMES = ["left_eye", "right_eye", "chin"]
PLACES = np.array([(0, 0), (34, 2), (16, 20)])
COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255)])
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu", "--data.num_workers", "0"]


def table(count: int = 60, **more: list[Any]) -> pd.DataFrame:
    """Noise with a dot at each of three points, and a number on which alone the class depends; written as ``t.csv``."""
    random, rows = np.random.default_rng(0), []
    for k in range(count):
        pixels = random.integers(80, 120, (48, 64, 3), np.uint8)
        points = random.integers(8, 18, (3, 2)) + PLACES
        for (x, y), colour in zip(points, COLOURS, strict=True):
            pixels[y - 2 : y + 3, x - 2 : x + 3] = colour
        Image.fromarray(pixels).save(f"{k}.png")
        split = "train" if k < count // 2 else "val" if k < count * 3 // 4 else "test"
        age = float(random.integers(51, 80) if k % 2 else random.integers(20, 50))
        places = {
            f"{name}_{axis}": at
            for name, own in zip(NAMES, points, strict=True)
            for axis, at in zip("xy", own, strict=True)
        }
        rows.append({"path": f"{k}.png", "label": "old" if age > 50 else "young", "split": split, "age": age, **places})
    made = pd.DataFrame(rows).assign(**more)
    made.to_csv("t.csv", index=False)
    return made


def data(**options: Any) -> Manifest:
    return Manifest("t.csv", **{"image_size": 32, "num_workers": 0, "tabular": ["age"], "keypoints": NAMES} | options)


def dots(image: np.ndarray) -> np.ndarray:
    """Where the dots are, 3×2."""
    return np.array([np.argwhere((np.abs(image - colour.astype(int)) < 80).all(2)).mean(0)[::-1] for colour in COLOURS])


@pytest.mark.parametrize(
    ("augmentation", "mirrored"),
    [
        ("none", False),
        ([{"HorizontalFlip": {"p": 1}}], True),
        ([{"Affine": {"rotate": [25, 25], "shear": [10, 10], "p": 1}}], False),
        ([{"Transpose": {"p": 1}}], True),
        ([{"HorizontalFlip": {"p": 1}}, {"VerticalFlip": {"p": 1}}], False),
    ],
)
@pytest.mark.parametrize("fit", ["crop", "stretch", "extend"])
def test_points_move_with_their_image_and_change_sides_in_a_mirror(augmentation: Any, mirrored: bool, fit: Any) -> None:
    made = table(8)
    own = data(augmentation=augmentation, image_size=64, fit=fit, crop_pct=1.0)
    sample = own.dataset("train", True)[0, 3]
    seen = dots(sample["image"])
    wanted = normalized_keypoints(seen[[1, 0, 2]] if mirrored else seen)
    assert np.abs(sample["tabular"][:6].reshape(3, 2) - wanted).max() < 0.06
    assert sample["tabular"][6] == made["age"][0]  # what is no coordinate stays
    assert own.tabular_names == ["left_eye_x", "left_eye_y", "right_eye_x", "right_eye_y", "chin_x", "chin_y", "age"]


def test_points_are_those_of_pixels_that_were_decoded_smaller() -> None:
    table(8)
    for k in range(8):
        with Image.open(f"{k}.png") as picture:
            picture.resize((64 * 16, 48 * 16), Image.Resampling.NEAREST).save(f"{k}.jpg", quality=95)
    made = pd.read_csv("t.csv")
    columns = point_columns(NAMES)
    made.assign(path=made["path"].str.replace("png", "jpg"), **{c: made[c] * 16 + 8 for c in columns}).to_csv("t.csv")
    turned = [{"Perspective": {"p": 1, "scale": [0.15, 0.15], "fit_output": True}}]  # where a point is counts
    sample = data(augmentation=turned, image_size=64, crop_pct=1.0).dataset("train", True)[0, 0]
    assert np.abs(sample["tabular"][:6].reshape(3, 2) - normalized_keypoints(dots(sample["image"]))).max() < 0.08


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"age": ""}, {}, "nothing under 'age' in row 3"),
        ({"age": "n/a"}, {}, r"'n/a' under 'age' in row 3.*1 of 8 rows.*remove the row"),
        ({"chin_y": "low"}, {}, r"'low' under 'chin_y' in row 3.*write one"),
        ({}, {"tabular": ["weight"]}, "no column 'weight'.*--data.tabular"),
        ({}, {"keypoints": ["nose", "chin"]}, "no column 'nose_x'.*--data.keypoints"),
        ({}, {"keypoints": ["chin"]}, "chin is a single keypoint.*--data.tabular"),
        ({}, {"tabular": ["chin_x"]}, "the column 'chin_x' 2 times"),
        (dict.fromkeys(point_columns(NAMES), 5), {}, "in row 3 all points"),
        (
            {},
            {"augmentation": [{"ThinPlateSpline": {}}, {"RandomGridShuffle": {}}, {"Mosaic": {}}]},
            "--data.augmentation",
        ),
    ],
)
def test_a_table_that_lacks_numbers_is_refused_with_row_and_column(change: Any, options: Any, said: str) -> None:
    made = table(8).astype(object)
    for name, value in change.items():
        made.loc[2, name] = value
    made.to_csv("t.csv", index=False)
    with pytest.raises(DataError, match=said):
        _ = data(**options).transform(True), data(**options).sources


def test_numbers_with_a_mark_between_thousands_are_counted() -> None:
    table(8).assign(age=[f"{k},000" for k in range(1, 9)]).to_csv("t.csv", index=False)
    with pytest.raises(DataError, match=r"'1,000' under 'age' in row 1, .* \(8 of 8 rows\)"):
        _ = data().sources


def test_points_outside_of_their_images_are_told() -> None:
    made = table(8).astype({"chin_x": float})
    made.loc[3, ["chin_x", "chin_y"]] = [640.5, 10]  # of a larger copy
    made.to_csv("t.csv", index=False)
    with pytest.warns(
        UserWarning, match=r"1 of 8 images have points.*3\.png, 64×48 pixels, has chin at \(640\.5, 10\)"
    ):
        _ = data().sources


def test_what_a_network_cannot_use_beside_images_is_refused() -> None:
    table(8)
    spec = DataSpec.of(data(), ClassificationModule.takes)
    with pytest.raises(BackboneError, match="mixup mixes images"):
        ClassificationModule(spec, Backbone("convnet"), mixup=0.2)
    with pytest.raises(BackboneError, match="which a network with keypoints as input does not"):
        ClassificationModule(spec, Backbone("convnet")).views.choose("flip")
    with pytest.raises(BackboneError, match=r"FewShot takes images alone.*leave --data.tabular"):
        FewShotModule(spec, Backbone("convnet"))


def test_from_a_table_to_a_registered_model_that_is_given_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    made = table()
    common = ["fit", "--data", "Manifest", "--data.file", "t.csv", "--data.tabular", "[age]", "--data.image_size", "32", *QUIET,
              "--data.batch_size", "10"]  # fmt: skip
    cli = classification([*common, "--data.keypoints", json.dumps(NAMES), "--backbone", "convnet", "--lr", "0.02",
                          "--trainer.max_epochs", "10", "--output", "o", "--register", "ages"])  # fmt: skip
    assert cli.trainer.callback_metrics["test/accuracy"] > 0.7  # of noise it would be a half
    train = made[made["split"] == "train"]["age"]
    scaling = cli.model.fusion.scaling
    assert scaling.mean[6] == pytest.approx(train.mean())
    assert scaling.std[6] == pytest.approx(train.std(ddof=0))
    figures = evaluate.evaluate("models:/ages/1")
    assert figures["test/accuracy"] == pytest.approx(float(cli.trainer.callback_metrics["test/accuracy"]))

    # The answers for a table are those of the test.
    test = made[made["split"] == "test"]
    test.drop(columns=["split", "label"]).to_csv("new.csv", index=False)
    capsys.readouterr()
    assert predict.predict("models:/ages/1", ["new.csv"], out="drawn", json=True) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    right = np.mean([answer["label"] == label for answer, label in zip(answers, test["label"], strict=True)])
    assert right == pytest.approx(figures["test/accuracy"])
    with pytest.raises(ValueError, match=r"takes left_eye_x, .*, age with each image: instead of images, give a table"):
        predict.predict("models:/ages/1", ["50.png"])
    said = test.rename(columns={"age": " Age", "chin_x": "CHIN_X"}).assign(
        **{" Age": test["age"].map("{:.1f}".format).str.replace(".", ",")}
    )
    said.to_csv("spelled.csv", index=False, sep=";")  # as a training reads it
    assert predict.predict("models:/ages/1", ["spelled.csv"], json=True) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == answers
    with pytest.raises(ValueError, match=r"--support needs a model that is shown pictures alone.*age"):
        predict.predict("models:/ages/1", ["50.png"], support=".")
    with pytest.raises(SystemExit):
        classification(["test", "--ckpt_path", "o/best.ckpt", "--data", "Manifest", "--data.file", "t.csv", "--data.tabular", "[age]",
                        "--data.keypoints", "[chin, left_eye]", "--output", "other", *QUIET])  # fmt: skip
    assert "Give --data.tabular and --data.keypoints what it was trained with" in capsys.readouterr().err
    test.head(2).assign(age=["", 30], chin_x=["", 9]).to_csv("gaps.csv", index=False)
    assert predict.predict("models:/ages/1", ["gaps.csv"], json=True) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert "There is no age with" in told.err

    test.head(3).assign(
        age=[1e39, 30, 30], **{f"{name}_{axis}": [9, 9, k] for k, name in enumerate(NAMES) for axis in "xy"}
    ).to_csv("wrong.csv", index=False)
    assert predict.predict("models:/ages/1", ["wrong.csv"], json=True) == 1
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 1
    assert "is no number of 32 bits" in told.err
    assert "are at one place" in told.err
    test.rename(columns={"age": "years"}).to_csv("renamed.csv", index=False)
    with pytest.raises(ValueError, match=r"renamed.csv has no column age, which models:/ages/1 takes"):
        predict.predict("models:/ages/1", ["renamed.csv"])

    # Served, exported, and as a start for a linear head that is solved for.
    served = mlflow.pyfunc.load_model("models:/ages/1")
    assert {"image", "age", "chin_x"} <= set(served.metadata.get_input_schema().input_names())
    rows = (
        test.rename(columns={"path": "image"}).astype({"age": int}).reset_index(drop=True)
    )  # points are whole numbers, too
    assert [answer["label"] for answer in fovea.load("models:/ages/1").predict(rows)] == [a["label"] for a in answers]
    assert served.predict(rows)["label"].tolist() == [answer["label"] for answer in answers]
    export.export("models:/ages/1", Path("a.onnx"), precisions="fp16")
    session = onnxruntime.InferenceSession("a.onnx")
    assert [given.name for given in session.get_inputs()] == ["image", "tabular"]
    batch = cli.datamodule.samples("test", 100)
    (said,) = session.run(None, {name: batch[name].numpy() for name in ("image", "tabular")})
    assert [cli.model.label_names[k] for k in said.argmax(1)] == [answer["label"] for answer in answers]
    solved = classification(
        [*common, "--backbone", "models:/ages/1", "--model.backbone.transfer", "features", "--output", "s"]
    )
    assert solved.trainer.callback_metrics["test/accuracy"] > 0.7


@pytest.mark.parametrize(
    ("task", "kind", "columns", "figure"),
    [
        (regression, "RegressionTable", ["--data.columns", "[weight]"], "test/r2"),
        (multi_label, "MultiLabelTable", ["--data.label_columns", "[heavy,light]"], "test/map"),
    ],
)
def test_quantities_and_labels_are_learned_from_numbers_and_points_beside_the_image(
    task: Any, kind: str, columns: list[str], figure: str
) -> None:
    ages = table(64)["age"]
    made = table(64, weight=ages * 2, heavy=(ages > 50).astype(int), light=(ages <= 50).astype(int))
    cli = task(["fit", "--data", kind, "--data.file", "t.csv", *columns, "--data.tabular", "[age]", "--data.keypoints",
                json.dumps(NAMES), "--data.image_size", "12", "--data.flip", "false", "--data.batch_size", "8", "--backbone", "mlp",
                "--lr", "0.01", *QUIET, "--trainer.max_epochs", "12", "--output", "o", "--register", kind])  # fmt: skip
    assert cli.trainer.callback_metrics[figure] > 0.8
    model = registry.load(f"models:/{kind}/1")
    rows = made[-2:].rename(columns={"path": "image"})[["image", *point_columns(NAMES), "age"]]
    answers = model.predict(None, rows)
    assert len(answers) == 2
    assert not answers.equals(model.predict(None, rows.assign(age=rows["age"][::-1].to_numpy() + 30)))
    with pytest.raises(ValueError, match="There is no age"):
        model.predict(None, rows.drop(columns="age"))
    export.export(f"models:/{kind}/1", Path("beside.onnx"))
    inputs = onnxruntime.InferenceSession("beside.onnx").get_inputs()
    assert [(one.name, one.shape[1]) for one in inputs] == [("image", 3), ("tabular", 7)]


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (Manifest, {"label_column": "age", "tabular": ["age"]}),
        (RegressionTable, {"columns": ["age", "weight"], "tabular": ["age"]}),
        (MultiLabelTable, {"label_columns": ["chin_x", "old"], "keypoints": ["chin", "nose"]}),
    ],
)
def test_what_is_to_be_predicted_is_no_input(kind: Any, settings: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="both name the column"):
        kind("t.csv", **settings)


def test_weights_of_other_columns_are_not_taken_over() -> None:
    def network(*columns: str) -> ClassificationModule:
        spec = DataSpec(3, 32, num_classes=2, label_names=["old", "young"], tabular_names=[*columns])
        return ClassificationModule(spec, Backbone("convnet"))

    assert "all" in warm_start(network("age", "width"), network("age", "width"))
    for columns in (("width", "age"), ("age", "height")):
        with pytest.raises(BackboneError, match="trained with age, width beside the image"):
            warm_start(network(*columns), network("age", "width"))


def test_a_truth_value_of_parquet_is_named_as_it_is_written() -> None:
    table(4).assign(smoker=True).to_parquet("t.parquet")
    with pytest.raises(DataError, match="has 'True' under 'smoker' in row 1, where the network needs a number"):
        Manifest("t.parquet", tabular=["smoker"], num_workers=0).setup("fit")


@pytest.mark.slow  # the contract kills a training of the same task
def test_a_killed_training_with_points_goes_on_and_ends_bit_identical() -> None:
    table(24)
    args = ["fit", "--data", "Manifest", "--data.file", "t.csv", "--data.tabular", "[age]", "--data.keypoints", json.dumps(NAMES),
            "--data.augmentation", "strong", "--data.image_size", "32", "--data.batch_size", "6", "--backbone", "convnet",
            "--trainer.max_epochs", "2", *QUIET]  # fmt: skip
    cut = [*args, "--output", "cut", "--checkpoint_seconds", "0"]
    kill = ["--trainer.callbacks+=faults.Kill", "--trainer.callbacks.step", "3"]
    assert start(classification, [*cut, *kill]) == [-signal.SIGKILL]
    assert start(classification, cut) == [0]
    classification([*args, "--output", "whole"])
    whole, resumed = (torch.load(f"{name}/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "cut"))
    assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_points_of_faces_are_written_to_a_table_and_found_in_new_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dots(alignment.FaceDetector):
        """Takes five shades of red for the points of a face."""

        def __init__(self, device: str = "auto") -> None: ...

        def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            found = [np.argwhere((image == (250 - k, 0, 0)).all(2)) for k in range(5)]
            if not all(map(len, found)):
                return np.zeros((0, 4)), np.zeros((0, 5, 2))
            return np.array([[0.0, 0, 48, 48]]), np.array([[places.mean(0)[::-1] for places in found]])

    random = np.random.default_rng(0)
    for person, middle in (("ann", 24), ("bob", 16)):  # where the nose is
        Path("faces", person).mkdir(parents=True)
        for k in range(16):
            pixels = random.integers(100, 120, (48, 48, 3), np.uint8)
            for n, (x, y) in enumerate([(12, 12), (36, 12), (middle, 24), (14, 38), (34, 38)]):
                pixels[y - 1 : y + 2, x - 1 + k % 2 : x + 2 + k % 2] = (250 - n, 0, 0)
            Image.fromarray(pixels).save(f"faces/{person}/{k}.png")
    Image.fromarray(random.integers(0, 99, (48, 48, 3), np.uint8)).save("faces/none.png")
    monkeypatch.setattr(alignment, "FaceDetector", Dots)
    monkeypatch.setattr(serving, "FaceDetector", Dots)
    assert "32 faces" in alignment.landmarks("faces", "faces.csv")
    rows = pd.read_csv("faces.csv")
    assert rows["label"].value_counts().to_dict() == {"ann": 16, "bob": 16}
    assert rows["path"][0] == "faces/ann/0.png"
    assert rows.filter(regex="nose").iloc[0].tolist() == [24.0, 24.0]
    cli = classification(["fit", "--data", "Manifest", "--data.file", "faces.csv", "--data.keypoints", json.dumps(POINTS),
                          "--data.image_size", "32", "--data.flip", "false", "--backbone", "mlp", "--lr", "0.01", *QUIET,
                          "--trainer.max_epochs", "20", "--data.batch_size", "8", "--output", "o", "--register", "noses"])  # fmt: skip
    answering = registry.load("models:/noses/1")
    files = ["faces/ann/3.png", "faces/bob/3.png"]
    given = rows[rows["path"].isin(files)].rename(columns={"path": "image"}).drop(columns="label")
    answers = answering.predict(None, files)
    assert answers["label"].tolist() == ["ann", "bob"]
    assert answers["probability"].tolist() == answering.predict(None, given)["probability"].tolist()
    assert answering.predict(None, [read_image(files[0])])["label"][0] == "ann"
    named = {"image": files[1], **given.iloc[1].drop("image").to_dict()}
    model = fovea.load("models:/noses/1")
    assert [answer["label"] for answer in model.predict(named)] == ["bob"]
    assert model.draw(named).size == model.draw(files[1]).size
    schema = mlflow.models.get_model_info("models:/noses/1").signature.inputs
    assert schema.required_input_names() == ["image"]
    with pytest.raises(ValueError, match="no face in faces"):
        answering.predict(None, ["faces/none.png"])
    assert predict.predict("models:/noses/1", ["faces"]) == 1  # one has no face
    assert cli.model.tabular_names[:2] == ["face_left_eye_x", "face_left_eye_y"]
