"""What a network learns from: one class for each format of data."""

import os

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

from datamodules.annotated import (
    COCODetection,
    COCOSegmentation,
    CSVDetection,
    DetectionDataModule,
    DigitMasks,
    DigitScenes,
    MaskFolder,
    SegmentationDataModule,
    VOCDetection,
    VOCSegmentation,
    YOLODetection,
)
from datamodules.base import DataError, VisionDataModule
from datamodules.domains import DigitAttributes, DigitTextures, DomainFolder
from datamodules.labelled import (
    CIFAR10,
    CIFAR100,
    EMNIST,
    MNIST,
    ORL,
    CelebA,
    ClassificationDataModule,
    Digits,
    Digits8x8,
    FaceDataModule,
    FashionMNIST,
    Glyphs,
    ImageFolder,
    Manifest,
    PeopleFolder,
    PeopleTable,
    UnlabelledFolder,
)
from datamodules.photographs import PhotographFolder, Photographs
from datamodules.points import PointCloud

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
    "DataError",
    "DetectionDataModule",
    "DigitAttributes",
    "DigitMasks",
    "DigitScenes",
    "DigitTextures",
    "Digits",
    "Digits8x8",
    "DomainFolder",
    "FaceDataModule",
    "FashionMNIST",
    "Glyphs",
    "ImageFolder",
    "Manifest",
    "MaskFolder",
    "PeopleFolder",
    "PeopleTable",
    "PhotographFolder",
    "Photographs",
    "PointCloud",
    "SegmentationDataModule",
    "UnlabelledFolder",
    "VOCDetection",
    "VOCSegmentation",
    "VisionDataModule",
    "YOLODetection",
]
