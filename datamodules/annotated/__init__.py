"""Images with boxes, masks or a class for each pixel: composed scenes, and the formats in which people keep theirs."""

from datamodules.annotated.boxes import BoxFiles, BoxSource
from datamodules.annotated.class_maps import COCOSegmentation, MaskFolder, VOCSegmentation
from datamodules.annotated.detection import DetectionDataModule, DetectionDataset
from datamodules.annotated.mixing import Mixing
from datamodules.annotated.readers.coco import COCODetection
from datamodules.annotated.readers.table import CSVDetection
from datamodules.annotated.readers.voc import VOCDetection
from datamodules.annotated.readers.yolo import YOLODetection
from datamodules.annotated.scenes import DigitMasks, DigitScenes, SceneSource, Sprites
from datamodules.annotated.segmentation import SegmentationDataModule

__all__ = [
    "BoxFiles",
    "BoxSource",
    "COCODetection",
    "COCOSegmentation",
    "CSVDetection",
    "DetectionDataModule",
    "DetectionDataset",
    "DigitMasks",
    "DigitScenes",
    "MaskFolder",
    "Mixing",
    "SceneSource",
    "SegmentationDataModule",
    "Sprites",
    "VOCDetection",
    "VOCSegmentation",
    "YOLODetection",
]
