"""What learns: one module for each task."""

from modules.backbones import BackboneError, create_backbone
from modules.base import Optimization, VisionModule, WarmupCosine
from modules.classification import ClassificationModule
from modules.detection import DetectionModule
from modules.facenet import FaceNetModule

__all__ = [
    "BackboneError",
    "ClassificationModule",
    "DetectionModule",
    "FaceNetModule",
    "Optimization",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
