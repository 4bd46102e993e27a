"""Videos: frames read on demand, and video files as an array of clips."""

import hashlib
import os
import re
import time
from array import array
from collections import deque
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from threading import Condition, Event, Thread
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.decoded import ImageFiles
from datamodules.errors import DataError
from datamodules.images import EXTENSIONS as EXTENSIONS_OF_IMAGES
from datamodules.images import Reduction
from datamodules.paths import Member

EXTENSIONS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".ts")
PATIENCE = 10_000  # milliseconds to wait for a camera or a stream
Frame = NDArray[np.uint8]


def is_stream(source: str) -> bool:
    """Whether a source is a camera number or a stream address rather than a file.

    >>> is_stream("0"), is_stream("rtsp://camera/1"), is_stream("film.mp4")
    (True, True, False)
    """
    return bool(re.fullmatch(r"\d+|(?i:rtsps?|rtmps?|https?|udp|tcp|srt)://.+", source)) and not os.path.exists(source)


def is_picture_address(source: str) -> bool:
    """Whether a stream address is that of an image file.

    >>> is_picture_address("https://host/a.JPG?size=2"), is_picture_address("http://camera/live.mjpg")
    (True, False)
    """
    return "://" in source and is_stream(source) and urlsplit(source).path.lower().endswith(EXTENSIONS_OF_IMAGES)


def without_login(source: str) -> str:
    """Removes user and password from a source's address, before the host or among its parameters.

    >>> without_login("rtsp://me:p@ss@camera/1"), without_login("http://camera/v?user=me&pwd=s3&size=2")
    ('rtsp://camera/1', 'http://camera/v?user=***&pwd=***&size=2')
    """
    hidden = re.sub(r"(?<=://)[^/?]*@", "", source)
    return re.sub(r"(?i)([?&][\w-]*(?:user|usr|login|pass|pwd|auth|token|key|secret)[\w-]*=)[^&]*", r"\1***", hidden)


def is_video(file: str) -> bool:
    """Whether a file is a video by its extension, or a source is a stream."""
    return file.lower().endswith(EXTENSIONS) or is_stream(file)


class Video:
    """Frames of a file or stream, read on demand; ``seconds`` has the time stamp of each frame read.

    Args:
        file: file, camera number or stream address; see `is_stream`.

    Attributes:
        name: the file, or the stream without a password in its address.
        live: whether its length is unknown, as with a camera. Its frames are then read as they come, and only the newest is given.
        dropped: frames of a live source that came while others were processed.

    Raises:
        DataError: it cannot be read.
    """

    def __init__(self, file: str) -> None:
        self.file, stream = file, is_stream(file)
        self.name = without_login(file) if stream else file
        if file.isdecimal() and stream:
            self._capture = cv2.VideoCapture(int(file))
        else:
            waits = (
                [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, PATIENCE] if stream else []
            )
            self._capture = cv2.VideoCapture(file, cv2.CAP_FFMPEG if stream else cv2.CAP_ANY, waits)
        self.rate = self._capture.get(cv2.CAP_PROP_FPS) or 25.0
        self.length = max(0, int(self._capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        self.live = stream and not self.length
        self.dropped = 0
        self.seconds = array("d")  # there may be millions of frames
        found, first = self._capture.read()
        if not found:
            if stream:
                raise DataError(
                    f"The {'camera' if file.isdecimal() else 'stream'} {self.name} does not answer: check that it is there, and "
                    "that no other program uses it."
                )
            raise DataError(f"{file} cannot be read as a video by OpenCV.")
        self._first = first
        # Frames need not be evenly spaced; pictures that come one by one over HTTP do not say when they were taken.
        untimed = self.live and int(self._capture.get(cv2.CAP_PROP_FOURCC)) == cv2.VideoWriter.fourcc(*"MJPG")
        self._clock = time.monotonic if untimed else lambda: self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        self._start = self._clock()

    def __iter__(self) -> Iterator[Frame]:
        for frame, seconds in chain([(self._first, 0.0)], self._newest() if self.live else iter(self._read, None)):
            if self.seconds and not seconds > self.seconds[-1]:  # some files have no time stamps
                seconds = self.seconds[-1] + 1 / self.rate
            self.seconds.append(max(0.0, seconds))
            yield np.asarray(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), np.uint8)
        self._capture.release()

    def _read(self) -> tuple[Any, float] | None:
        """The next frame and its time in seconds; None at the end."""
        found, frame = self._capture.read()
        return (frame, self._clock() - self._start) if found else None

    def _newest(self) -> Iterator[tuple[Any, float]]:
        """The same, but each time the newest frame: a thread reads on, so that a slow consumer does not fall behind."""
        arrived, newest, over = Condition(), deque[tuple[Any, float]](maxlen=1), Event()

        def read() -> None:
            while not over.is_set():
                frame = self._read()
                with arrived:
                    if frame is None:
                        over.set()
                    else:
                        self.dropped += len(newest)
                        newest.append(frame)
                    arrived.notify()

        reader = Thread(target=read, daemon=True)
        reader.start()
        try:
            while True:
                with arrived:
                    arrived.wait_for(lambda: newest or over.is_set())
                    if not newest:
                        return
                    frame = newest.popleft()
                yield frame
        finally:
            over.set()
            reader.join(PATIENCE / 1000)

    @property
    def cut_off(self) -> str:
        """After reading: describes how much of the file exists if it ends before its header says; otherwise empty."""
        whole, last = self.length / self.rate, self.seconds[-1] if self.seconds else 0.0
        if len(self.seconds) >= self.length - 1 or last + 2 / self.rate >= 0.95 * whole:
            return ""  # frames are counted by the rate where they are not evenly spaced
        return f"{self.file} ends after {len(self.seconds)} of {self.length} frames ({last:.1f} of {whole:.1f} s): it is truncated."


def evenly(count: int, most: int) -> NDArray[np.int64]:
    """Indices of evenly spaced frames: the middle of each of ``most`` equal parts, or all frames if there are fewer.

    >>> evenly(3, 8).tolist(), evenly(10, 4).tolist(), evenly(10, 1).tolist()
    ([0, 1, 2], [1, 3, 6, 8], [5])

    Returns:
        int64, ascending.
    """
    shown = min(count, most)
    return ((np.arange(shown) + 0.5) * count / shown).astype(np.int64)


def read_clip(file: str, most: int, channels: int = 3, reduction: Reduction | None = None) -> NDArray[np.uint8]:
    """Reads a video as a clip.

    Args:
        file: the video.
        most: see `evenly`.
        channels: 3 for RGB, 1 for grey, the ITU-R 601-2 luma.
        reduction: returns the factor by which frames may be reduced; None for no reduction.

    Returns:
        uint8 T×H×W×channels.

    Raises:
        DataError: it cannot be read; the message names it.
    """
    video = Video(file)
    chosen = evenly(video.length or sum(1 for _ in Video(file)), most)  # some files do not state their length
    shown, clip = set(chosen.tolist()), list[Any]()
    for number, frame in enumerate(video):
        if number in shown:
            height, width = frame.shape[:2]
            factor = 1 if reduction is None else reduction(height, width)
            size = -(-width // factor), -(-height // factor)
            small = frame if factor == 1 else cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
            clip.append(small if channels == 3 else cv2.cvtColor(small, cv2.COLOR_RGB2GRAY)[..., None])
            if len(clip) == len(chosen):
                break
    if not clip:
        raise DataError(f"{file} says that it has {video.length} frames, but there is none in its middle.")
    return np.stack(clip)


def inspect_video(path: str | Member) -> tuple[str, str, int, int, int, int]:
    """As `inspect_images` for a video: content digest, error, height, width, bits, and number of frames."""
    try:
        with Path(path).open("rb") as file:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        return "", error.strerror or str(error), 0, 0, 0, 0
    try:
        video, shape = Video(os.fspath(path)), (0, 0)
        for frame in video:
            shape = frame.shape[:2]
    except DataError:
        return digest, "no frame can be read by OpenCV", 0, 0, 0, 0
    return digest, video.cut_off.removeprefix(f"{path} ").rstrip("."), *shape, 8, len(video.seconds)


class VideoFiles(ImageFiles):
    """Video files as an array of clips, read on demand; see `ImageFiles`.

    Args:
        files: paths, digests, sizes and reading, see `ImageFiles`; decoded videos are not cached.
        most: maximum number of frames of a clip, see `evenly`.
    """

    def __init__(self, *files: Any, most: int) -> None:
        super().__init__(*files)
        self.most = most

    @override
    def read(self, index: int) -> NDArray[np.uint8]:
        return read_clip(self.paths[index], self.most, self.reading.channels, self._reduction)
