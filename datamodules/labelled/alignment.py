"""Faces found in photographs, and cut out so that eyes, nose and mouth are at the same places in all."""

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.base import DataError

# Eyes, tip of the nose and corners of the mouth in 112×112 pixels, the left one in the picture first. They are SphereFace's
# for 96×112 (Liu et al. 2017, arXiv:1704.08063), moved to the middle, as ArcFace has them (Deng et al. 2019, arXiv:1801.07698).
TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)
SIDE = 112
SURE = 0.9  # probability from which on something is a face
LONGEST = 1024  # side of the picture that faces are looked for in, in pixels
SMALLEST = 20  # side of the smallest face in it


def similarity(points: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    """The turn, scale and shift that bring points closest to others, by least squares.

    Source: Umeyama 1991, IEEE TPAMI 13(4); in the plane, and without mirroring, it is a line fitted to complex numbers.

    Args:
        points: N×2, not all the same.
        target: N×2.

    Returns:
        2×3: the last column is the shift.
    """
    start, end = points @ (1, 1j), target @ (1, 1j)
    centred = start - start.mean()
    turn = np.vdot(centred, end - end.mean()) / np.vdot(centred, centred)
    shift = end.mean() - turn * start.mean()
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def aligned(image: NDArray[np.uint8], points: NDArray[np.float64], size: int = SIDE) -> NDArray[np.uint8]:
    """Cuts a face out, upright, at the places of `TEMPLATE`. What lies beyond the picture is black.

    Args:
        image: uint8 H×W×C.
        points: the five points in it, 5×2, x and y in pixels, in the order of `TEMPLATE`.
        size: side of the result, in pixels.

    Returns:
        uint8 size×size×C.
    """
    target = TEMPLATE * (size / SIDE)
    matrix = similarity(points, target)
    scale = float(np.hypot(*matrix[:, 0]))
    if scale < 1:  # averaged, lest single pixels be picked out
        height, width = image.shape[:2]
        smaller = max(1, round(width * scale)), max(1, round(height * scale))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA).astype(np.uint8, copy=False)
        matrix = similarity((points + 0.5) * (smaller[0] / width, smaller[1] / height) - 0.5, target)
    face = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
    return face.reshape(size, size, -1).astype(np.uint8, copy=False)


def foremost(boxes: NDArray[np.float64], height: int, width: int) -> int:
    """Which of several faces a picture is of: the one with the largest area, less twice its squared distance from the middle.

    Args:
        boxes: N×4, left, top, right and bottom, in pixels.
        height: of the picture.
        width: of the picture.
    """
    sides, middle = boxes[:, 2:] - boxes[:, :2], (boxes[:, 2:] + boxes[:, :2]) / 2
    return int((sides.prod(1) - 2 * np.square(middle - (width / 2, height / 2)).sum(1)).argmax())


class FaceDetector:
    """MTCNN (Zhang et al. 2016, arXiv:1604.02878) of the package facenet-pytorch, which brings the weights along.

    Args:
        device: where it runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Raises:
        DataError: the package is not installed, or there is no such device.
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
        """Looks for faces that are at least a fiftieth of the picture's longer side.

        Args:
            image: uint8 H×W×3.

        Returns:
            Boxes of the faces, N×4, left, top, right and bottom; their five points, N×5×2, in the order of `TEMPLATE`.
        """
        factor = min(1.0, LONGEST / max(image.shape[:2]))
        if factor < 1:
            smaller = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
            image = smaller.astype(np.uint8, copy=False)
        boxes, sure, points = None, [], None
        if min(image.shape[:2]) >= SMALLEST:
            boxes, sure, points = self.network.detect(image, landmarks=True)
        if boxes is None:
            return np.zeros((0, 4)), np.zeros((0, 5, 2))
        kept = np.asarray(sure, float) >= SURE
        return np.asarray(boxes, float)[kept] / factor, np.asarray(points, float)[kept] / factor
