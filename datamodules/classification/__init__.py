"""Images with one label each: sets that others have made, folders, tables of paths."""

from datamodules.classification.base import ArraySource, ClassificationDataModule, FileSource, JoinedSource, few
from datamodules.classification.files import ImageFolder, Manifest, UnlabelledFolder
from datamodules.classification.published import CIFAR10, CIFAR100, EMNIST, MNIST, Digits, Digits8x8, FashionMNIST

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMNIST",
    "MNIST",
    "ArraySource",
    "ClassificationDataModule",
    "Digits",
    "Digits8x8",
    "FashionMNIST",
    "FileSource",
    "ImageFolder",
    "JoinedSource",
    "Manifest",
    "UnlabelledFolder",
    "few",
]
