"""What learns: one module for each task."""

from modules.backbones import BackboneError, create_backbone
from modules.base import Optimization, VisionModule, WarmupCosine
from modules.classification import ClassificationModule
from modules.detection import DetectionModule
from modules.segmentation import InstanceSegmentationModule, SegmentationModule

__all__ = [
    "BackboneError",
    "ClassificationModule",
    "DetectionModule",
    "InstanceSegmentationModule",
    "Optimization",
    "SegmentationModule",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
