import json
import shutil
from pathlib import Path
from threading import Thread

import lightning as L
import mlflow
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image

from datamodules import Glyphs
from modules import FaceNetModule, Optimization
from modules.spec import Backbone, DataSpec
from pipelines.facenet import facenet
from pipelines.faces import _warn
from pipelines.serving import gallery as galleries
from pipelines.serving import registration, registry
from pipelines.serving.gallery import Gallery


@pytest.fixture(scope="module")
def trained() -> tuple[str, Glyphs]:
    """A registered model of characters that were seen in training, so that it is sure of them."""
    torch.manual_seed(0)
    data = Glyphs(people=60, augmentation="light", num_workers=0)
    module = FaceNetModule(DataSpec(in_chans=1, image_size=32), optimization=Optimization(lr=2e-3))
    trainer = L.Trainer(max_epochs=12, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                        use_distributed_sampler=False, num_sanity_val_steps=0, check_val_every_n_epoch=12)  # fmt: skip
    trainer.fit(module, data)
    with mlflow.start_run() as run:
        pass
    config = {"class_path": "Glyphs", "init_args": {"people": 60}}
    version = registration.register("people", module, data, config, "facenet", run.info.run_id, {})
    return f"models:/people/{version.version}", data


def test_of_two_who_enrol_at_once_each_adds_to_what_the_other_has(trained):
    model, data = trained
    names = data.sources["train"].names.tolist()
    save(data, "mine", names[:2], slice(0, 2))
    save(data, "theirs", names[2:3], slice(0, 2))
    ask("enrol", model, "theirs.parquet", "theirs")
    with FileLock("both.parquet.lock"):
        other = Thread(target=ask, args=("enrol", model, "both.parquet", "mine"))
        other.start()
        other.join(5)
        assert other.is_alive()
        Path("theirs.parquet").rename("both.parquet")
    other.join()
    assert set(Gallery.read("both.parquet").people) == set(names[:3])


def save(data: Glyphs, folder: str, people: list[str], pictures: slice, flat: bool = False) -> Path:
    """Pictures of people in a sub-folder for each, or all in one."""
    source = data.sources["train"]
    for name in people:
        for n in np.flatnonzero(source.people == name)[pictures]:
            file = Path(folder, "" if flat else name, f"{name}_{n:05d}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(source[n]["image"][..., 0]).save(file)
    return Path(folder)


def ask(*args: str) -> None:
    facenet.main(args)


def test_people_are_enrolled_identified_and_unknown(trained, capsys):
    model, data = trained
    names = data.sources["train"].names.tolist()
    known, stranger = names[:8], names[8]
    save(data, "known", known, slice(0, 6))
    save(data, "asked", [known[2], stranger], slice(6, 9))
    ask("enrol", model, "people.parquet", "known")
    assert "48 pictures of 8 people" in capsys.readouterr().out
    Path("known", "notes.txt").touch()
    ask("enrol", model, "pattern.parquet", "known/*")
    assert sorted(set(Gallery.read("pattern.parquet").people)) == sorted(known)
    assert "48 pictures of 8 people" in capsys.readouterr().out
    files = sorted(map(str, Path("asked").rglob("*.png")))
    ask("identify", "people.parquet", *files, "--json", "true", "--threshold", "4")
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    enrolled = sorted(Path("known").rglob("*.png"))
    answers = registry.load(model).predict(None, [*files, *map(str, enrolled)])["embedding"]
    asked, gallery = np.split(np.stack([np.array(row) for row in answers]), [len(files)])
    distances = ((asked[:, None] - gallery) ** 2).sum(2)
    for row, distance in zip(rows, distances, strict=True):
        assert row["distance"] == pytest.approx(distance.min(), abs=1e-3)
        near = {
            file.parent.name for file, value in zip(enrolled, distance, strict=True) if value < distance.min() + 1e-3
        }
        assert row["person"] in near
    apart = sorted(row["distance"] for row in rows)
    gap = int(np.diff(apart).argmax())
    ask("identify", "people.parquet", "asked", "--threshold", str((apart[gap] + apart[gap + 1]) / 2))
    table = capsys.readouterr().out
    assert table.count("unknown") == len(rows) - gap - 1
    # The same pictures again change nothing; others of a person are added.
    ask("enrol", model, "people.parquet", "known")
    assert "48 pictures of 8 people" in capsys.readouterr().out
    ask("enrol", model, "people.parquet", f"asked/{stranger}")
    assert "51 pictures of 9 people" in capsys.readouterr().out
    ask("identify", "people.parquet", f"asked/{stranger}")
    assert "unknown" not in capsys.readouterr().out
    copy = shutil.copy(next(Path("known", known[0]).glob("*.png")), f"asked/{known[2]}/copy.png")
    with pytest.warns(UserWarning, match=r"under more than one name; .*copy\.png as"):
        ask("enrol", model, "people.parquet", copy, "--name", known[2])


def test_faces_are_found_in_photographs_where_a_gallery_was_made_so(trained, capsys, monkeypatch):
    model, data = trained
    names = data.sources["train"].names.tolist()[:2]
    save(data, "faces", names, slice(0, 2))
    one, other = (np.array(Image.open(next(Path("faces", name).glob("*.png")))) for name in names)

    class TwoSquares:
        """Finds a face in each half of a picture twice as wide as high, and one in a square one that is not empty."""

        def __init__(self, device: str) -> None:
            pass

        def __call__(self, image):
            side = image.shape[0]
            boxes = [[x, 0, x + side, side] for x in range(0, image.shape[1], side) if image.any()]
            return np.array(boxes, float).reshape(-1, 4), np.zeros((len(boxes), 5, 2))

    monkeypatch.setattr("pipelines.faces.FaceDetector", TwoSquares)
    Path("photos").mkdir()
    Image.fromarray(np.concatenate([one, other], 1)).save("photos/both.png")
    Image.fromarray(np.zeros((32, 32), np.uint8)).save("photos/empty.png")
    Path("photos/text.png").write_text("no picture")
    ask("enrol", model, "found.parquet", "faces", "--faces", "facenet")
    ask("identify", "found.parquet", "photos", "--json", "true", "--threshold", "4")
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines() if line.startswith("{")]
    assert sorted(row["person"] for row in rows) == sorted(names)
    assert sorted(row["box"] for row in rows) == [[0, 0, 32, 32], [32, 0, 64, 32]]
    assert "no face: photos/empty.png" in said.err
    assert "passed over: photos/text.png" in said.err
    ask("verify", model, "photos/both.png", "photos/both.png", "--faces", "facenet")
    assert "one person: squared distance 0.0000" in capsys.readouterr().out
    for args, wrong in (
        (("enrol", model, "found.parquet", "faces"), "holds embeddings of faces cut out as --faces facenet"),
        (
            ("verify", model, "photos/both.png", "photos/empty.png", "--faces", "facenet"),
            "There is no face in photos/empty.png",
        ),
        (("identify", "found.parquet", "photos/empty.png"), "There is no face in any of the pictures"),
    ):
        with pytest.raises(SystemExit):
            ask(*args)
        assert wrong in capsys.readouterr().err


def test_pictures_that_a_published_network_of_faces_was_not_made_for_are_told_of(capsys):
    network = FaceNetModule(DataSpec(in_chans=3, image_size=150), Backbone("dlib_face_resnet", pretrained=False))
    for name, size in (("photograph", (60, 40)), ("face", (40, 40))):
        Image.new("RGB", size).save(f"{name}.png")
    for form, file, told in (
        ("arcface", "face.png", "--faces dlib, not arcface"),
        (None, "photograph.png", "1 of 2 pictures are not square and are compared as a whole"),
        (None, "face.png", ""),
        ("dlib", "photograph.png", ""),
    ):
        _warn(network, form, ["face.png", file])
        said = capsys.readouterr().err
        assert told in said
        assert bool(said) == bool(told)


def test_two_pictures_are_compared_at_the_calibrated_threshold(trained, capsys):
    model, data = trained
    threshold = registry.load(model).module.threshold
    assert 0 < threshold < 4
    one, other = data.sources["train"].names[:2].tolist()
    save(data, "faces", [one, other], slice(0, 2))
    ones, others = (sorted(map(str, Path("faces", name).iterdir())) for name in (one, other))
    ask("verify", model, ones[0], ones[0])
    assert capsys.readouterr().out.strip() == f"one person: squared distance 0.0000, threshold {threshold:.4f}"
    ask("verify", model, ones[0], others[0], "--threshold", "0.0001")
    assert capsys.readouterr().out.startswith("two people")


def test_photographs_are_sorted_into_a_folder_for_each_person(trained, capsys):
    model, data = trained
    names = data.sources["train"].names[::7][:5].tolist()  # neighbours in the alphabet look alike
    save(data, "mixed", names, slice(0, 5), flat=True)
    ask("cluster", model, "mixed", "--out", "sorted", "--threshold", "0.5")
    assert "25 pictures: " in capsys.readouterr().out
    rows = [json.loads(line) for line in Path("sorted", "clusters.jsonl").read_text().splitlines()]
    assert sorted(row["path"] for row in rows) == sorted(map(str, Path("mixed").iterdir()))
    assert all(Path(row["copy"]).read_bytes() == Path(row["path"]).read_bytes() for row in rows)
    groups = {row["person"] for row in rows}
    assert all(Image.open(f"sorted/{group}.png").size[0] > 100 for group in groups)
    owners = [row["path"].split("/")[1][:6] for row in rows]
    together = [(a == b, x["person"] == y["person"]) for a, x in zip(owners, rows, strict=True)
                for b, y in zip(owners, rows, strict=True) if x is not y]  # fmt: skip
    assert np.mean([one == other for one, other in together]) > 0.9


def test_mistakes_end_in_one_paragraph(trained, capsys):
    model, data = trained
    save(data, "known", data.sources["train"].names[:2].tolist(), slice(0, 2))
    ask("enrol", model, "people.parquet", "known")
    Gallery("models:/other/1", ["a"], ["a.png"], np.ones((1, 128), np.float32)).write("other.parquet")
    Path("text.parquet").write_text("no table")
    file = next(map(str, Path("known").rglob("*.png")))
    for args, said in (
        (("enrol", model, "people.parquet", file), "--name"),
        (("enrol", model, "other.parquet", "known"), "make a new gallery"),
        (("enrol", model, "people.parquet", file, "--name", "other"), "and of other: enrol it for one"),
        (("enrol", model, "people.parquet", "nowhere"), "There is no file or folder nowhere"),
        (("identify", "none.parquet", file), "make one with enrol"),
        (("identify", "text.parquet", file), "is not a gallery"),
        (("identify", "people.parquet", "text.parquet"), "unpack those inside"),
        (("identify", "people.parquet", file, "--threshold", "7"), "between 0 and 4"),
        (("verify", "models:/nobody/1", file, file), "nobody"),
        (("cluster", model, "known", "--out", "known"), "is not empty"),
    ):
        with pytest.raises(SystemExit) as end:
            ask(*args)
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert said in message
        assert "Traceback" not in message


def test_a_large_gallery_is_searched_through_an_index_that_lies_beside_it(monkeypatch):
    monkeypatch.setattr(galleries, "LARGE", 3000)
    generator = np.random.default_rng(0)
    people = generator.normal(size=(800, 32))
    rows = (people.repeat(5, 0) + 0.3 * generator.normal(size=(4000, 32))).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    names = [f"p{i}" for i in range(800) for _ in range(5)]
    Gallery("models:/m/1", names, names, rows).write("big.parquet")
    assert Path("big.parquet.faiss").is_file()
    gallery = Gallery.read("big.parquet")
    assert gallery.index.ntotal == 4000
    asked = rows[::7] + 0.05 * generator.normal(size=rows[::7].shape).astype(np.float32)
    asked = (asked / np.linalg.norm(asked, axis=1, keepdims=True)).astype(np.float32)
    distance, place = gallery.search(asked)
    exact = 2 - 2 * asked @ rows.T
    assert (place == exact.argmin(1)).mean() > 0.95
    right = place == exact.argmin(1)
    assert np.allclose(distance[right], exact.min(1)[right], atol=1e-5)
    # One that was enrolled since is found too.
    gallery = Gallery("models:/m/1", [*names, "new"], [*names, "new"], np.concatenate([rows, -rows[:1]]))
    gallery.write("big.parquet")
    assert Gallery.read("big.parquet").search(-rows[:1])[1] == 4000
