from .annotated.class_maps import COCOSegmentation, MaskFolder, VOCSegmentation
from .annotated.detection import DetectionDataModule
from .annotated.readers.coco import COCODetection
from .annotated.readers.table import CSVDetection
from .annotated.readers.voc import VOCDetection
from .annotated.readers.yolo import YOLODetection
from .annotated.scenes import DigitMasks, DigitScenes, DigitSets, DigitSums, DigitTasks
from .annotated.segmentation import SegmentationDataModule
from .base import VisionDataModule
from .clips import ClipDataModule, MovingDigits, VideoFolder
from .domains import DigitAttributes, DigitTextures, DomainFolder
from .errors import DataError
from .games import Gymnasium
from .labelled.base import ClassificationDataModule, MultiLabelDataModule
from .labelled.folders import ImageFolder, UnlabelledFolder
from .labelled.label_columns import LabelColumns
from .labelled.label_sets import MultiLabelTable
from .labelled.manifest import Manifest
from .labelled.people import FaceDataModule
from .labelled.people_files import CelebA, PeopleFolder, PeopleTable
from .labelled.published import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    MNIST,
    ORL,
    Digits,
    Digits8x8,
    FashionMNIST,
    Glyphs,
    HeldOutClasses,
)
from .labelled.quantities import RegressionDataModule, RegressionTable
from .labelled.shards import Shards, UnlabelledShards
from .photographs import PhotographFolder, Photographs
from .points import PointCloud
from .series import Series

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMNIST",
    "MNIST",
    "ORL",
    "COCODetection",
    "COCOSegmentation",
    "CSVDetection",
    "CelebA",
    "ClassificationDataModule",
    "ClipDataModule",
    "DataError",
    "DetectionDataModule",
    "DigitAttributes",
    "DigitMasks",
    "DigitScenes",
    "DigitSets",
    "DigitSums",
    "DigitTasks",
    "DigitTextures",
    "Digits",
    "Digits8x8",
    "DomainFolder",
    "FaceDataModule",
    "FashionMNIST",
    "Glyphs",
    "Gymnasium",
    "HeldOutClasses",
    "ImageFolder",
    "LabelColumns",
    "Manifest",
    "MaskFolder",
    "MovingDigits",
    "MultiLabelDataModule",
    "MultiLabelTable",
    "PeopleFolder",
    "PeopleTable",
    "PhotographFolder",
    "Photographs",
    "PointCloud",
    "RegressionDataModule",
    "RegressionTable",
    "SegmentationDataModule",
    "Series",
    "Shards",
    "UnlabelledFolder",
    "UnlabelledShards",
    "VOCDetection",
    "VOCSegmentation",
    "VideoFolder",
    "VisionDataModule",
    "YOLODetection",
]
