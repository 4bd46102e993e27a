"""Face detection and alignment: eyes, nose and mouth come to fixed positions."""

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.errors import DataError
from datamodules.forms import FaceForm

# Eyes, tip of the nose and corners of the mouth in 112×112 pixels, the left one in the image first: SphereFace's
# template for 96×112 (Liu et al. 2017, arXiv:1704.08063), centred, as in ArcFace (Deng et al. 2019, arXiv:1801.07698).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
POINTS = ["face_left_eye", "face_right_eye", "face_nose", "face_left_mouth", "face_right_mouth"]  # names in tables
SIDE = 112
SIDES: dict[FaceForm, int] = {"arcface": SIDE, "dlib": 150, "facenet": 160}  # side of each form's images, in pixels
# The same points in dlib's crop, with a quarter of the face's side around it: from its mean face of 68 points, the
# centres of the eyes, the tip of the nose and the corners of the mouth.
DLIB = np.array([[47.5492, 46.5990], [100.4761, 46.5990], [74.0127, 76.5625], [50.4149, 103.0233], [97.6104, 103.0233]])
MARGIN = 14 / 160  # around the box, relative to a FaceNet image
SURE = 0.9  # minimum probability of a detected face
LONGEST = 1024  # maximum side of the image for detection, in pixels
SHORTEST = 256  # smaller images are enlarged, since landmarks are integers at a low resolution
RIM = 0.2  # width of the border that is added if nothing is found, relative to the longer side
SMALLEST = 20  # side of the smallest detected face


def similarity(points: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """Least-squares similarity transform (rotation, scale, translation) between two sets of points.

    Source: Umeyama 1991, IEEE TPAMI 13(4); in the plane, and without mirroring, it is a line fitted to complex numbers.

    Args:
        points: N×2, not all the same.
        target: N×2.

    Returns:
        2×3: the last column is the translation.
    """
    start, end = points @ (1, 1j), target @ (1, 1j)
    centred = start - start.mean()
    turn = np.vdot(centred, end - end.mean()) / np.vdot(centred, centred)
    shift = end.mean() - turn * start.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def aligned(
    image: NDArray[np.uint8], points: NDArray[np.float64], size: int = SIDE, form: FaceForm = "arcface"
) -> NDArray[np.uint8]:
    """Crops a face, upright, to the landmark positions of `TEMPLATE` or of `DLIB`. Areas beyond the picture are black.

    Args:
        image: uint8 H×W×C.
        points: the five points in it, 5×2, x and y in pixels, in the order of `TEMPLATE`.
        size: side of the result, in pixels.
        form: ``arcface`` or ``dlib``.

    Returns:
        uint8 size×size×C.
    """
    target = {"arcface": TEMPLATE, "dlib": DLIB}[form] * (size / SIDES[form])
    matrix = similarity(points, target)
    scale = float(np.hypot(*matrix[:, 0]))
    if scale < 1:  # averaged, to avoid aliasing
        height, width = image.shape[:2]
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        matrix = similarity((points + 0.5) * (smaller[0] / width, smaller[1] / height) - 0.5, target)
    face = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return face.reshape(size, size, -1).astype(np.uint8, copy=False)


def boxed(image: NDArray[np.uint8], box: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    """Crops a face's box with a margin of 14 in 160 pixels and stretches it to a square, as facenet-pytorch does.

    Args:
        image: uint8 H×W×C.
        box: left, top, right and bottom, in pixels.
        size: side of the result, in pixels.
    """
    around = (box[2:] - box[:2]) * MARGIN / (1 - MARGIN) / 2
    left, top = np.maximum(box[:2] - around, 0).astype(int)
    right, bottom = np.minimum(box[2:] + around, image.shape[1::-1]).astype(int)
    part = image[top : max(bottom, top + 1), left : max(right, left + 1)]
    return (
        cv2.resize(part, (size, size), interpolation=cv2.INTER_AREA)
        .reshape(size, size, -1)
        .astype(np.uint8, copy=False)
    )


def foremost(boxes: NDArray[np.float64], height: int, width: int) -> int:
    """Index of the main face of a picture: the largest area minus twice the squared distance from the centre.

    Args:
        boxes: N×4, left, top, right and bottom, in pixels.
        height: height of the image.
        width: width of the image.
    """
    sides, middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    return int((sides.prod(1) - 2 * np.square(middle - (width / 2, height / 2)).sum(1)).argmax())


class FaceDetector:
    """MTCNN (Zhang et al. 2016, arXiv:1604.02878) with the weights of the package facenet-pytorch.

    Args:
        device: device of the network, such as ``cuda``; ``auto`` for the GPU if there is one.

    Raises:
        DataError: the package is not installed, or the device is unavailable.
    """

    def __init__(self, device: str = "auto") -> None:
        try:
            from facenet_pytorch import MTCNN
        except ImportError as error:
            raise DataError(
                f"Faces are found by the package facenet-pytorch ({error}): pip install --no-deps facenet-pytorch. Without "
                "--no-deps it would ask for an older torch than it needs."
            ) from None
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            self.network: Any = MTCNN(min_face_size=SMALLEST, device=torch.device(device))
        except RuntimeError as error:
            raise DataError(f"The device {device} cannot be used: {str(error).splitlines()[0]}") from None

    def __call__(self, image: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Detects upright faces of at least a fiftieth of the picture's longer side.

        Args:
            image: uint8 H×W×3.

        Returns:
            Boxes of the faces, N×4, left, top, right and bottom; their five points, N×5×2, in the order of `TEMPLATE`.
        """
        longest = max(image.shape[:2])
        factor = LONGEST / longest if longest > LONGEST else max(1.0, SHORTEST / longest)
        if factor != 1:
            how = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
            image = cv2.resize(image, None, fx=factor, fy=factor, interpolation=how).astype(np.uint8, copy=False)
        wide = round(RIM * max(image.shape[:2]))  # faces that fill the image are found with a border around them
        for rim in (0, wide):
            bordered = cv2.copyMakeBorder(image, rim, rim, rim, rim, cv2.BORDER_REPLICATE)
            boxes, sure, points = None, [], None
            if min(image.shape[:2]) >= SMALLEST:
                boxes, sure, points = self.network.detect(bordered, landmarks=True)
            if boxes is not None and (kept := np.asarray(sure, float) >= SURE).any():
                return (np.asarray(boxes, float)[kept] - rim) / factor, (np.asarray(points, float)[kept] - rim) / factor
        return np.zeros((0, 4)), np.zeros((0, 5, 2))

    def points(self, image: NDArray[np.uint8]) -> NDArray[np.float64]:
        """Landmarks of the foremost face.

        Args:
            image: uint8 H×W×3 or H×W×1.

        Returns:
            float64 1×5×2, in the order of `POINTS`; 0×5×2 if there is no face.
        """
        image = np.repeat(image, 3, 2) if image.shape[2] == 1 else image
        boxes, points = self(image)
        return points[[foremost(boxes, *image.shape[:2])]] if len(boxes) else points


@dataclass(frozen=True)
class Face:
    """A face in an image.

    Args:
        pixels: the aligned crop, uint8 S×S×C.
        box: left, top, right and bottom, in pixels of the image.
    """

    pixels: NDArray[np.uint8]
    box: list[float]


def faces_of(
    image: NDArray[np.uint8], detector: FaceDetector, form: FaceForm = "arcface", size: int | None = None
) -> list[Face]:
    """Returns all faces of an image, the main one first; if there is no upright face, the image is rotated by quarter
    turns.

    Args:
        image: uint8 H×W×3.
        detector: the face detector.
        form: how faces are cropped: ``arcface`` and ``dlib`` align eyes, nose and mouth to the positions that these
            networks are trained on; ``facenet`` crops the box.
        size: side of the results, in pixels; None for the form's default.
    """
    size = size or SIDES[form]
    for turns in (0, 1, 3, 2):
        turned = np.ascontiguousarray(np.rot90(image, turns))
        boxes, points = detector(turned)
        if len(boxes):
            break
    first = foremost(boxes, *turned.shape[:2]) if len(boxes) else 0
    found = []
    for n in sorted(range(len(boxes)), key=lambda n: n != first):
        pixels = boxed(turned, boxes[n], size) if form == "facenet" else aligned(turned, points[n], size, form)
        corners, height, width = boxes[n].reshape(2, 2), *turned.shape[:2]
        for _ in range(turns):  # rotates back by a quarter turn
            corners = np.stack([height - corners[:, 1], corners[:, 0]], 1)
            height, width = width, height
        found.append(Face(pixels, np.concatenate([corners.min(0), corners.max(0)]).round(1).tolist()))
    return found
