"""Exportable multi-task networks: the outputs of each task from one backbone pass."""

from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from modules import MultiTaskModule
from modules.detection.detector import OneStageDetector
from modules.multi_task import kind_of
from pipelines.serving.exports.base import Exported, copied
from pipelines.serving.exports.boxes import ExportedDetector
from pipelines.serving.exports.embeddings import ExportedAutoencoder
from pipelines.serving.exports.labels import ExportedClassifier, ExportedSegmenter

PARTS: dict[str, type[Exported]] = {
    "classification": ExportedClassifier,
    "segmentation": ExportedSegmenter,
    "detection": ExportedDetector,
    "reconstruction": ExportedAutoencoder,
}


class ExportedMultiTask(Exported[MultiTaskModule]):
    """Outputs of all tasks, each prefixed with the task's name; for detection, the boxes of all places."""

    @override
    def take(self, module: MultiTaskModule) -> None:
        detection: Any = module.detection if "detection" in module.tasks else None
        if detection is not None and not isinstance(detection.detector, OneStageDetector):
            raise ValueError("beside other tasks, only a one-stage detector is exported")
        if self.fitting is not None:
            raise ValueError("pictures are not fitted in the file of several tasks: leave --with_preprocessing out")
        self.backbone = copied(module.backbone)
        self.parts = nn.ModuleDict(
            {name: PARTS[kind_of(name)](task, self.picture, self.pixels) for name, task in module.tasks.items()}
        )
        self.outputs = tuple(
            f"{name.replace('/', '_')}_{output}" for name, part in self._parts() for output in part.outputs
        )
        self.meaning = "; ".join(f"{name}: {part.meaning}" for name, part in self._parts())
        if detection is not None:
            self.meaning += f"; a box counts from a score of {float(detection.threshold):.3f} on"

    def _parts(self) -> list[tuple[str, Any]]:
        return list(self.parts.items())

    @override
    def expected(self, module: MultiTaskModule, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(told for name, part in self._parts() for told in part.expected(module.tasks[name], image))

    @override
    def answer(self, image: Tensor) -> tuple[Tensor, ...]:
        maps = self.backbone(image)
        return tuple(told for _, part in self._parts() for told in part.answer(maps))
