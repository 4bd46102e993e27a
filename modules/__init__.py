"""What learns: one module for each task."""

from modules.backbones import BackboneError, create_backbone
from modules.base import Optimization, VisionModule, WarmupCosine
from modules.classification import ClassificationModule

__all__ = [
    "BackboneError",
    "ClassificationModule",
    "Optimization",
    "VisionModule",
    "WarmupCosine",
    "create_backbone",
]
