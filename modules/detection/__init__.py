"""Object detection: the module and its detectors."""

from modules.detection.detector import Detector
from modules.detection.module import DetectionModule
from modules.detection.torchvision import FCOS, FasterRCNN, RetinaNet
from modules.detection.transformer import RTDETR
from modules.detection.yolo import YOLO

__all__ = ["FCOS", "RTDETR", "YOLO", "DetectionModule", "Detector", "FasterRCNN", "RetinaNet"]
