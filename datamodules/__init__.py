"""Data sets: one data module for each format."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

from datamodules.annotated.class_maps import COCOSegmentation, MaskFolder, VOCSegmentation
from datamodules.annotated.detection import DetectionDataModule
from datamodules.annotated.readers.coco import COCODetection
from datamodules.annotated.readers.table import CSVDetection
from datamodules.annotated.readers.voc import VOCDetection
from datamodules.annotated.readers.yolo import YOLODetection
from datamodules.annotated.scenes import DigitMasks, DigitScenes, DigitSets, DigitSums, DigitTasks
from datamodules.annotated.segmentation import SegmentationDataModule
from datamodules.base import DataError, VisionDataModule
from datamodules.clips import ClipDataModule, MovingDigits, VideoFolder
from datamodules.domains import DigitAttributes, DigitTextures, DomainFolder
from datamodules.games import Gymnasium
from datamodules.labelled.base import ClassificationDataModule, MultiLabelDataModule
from datamodules.labelled.files import ImageFolder, Manifest, UnlabelledFolder
from datamodules.labelled.label_sets import MultiLabelTable
from datamodules.labelled.people import FaceDataModule
from datamodules.labelled.people_files import CelebA, PeopleFolder, PeopleTable
from datamodules.labelled.published import (
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
from datamodules.labelled.quantities import RegressionDataModule, RegressionTable
from datamodules.photographs import PhotographFolder, Photographs
from datamodules.points import PointCloud
from datamodules.series import Series

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
    "UnlabelledFolder",
    "VOCDetection",
    "VOCSegmentation",
    "VideoFolder",
    "VisionDataModule",
    "YOLODetection",
]
