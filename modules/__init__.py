"""What learns: one module for each task."""

from modules.backbones import BackboneError, create_backbone
from modules.base import Optimization, VisionModule, WarmupCosine
from modules.classification import ClassificationModule
from modules.detection import DetectionModule

__all__ = [
    "BackboneError",
    "ClassificationModule",
    "DetectionModule",
    "Optimization",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
