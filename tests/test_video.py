"""Videos: every frame answered and drawn, objects followed from frame to frame."""

import http.server
import json
import shutil
import signal
import threading
from pathlib import Path
from time import sleep
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import DigitScenes
from datamodules.annotated.scenes import Sprites
from datamodules.options import Preprocessing
from datamodules.videos import Video
from modules import ClassificationModule, DetectionModule
from modules.spec import Backbone, DataSpec
from pipelines import predict
from pipelines.engine.command import command
from pipelines.serving import registry, video
from pipelines.serving import store as storage

FRAMES = 20


@pytest.fixture(scope="module")
def sprites() -> Sprites:
    return Sprites(DigitScenes().items().sources["test"])


def truth(time: int) -> list[list[float]]:
    """Two digits that pass each other, and one that stands still and is hidden for a while."""
    boxes = [[10 + 3 * time, 10, 30 + 3 * time, 38], [90 - 3 * time, 42, 110 - 3 * time, 70], [60, 90, 85, 118]]
    return [list(map(float, box)) for box in boxes[: 2 if 10 <= time < 14 else 3]]


def film(sprites: Sprites, file: str) -> list[np.ndarray]:
    """Writes the video, without loss; returns its frames, RGB."""
    writer = cv2.VideoWriter(file, cv2.VideoWriter.fourcc(*"FFV1"), 10, (128, 130))
    frames = []
    for time in range(FRAMES):
        frame = np.full((130, 128, 3), (40, 70, 110), np.uint8)
        for k, (x1, y1, x2, y2) in enumerate(np.array(truth(time)).astype(int)):
            digit = cv2.resize(sprites[k], (x2 - x1, y2 - y1))
            frame[y1:y2, x1:x2] = np.maximum(frame[y1:y2, x1:x2], digit[..., None])
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
        frames.append(frame)
    writer.release()
    return frames


def detector() -> DetectionModule:
    torch.manual_seed(0)
    module = DetectionModule(
        DataSpec(num_classes=3, label_names=["one", "two", "three"], image_size=64), Backbone("resnet10t")
    )
    module.threshold.fill_(0.5)
    return module


def test_objects_keep_their_numbers_while_they_move_pass_fade_and_hide() -> None:
    module = detector()
    for _ in range(2):  # each video begins anew
        seen: list[dict[str, int]] = []
        with video.Tracker(module, 10) as tracker:
            assert float(module.threshold) == pytest.approx(0.5 / 3)
            for time in range(FRAMES):
                boxes = truth(time)
                order = np.random.default_rng(time).permutation(len(boxes))
                scores = [0.2 if time in (6, 7) and k == 0 else 0.9 for k in order]
                twin = [[value + 1 for value in boxes[1]]]  # taken for another digit too, less certainly
                stray = [[5.0, 100.0, 20.0, 120.0]] if time == 5 else []
                answer = {"boxes": [boxes[k] for k in order] + twin + stray,
                          "labels": [str(k) for k in order] + ["7"] + ["9"] * len(stray),
                          "scores": scores + [0.7] + [0.2] * len(stray)}  # fmt: skip
                found = tracker.follow(answer)
                assert len(found["boxes"]) == len(found["scores"]) == len(boxes), "no faint stray one, no twin"
                seen.append(dict(zip(found["labels"], found["ids"], strict=True)))
        assert float(module.threshold) == 0.5
        assert seen[0] == {"0": None, "1": None, "2": None}
        assert len({numbers["0"] for numbers in seen[1:]}) == len({numbers["1"] for numbers in seen[1:]}) == 1
        assert {numbers.get("2", seen[1]["2"]) for numbers in seen[1:]} == {seen[1]["2"]}
        assert len(set(seen[1].values())) == 3


def test_a_video_is_answered_frame_by_frame_and_drawn(sprites: Sprites, capsys: pytest.CaptureFixture[str]) -> None:
    preprocessing = Preprocessing(64, 3, "pad")
    module = detector()
    torch.nn.init.zeros_(module.detector.class_branch.last.bias)  # it has not learned, but it is not shy
    module.threshold.fill_(0.5)
    storage.save_model(Path("model"), module, preprocessing, "detection")
    Path("in").mkdir()
    frames = film(sprites, "in/film.avi")
    Image.fromarray(frames[3]).save("in/still.png")
    Path("in/broken.mp4").write_bytes(b"no video")
    assert predict.predict("model", ["in"], "out", json=True, batch_size=8, track=True) == 1
    out = capsys.readouterr()
    assert "in/broken.mp4 cannot be read as a video" in out.err
    rows = [json.loads(line) for line in out.out.splitlines()]
    assert Path("out/predictions.jsonl").read_text() == out.out
    still, *rows = rows
    assert still["path"] == "in/still.png"
    assert [row["frame"] for row in rows] == list(range(FRAMES))
    assert [row["seconds"] for row in rows] == [pytest.approx(k / 10) for k in range(FRAMES)]
    model = registry.load("model")
    plain = model.predict(None, frames).to_dict("records")
    assert any(answer["boxes"] for answer in plain)
    for row, answer in zip(rows, plain, strict=True):
        assert len(row["ids"]) == len(row["boxes"]) == len(row["scores"]) == len(row["labels"])
        assert row["boxes"][0] == answer["boxes"][0]

    drawn = list(Video("out/film.mp4"))
    assert len(drawn) == FRAMES
    expected = model.module.answers.draw(frames[5], {k: rows[5][k] for k in ("boxes", "labels", "scores", "ids")})
    assert expected.shape == drawn[5].shape
    blurred = [
        cv2.blur(np.asarray(image, np.float32), (5, 5))
        for image in (drawn[5], expected, frames[5].repeat(2, 0).repeat(2, 1))
    ]
    assert np.abs(blurred[0] - blurred[1]).mean() < 6, "but for the codec"
    assert np.abs(blurred[0] - blurred[2]).mean() > 12

    assert predict.predict("model", ["in/film.avi"]) == 0
    table = capsys.readouterr().out
    assert "frame" in table
    assert "three" in table or "one" in table or "two" in table


def test_which_boxes_are_told_can_be_chosen(sprites: Sprites, capsys: pytest.CaptureFixture[str]) -> None:
    module = detector()
    torch.nn.init.zeros_(module.detector.class_branch.last.bias)
    storage.save_model(Path("model"), module, Preprocessing(64, 3, "pad"), "detection")
    Path("in").mkdir()
    frames = film(sprites, "in/film.avi")
    Image.fromarray(frames[3]).save("in/still.png")

    def answers(*more: str) -> list[dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            command(predict.predict, ["model", "in/still.png", "--json", "true", *more])
        assert end.value.code == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    (plain,), (few,) = answers(), answers("--max_detections", "3", "--threshold", "0")
    assert len(few["boxes"]) == 3
    assert answers("--threshold", "0.999")[0]["boxes"] == []
    assert len(answers("--across_classes", "true", "--nms", "0.3")[0]["boxes"]) < len(plain["boxes"])

    name = plain["labels"][0]
    for earlier in ("still-77.png", "another-1.png"):
        Path("o/crops/x").mkdir(parents=True, exist_ok=True)
        Path("o/crops/x", earlier).touch()
    (own,) = answers("--classes", name, "--out", "o", "--save_crops", "true")
    assert [file.name for file in Path("o/crops/x").iterdir()] == ["another-1.png"], "only its own are replaced"
    shutil.rmtree("o/crops/x")
    assert own["labels"] == [label for label in plain["labels"] if label == name]
    written = sorted(Path("o/crops").rglob("*.png"), key=lambda file: int(file.stem.split("-")[-1]))
    assert [file.parent.name for file in written] == own["labels"]
    for file, (left, top, right, bottom) in zip(written, own["boxes"], strict=True):
        with Image.open(file) as part:
            assert abs(part.width - (right - left)) < 2
            assert abs(part.height - (bottom - top)) < 2

    storage.save_model(Path("faces"), ClassificationModule(DataSpec(num_classes=2, image_size=32), Backbone("lenet5")),
                        Preprocessing(32, 3, crop_pct=1.0), "classification")  # fmt: skip
    with pytest.raises(ValueError, match="--nms is about boxes, which a ClassificationModule does not find"):
        predict.predict("faces", ["in/still.png"], nms=0.5)


def test_a_classifier_answers_videos_too_but_follows_nothing(
    sprites: Sprites, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.save_model(Path("model"), ClassificationModule(DataSpec(num_classes=2, image_size=32), Backbone("lenet5")),
                        Preprocessing(32, 3, crop_pct=1.0), "classification")  # fmt: skip
    film(sprites, "film.avi")
    assert predict.predict("model", ["film.avi"], "out") == 0
    assert len(list(Video("out/film.mp4"))) == FRAMES
    capsys.readouterr()
    Image.new("RGB", (32, 32)).save("still.png")
    arguments: list[Any] = ["model", "still.png", "--track", "true"]
    with pytest.raises(SystemExit) as end:
        command(predict.predict, arguments)
    assert end.value.code == 2
    assert "follows boxes" in capsys.readouterr().err


class Camera(http.server.BaseHTTPRequestHandler):
    """Sends a picture again and again, as a network camera does."""

    picture = b""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=--frame")
        self.end_headers()
        try:
            while True:
                picture = self.picture
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(picture)}\r\n\r\n"
                self.wfile.write(head.encode() + picture + b"\r\n")
        except OSError:  # nobody watches any more
            pass

    def log_message(self, *_: object) -> None: ...


def test_a_stream_is_answered_until_ctrl_c(
    sprites: Sprites, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write = video.Drawing.write

    def pressed(drawing: video.Drawing, frame: np.ndarray, seconds: float) -> None:
        write(drawing, frame, seconds)
        if "live" in drawing.file and drawing._last > video.TICKS // 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(video.Drawing, "write", pressed)
    storage.save_model(Path("model"), detector(), Preprocessing(64, 3, "pad"), "detection")
    frames = film(sprites, "film.avi")
    Camera.picture = cv2.imencode(".jpg", frames[0])[1].tobytes()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Camera)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    assert predict.predict("model", [f"http://me:secret@{host}/live.mjpg", "film.avi"], "out", form="mot") == 0
    server.shutdown()
    server.server_close()
    said = capsys.readouterr()
    assert f"http://{host}/live.mjpg: ended after" in said.err
    text = Path("out/predictions.jsonl").read_text()
    assert "secret" not in text + said.err + said.out
    paths = [json.loads(line)["path"] for line in text.splitlines()]
    assert paths.count("film.avi") == FRAMES, "what else was asked for is answered too"
    live = paths.count(f"http://{host}/live.mjpg")
    assert live > 3
    (drawn,) = {file.name for file in Path("out").glob("*.mp4")} - {"film.mp4"}
    assert len(list(Video(f"out/{drawn}"))) == live
    named = {file.relative_to("out").as_posix() for file in Path("out").rglob("*.txt")}
    assert named == {drawn.replace(".mp4", ".txt"), "film.txt"}
    assert predict.predict("model", [f"rtsp://{host}/none", "7"]) == 1
    said = capsys.readouterr()
    assert f"stream rtsp://{host}/none does not answer" in said.err
    assert "camera 7 does not answer" in said.err


def test_of_a_live_source_the_newest_frame_is_processed_and_the_dropped_ones_are_counted() -> None:
    class Faster(Camera):
        sent = 0

        @property
        def picture(self) -> bytes:  # type: ignore[override]
            type(self).sent += 1
            return cv2.imencode(".jpg", np.full((16, 16, 3), min(8 * self.sent, 248), np.uint8))[1].tobytes()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Faster)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    video = Video(f"http://127.0.0.1:{server.server_port}/live.mjpg")
    frames = iter(video)
    first = next(frames).max()
    next(frames)
    while video.dropped < 5:
        sleep(0.001)
    assert next(frames).max() >= min(first + 5 * 8, 248) - 4
    assert len(video.seconds) == 3
    frames.close()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.usefixtures("_interruptible")
def test_what_was_answered_of_a_film_is_there_whatever_ends_the_command(
    name: str, code: int, sprites: Sprites, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, seen = video.Drawing.write, 3 * FRAMES // 4

    def ended(drawing: video.Drawing, frame: np.ndarray, seconds: float) -> None:
        write(drawing, frame, seconds)
        if round(10 * seconds) == seen - 1:
            assert len(Path("out/predictions.jsonl").read_text().splitlines()) == seen, "even of kill -9"
            signal.raise_signal(getattr(signal, name))

    monkeypatch.setattr(video.Drawing, "write", ended)
    storage.save_model(Path("model"), detector(), Preprocessing(64, 3, "pad"), "detection")
    film(sprites, "film.avi")
    with pytest.raises(SystemExit) as end:
        command(predict.predict, ["model", "film.avi", "--out", "out"])
    assert end.value.code == code
    assert len(list(Video("out/film.mp4"))) == seen


def test_a_drawn_film_can_be_seen_as_far_as_it_was_written_when_the_process_is_killed() -> None:
    noise = np.random.default_rng(0)
    with video.Drawing("film.mp4", 10) as drawing:
        for k in range(600):
            drawing.write(noise.integers(0, 255, (64, 64, 3), dtype=np.uint8), k / 10)
        shutil.copy("film.mp4", "killed.mp4")
    assert len(list(Video("film.mp4"))) == 600
    assert len(list(Video("killed.mp4"))) >= 250, "but for what waits for the next key frame"


def test_frames_are_told_and_drawn_when_they_are_seen_and_a_film_that_is_cut_off_is_named(
    sprites: Sprites, capsys: pytest.CaptureFixture[str]
) -> None:
    storage.save_model(Path("model"), ClassificationModule(DataSpec(num_classes=2, image_size=32), Backbone("lenet5")),
                        Preprocessing(32, 3, crop_pct=1.0), "classification")  # fmt: skip
    Path("in").mkdir()
    times = [0, 0.1, 0.2, 1.0, 3.0, 3.1]
    frames = film(sprites, "in/b.avi")
    for name in ("in/a.mp4", "in/b.mp4"):
        drawing = video.Drawing(name, 10)
        for frame, time in zip(frames, times, strict=False):
            drawing.write(frame, time)
        drawing.close()
    Path("in/c.avi").write_bytes(Path("in/b.avi").read_bytes()[: Path("in/b.avi").stat().st_size // 2])
    assert predict.predict("model", ["in"], "out", json=True) == 1
    out = capsys.readouterr()
    rows = [json.loads(line) for line in out.out.splitlines()]
    told = {
        name: [row["seconds"] for row in rows if row["path"] == f"in/{name}"] for name in ("a.mp4", "b.avi", "c.avi")
    }
    assert told["a.mp4"] == pytest.approx(times, abs=0.01)
    assert told["b.avi"] == pytest.approx([k / 10 for k in range(FRAMES)], abs=0.01)
    assert f"in/c.avi ends after {len(told['c.avi'])} of" in out.err
    assert "1 of 4 files" in out.err
    assert len(list(Path("out").glob("*.mp4"))) == 4, "a.mp4, and b.mp4 beside b.avi"
    with av.open("out/a.mp4") as file:
        assert file.streams.video[0].codec_context.name == "h264"
        assert [float(frame.time) for frame in file.decode(video=0)] == pytest.approx(times, abs=0.01)
