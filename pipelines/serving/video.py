"""Videos for `pipelines.predict`: prediction, drawing and object tracking frame by frame."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext, suppress
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import av
import numpy as np

from datamodules import DataError
from datamodules.videos import Frame, Video
from modules import DetectionModule, VisionModule
from modules.answers import Answer
from modules.detection.tiles import PER_OBJECT

if TYPE_CHECKING:
    from pipelines.serving.model import VisionModel

SAME_PLACE = 0.7  # overlap (IoU) from which boxes of different labels are of one object
TICKS = 12_800  # of a second, in which times of drawn frames are told
READABLE = {"movflags": "hybrid_fragmented+frag_keyframe+delay_moov"}  # up to the last key frame, even after a kill
BATCH = 16  # frames that are held together: a film's are large


class Drawing:
    """Writer for a video of drawings, all the size of the first; finished when its context ends, for whatever reason.

    Args:
        file: where; H.264 in an ``.mp4`` file, which browsers play, or MPEG-4 where PyAV was built without it.
        rate: frames a second, where they are evenly spaced.
    """

    def __init__(self, file: str, rate: float) -> None:
        self.file, self.rate = file, rate
        self._file: Any = None
        self._stream: Any = None
        self._last = -1  # time of the last frame, in ticks

    def write(self, drawing: Frame, seconds: float) -> None:
        """Adds a frame.

        Args:
            drawing: uint8 H×W×3.
            seconds: when it is to be seen, after the frame before.

        Raises:
            DataError: the file cannot be written.
        """
        try:
            if self._file is None:
                os.makedirs(os.path.dirname(self.file) or ".", exist_ok=True)
                self._file = av.open(self.file, "w", options=READABLE)
                codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
                rate = Fraction(self.rate).limit_denominator(1001)
                self._stream = self._file.add_stream(codec, rate=rate, pix_fmt="yuv420p")
                self._stream.width, self._stream.height = (side // 2 * 2 or 2 for side in drawing.shape[1::-1])  # even
                self._stream.codec_context.time_base = Fraction(1, TICKS)
            canvas = np.full((self._stream.height, self._stream.width, 3), 255, np.uint8)
            part = drawing[: canvas.shape[0], : canvas.shape[1]]
            canvas[: part.shape[0], : part.shape[1]] = part
            frame = av.VideoFrame.from_ndarray(canvas, format="rgb24")
            self._last = max(self._last + 1, round(seconds * TICKS))
            frame.pts, frame.time_base = self._last, Fraction(1, TICKS)
            self._file.mux(self._stream.encode(frame))
        except (OSError, ValueError) as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Finishes the file.

        Raises:
            DataError: it cannot be written.
        """
        file, self._file = self._file, None
        if file is not None:
            try:
                with file:
                    file.mux(self._stream.encode(None))
            except (OSError, ValueError) as error:
                raise self._unwritable(error) from None

    def __enter__(self) -> "Drawing":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(DataError) if kind else nullcontext():
            self.close()

    def _unwritable(self, error: Exception) -> DataError:
        return DataError(f"{self.file} cannot be written as a video: {error}")


class Tracker:
    """Multi-object tracking: the same object keeps its number from frame to frame (ByteTrack, Zhang et al. 2022,
    arXiv:2110.06864).

    Detections that are too uncertain to be told still carry on a track that is there; so the module is asked for those
    down to a third of its threshold.

    Args:
        module: a detector.
        rate: frames a second.

    Raises:
        ValueError: the module finds no boxes.
    """

    def __init__(self, module: VisionModule, rate: float) -> None:
        from trackers import ByteTrackTracker  # it imports slowly

        if not isinstance(module, DetectionModule):
            raise ValueError(f"--track follows boxes, which a {type(module).__name__} does not find.")
        self.threshold: Any = module.threshold
        self.sure = float(module.threshold)
        self._tracker = ByteTrackTracker(
            frame_rate=rate,
            track_activation_threshold=self.sure,
            high_conf_det_threshold=self.sure,
            minimum_consecutive_frames=2,
        )

    def __enter__(self) -> "Tracker":
        self.threshold.fill_(self.sure / 3)
        return self

    def __exit__(self, *_: object) -> None:
        self.threshold.fill_(self.sure)

    def follow(self, answer: Answer) -> Answer:
        """The prediction with ``ids``: a number for each object, or None if it is not tracked yet.

        Where several labels are found at one place, there is one object: that of the most certain.
        """
        import supervision as sv

        count = len(answer["boxes"])
        given = sv.Detections(
            np.asarray(answer["boxes"], np.float32).reshape(-1, 4),
            confidence=np.asarray(answer["scores"], np.float32),
            class_id=np.zeros(count, int),
            data={"place": np.arange(count)},
        ).with_nms(SAME_PLACE, class_agnostic=True)
        found = self._tracker.update(given)
        numbers = dict.fromkeys(range(count), -1)
        if len(found):
            ids: Any = found.tracker_id
            numbers |= dict(zip(map(int, found.data["place"]), map(int, ids), strict=True))
        places = sorted(map(int, given.data["place"])) if count else []
        told = [k for k in places if numbers[k] >= 0 or answer["scores"][k] >= self.sure]
        lists = {key: [answer[key][k] for k in told] for key in PER_OBJECT if key in answer}
        return answer | lists | {"ids": [numbers[k] if numbers[k] >= 0 else None for k in told]}


def answered(
    model: "VisionModel", video: Video, batch_size: int, tracker: Tracker | None
) -> Iterator[tuple[Frame, Answer]]:
    """Yields each frame with its prediction.

    Args:
        model: the registered model.
        video: the frames.
        batch_size: frames that go through the network together, at most `BATCH`.
        tracker: follows objects, or None.
    """
    held: deque[Frame] = deque()

    def noted(frames: Iterable[Frame]) -> Iterator[Frame]:
        for frame in frames:
            held.append(frame)
            yield frame

    for answer in model.stream(noted(video), 1 if video.live else min(batch_size, BATCH)):
        frame = held.popleft()
        if isinstance(answer, ValueError):
            raise answer
        yield frame, tracker.follow(answer) if tracker else answer
