"""Images with boxes: composed scenes, and the formats in which people keep theirs."""

from datamodules.detection.base import DetectionDataModule, DetectionDataset, Mixing
from datamodules.detection.files import BoxFiles, COCODetection, CSVDetection, VOCDetection, YOLODetection
from datamodules.detection.scenes import DigitScenes, SceneSource, Sprites

__all__ = [
    "BoxFiles",
    "COCODetection",
    "CSVDetection",
    "DetectionDataModule",
    "DetectionDataset",
    "DigitScenes",
    "Mixing",
    "SceneSource",
    "Sprites",
    "VOCDetection",
    "YOLODetection",
]
