"""Sequences: the gates, packing, series, moving digits, folders of videos, and a video that is asked about as a whole."""

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from datamodules import DataError, MovingDigits, Series, VideoFolder
from datamodules.clips import WAYS
from datamodules.loading import KeyedDataset, collate
from datamodules.options import Preprocessing
from datamodules.series import LIMIT, terms
from datamodules.videos import Video
from modules import Backbone, DataSpec, SequenceModule
from modules.sequences import Cell
from pipelines.classification import classification
from pipelines.predict import predict
from pipelines.sequences import extend, sequences
from pipelines.serving.store import save_model

SERIES = DataSpec(in_chans=1, image_size=1, num_classes=LIMIT)
QUICK = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.enable_progress_bar", "false",
         "--trainer.accelerator", "cpu"]  # fmt: skip


def network(cell: Cell = "lstm", hidden_size: int = 4, num_layers: int = 1) -> SequenceModule:
    torch.manual_seed(0)
    backbone = Backbone("embedding", options={"width": 3})
    return SequenceModule(SERIES, backbone, cell=cell, hidden_size=hidden_size, num_layers=num_layers).eval()


def numbers(*series: list[int]) -> dict[str, Tensor]:
    return collate([{"image": np.array(each, np.uint8).reshape(-1, 1, 1, 1)} for each in series])


def film(file: str, frames: list[np.ndarray]) -> None:
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(file, cv2.VideoWriter.fourcc(*"FFV1"), 10, frames[0].shape[1::-1])
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()


def grey(count: int, first: int = 0) -> list[np.ndarray]:
    """Frames of 48×32 of which each is one grey tone, ten lighter than the one before."""
    return [np.full((32, 48, 3), first + 10 * k, np.uint8) for k in range(count)]


def test_an_lstm_of_one_number_is_as_worked_out_by_hand() -> None:
    """All weights 0, but W_c = 1: each gate is σ(0) = 1/2, and C̃ = tanh(x)."""
    lstm = torch.nn.LSTM(1, 1)
    for value in lstm.parameters():
        torch.nn.init.zeros_(value)
    with torch.no_grad():
        lstm.weight_ih_l0[2] = 1  # torch's order is i, f, C̃, o
    out, (hidden, memory) = lstm(torch.tensor([[1.0], [2.0]]))
    first = 0.5 * np.tanh(1)  # 0.3808
    second = 0.5 * first + 0.5 * np.tanh(2)  # 0.6724
    assert memory.item() == pytest.approx(second, abs=1e-6) == pytest.approx(0.67241, abs=1e-4)
    assert out.flatten().tolist() == pytest.approx([0.5 * np.tanh(first), 0.5 * np.tanh(second)], abs=1e-6)
    assert hidden.item() == out[-1].item()


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_the_state_is_what_the_equations_of_the_gates_say(cell: Cell) -> None:
    module = network(cell)
    series = [6, 7, 8, 200]
    w, u = module.recurrent.weight_ih_l0, module.recurrent.weight_hh_l0
    b, c = module.recurrent.bias_ih_l0, module.recurrent.bias_hh_l0
    h = memory = torch.zeros(4)
    for number in series:
        x = module.norm(module.backbone.neck.weight[number])  # the embedding of a number
        if cell == "rnn":
            h = torch.tanh(w @ x + b + u @ h + c)
        elif cell == "lstm":
            i, f, candidate, o = (w @ x + b + u @ h + c).chunk(4)
            memory = f.sigmoid() * memory + i.sigmoid() * candidate.tanh()
            h = o.sigmoid() * memory.tanh()
        else:
            (r, z, n), (r_h, z_h, n_h) = (w @ x + b).chunk(3), (u @ h + c).chunk(3)
            r, z = (r + r_h).sigmoid(), (z + z_h).sigmoid()
            h = (1 - z) * (n + r * n_h).tanh() + z * h
    torch.testing.assert_close(module.logits(numbers(series))[0], module.head(h))


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_a_sequence_is_answered_alone_as_among_longer_ones(cell: Cell) -> None:
    module = network(cell, num_layers=2)
    given = [[2, 4, 8], [6, 7, 8, 9, 10], [5]]
    together = numbers(*given)
    assert together["length"].tolist() == [3, 5, 1]
    assert together["image"].shape == (3, 5, 1, 1, 1)
    alone = torch.cat([module.logits(numbers(each)) for each in given])
    torch.testing.assert_close(module.logits(together), alone)
    together["image"][0, 3:] = 77  # what is after the end
    torch.testing.assert_close(module.logits(together), alone)


def test_only_the_frames_of_clips_go_through_the_backbone() -> None:
    torch.manual_seed(0)
    module = SequenceModule(DataSpec(in_chans=3, image_size=32, num_classes=3), Backbone("test_resnet"), hidden_size=8)
    clips = [np.random.default_rng(k).integers(0, 256, (k, 32, 32, 3), np.uint8) for k in (2, 5)]
    batch, seen = collate([{"image": clip} for clip in clips]), []
    module.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module.logits(batch)
    expected = module.normalize(torch.from_numpy(np.concatenate(clips)).permute(0, 3, 1, 2))
    torch.testing.assert_close(seen[0], expected)
    image = batch["image"][1, 0][None]
    torch.testing.assert_close(module.eval()(image), module(image[:, None]))  # a clip of one frame


def test_a_series_is_decided_by_more_than_its_last_number() -> None:
    assert [2, 4, 8, 16] in terms("geometric", 4).tolist()
    assert [2, 4, 6, 8] in terms("arithmetic", 4).tolist()
    data = Series(gap=3, train=300, val=100, test=100)
    again = Series(gap=3, train=300, val=100, test=100)
    assert data.identity() == again.identity() != Series(gap=3, train=300, val=100, test=100, series_seed=1).identity()
    arithmetic: dict[str, set[tuple[int, ...]]] = {}
    for split, source in data.sources.items():
        for k in range(len(source)):
            *series, a, b, c = source[k]["image"].flatten().tolist()
            assert 3 <= len(series) <= 5
            assert min(a, b, c) >= LIMIT > max(series)
            row = [*series, int(source[k]["label"])]
            if len({*np.diff(row).tolist()}) == 1:
                arithmetic.setdefault(split, set()).add(tuple(row))
            else:
                assert all(x * z == y * y for x, y, z in zip(row, row[1:], row[2:], strict=False))
    assert arithmetic.keys() == {"train", "val", "test"}
    assert not arithmetic["train"] & (arithmetic["val"] | arithmetic["test"])


def test_one_digit_moves_the_way_that_the_label_says() -> None:
    data = MovingDigits(train=40, val=8, test=8, lengths=(3, 6))
    source = data.sources["train"]
    assert sorted(source.labels.tolist()) == list(range(40))
    assert {len(source[k]["image"]) for k in range(40)} == {3, 4, 5, 6}
    assert data.identity() == MovingDigits(train=40, val=8, test=8, lengths=(3, 6)).identity()
    for k in range(40):
        clip, label = source[k]["image"].astype(int)[..., 0], source[k]["label"]
        ground = np.median(clip, 0) if len(clip) > 3 else clip.mean(0)
        first, last = (np.argwhere(abs(clip[at] - clip[-1 - at]) > 40).mean(0) for at in (0, -1))
        assert (first == last).all(), "what differs, differs in both"
        weights = [np.clip(abs(frame - ground) - 20, 0, None) for frame in (clip[0], clip[-1])]
        centres = [np.array([(w.sum(1) @ np.arange(32)), (w.sum(0) @ np.arange(32))]) / w.sum() for w in weights]
        way = np.array(list(WAYS.values())[label % 4])
        assert (centres[1] - centres[0]) @ way > 0
    one = MovingDigits(train=8, val=4, test=4, frames=1)
    assert next(iter(one.val_dataloader()))["length"].tolist() == [1] * 4
    augmented = MovingDigits(train=8, val=4, test=4, augmentation="strong").dataset("train", True)[0, 0]["image"]
    assert augmented.shape[1:] == (32, 32, 1)


def test_frames_of_a_clip_are_augmented_alike() -> None:
    for k in range(4):
        film(
            f"videos/{'ab'[k % 2]}/{k}.avi",
            [np.kron(np.arange(96).reshape(8, 12, 1), np.ones((4, 4, 3))).astype(np.uint8)] * 3,
        )
    data = VideoFolder("videos", image_size=24, frames=3, augmentation="strong", num_workers=0)
    data.take_whole()
    dataset = KeyedDataset(data.sources["test"], data.transform(True), 0)
    clips = [dataset[0, epoch]["image"] for epoch in range(3)]
    for clip in clips:
        assert clip.shape == (3, 24, 24, 3)
        assert (clip == clip[0]).all()
    assert not (clips[0] == clips[1]).all()


def test_a_folder_of_videos_is_read_and_what_is_wrong_is_said() -> None:
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for name in ("dark", "light"):
            for k in range(count):
                film(
                    f"videos/{split}/{name}/{k}.avi", grey(4 + k, 10 * k + (100 if name == "light" else 0) + len(split))
                )
    data = VideoFolder("videos", image_size=32, frames=4, in_chans=1, augmentation="none", num_workers=0)
    assert data.label_names == ["dark", "light"]
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 6, "val": 2, "test": 2}
    assert data.preprocessing.as_data() == {"image_size": 32, "in_chans": 1, "crop_pct": 1.0, "frames": 4}
    clip = data.sources["train"][2]["image"]  # six frames, of which four are shown
    assert clip.shape == (4, 32, 48, 1)
    assert clip[:, 0, 0, 0].tolist() == [25 + 10 * k for k in (0, 2, 3, 5)]
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (6, 4, 1, 32, 32)

    Path("videos/train/dark/9.avi").write_bytes(b"no video")
    with pytest.raises(DataError, match=r"1 of 11 videos cannot be read: .*9\.avi \(no frame can be read"):
        _ = VideoFolder("videos", image_size=32).sources
    with pytest.warns(UserWarning, match="Skipped: 1 of 11 videos"):
        assert len(VideoFolder("videos", image_size=32, on_bad_file="skip").sources["train"]) == 6
    whole = Path("videos/train/dark/0.avi").read_bytes()
    Path("videos/train/dark/9.avi").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="videos cannot be read"):
        _ = VideoFolder("videos", image_size=32).sources
    Path("empty/a").mkdir(parents=True)
    Path("empty/b").mkdir()
    with pytest.raises(DataError, match="has no videos in folders of classes; those read are mp4"):
        _ = VideoFolder("empty").sources
    film("one/a/0.avi", grey(3))
    with pytest.raises(DataError, match="has only one class"):
        _ = VideoFolder("one").num_classes
    with pytest.raises(DataError, match="has videos: leave it out"):
        VideoFolder("videos", cache="memory")


def test_a_video_is_answered_as_a_whole(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    module = SequenceModule(DataSpec(in_chans=1, image_size=32, label_names=["rises", "falls"]), hidden_size=8)
    save_model(Path("model"), module, Preprocessing(32, 1, crop_pct=1.0, frames=4), "sequences")
    film("films/a.avi", grey(12))
    film("films/b.avi", grey(3, 120))
    Path("films/c.avi").write_bytes(b"no video")
    assert predict("model", ["films"], out="drawn", json=True) == 1
    told, error = capsys.readouterr()
    assert "films/c.avi cannot be read as a video" in error
    rows = [json.loads(line) for line in told.splitlines()]
    assert [Path(row["path"]).name for row in rows] == ["a.avi", "b.avi"]
    assert "frame" not in rows[0]
    assert len(list(Video("drawn/a.mp4"))) == 12
    clip = np.stack(grey(12))[[1, 4, 7, 10], :, 8:40, :1]  # the middle of each quarter, and of each frame
    batch = collate([{"image": clip}])
    assert rows[0]["label"] == module.predict(batch)[0]["label"]
    assert rows[0]["probability"] == pytest.approx(module.predict(batch)[0]["probability"], abs=1e-3)
    with pytest.raises(ValueError, match=r"clips of pictures: ask python -m pipelines\.predict"):
        extend("model", [1, 2, 3])


def test_a_series_is_extended() -> None:
    save_model(Path("model"), network(), Series().preprocessing, "sequences")
    said = extend("model", [6, 7, 8], count=2)
    (first,) = network().predict(numbers([6, 7, 8]))
    assert said.startswith(f"6 7 8 → {first['label']} ({first['probability']:.3f}) ")
    assert len(said.split("→")[1].split()) == 4
    with pytest.raises(ValueError, match="numbers from 0 to 255, not 6 700"):
        extend("model", [6, 700])
    Image.new("L", (8, 8)).save("a.png")
    with pytest.raises(ValueError, match=r"series of numbers: ask python -m pipelines\.sequences extend"):
        predict("model", ["a.png"])


@pytest.mark.parametrize(
    ("command", "args", "said"),
    [
        (sequences, ["--data", "Digits"], "its samples have no length"),
        (classification, ["--data", "MovingDigits"], "has clips, which python -m pipelines.sequences learns from"),
        (sequences, ["--data", "MovingDigits", "--model.backbone.transfer", "auto"], "auto measures pictures"),
        (sequences, ["--data", "MovingDigits", "--data.lengths", "[5, 2]"], "--data.lengths must be two numbers"),
        (sequences, ["--data", "MovingDigits", "--model.backbone", "embedding"], "series of numbers"),
    ],
    ids=["pictures", "clips for pictures", "auto", "lengths", "embedding"],
)
def test_a_mistake_is_said_in_a_paragraph(
    command: object, args: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    few = [] if "Digits" in args else ["--data.train", "40", "--data.val", "8", "--data.test", "8"]
    with pytest.raises(SystemExit) as end:
        command(["fit", *args, *few, *QUICK, "--output", "out"])  # type: ignore[operator]
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert said in message
    assert "Traceback" not in message
