"""Images with one label each, of a class or a person: sets that others have made, folders, tables of paths."""

from datamodules.labelled.base import ClassificationDataModule, LabelledDataModule
from datamodules.labelled.files import (
    CelebA,
    ImageFolder,
    Manifest,
    PeopleFolder,
    PeopleTable,
    UnlabelledFolder,
    read_pairs,
)
from datamodules.labelled.people import FaceDataModule, PeopleDataset
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
)
from datamodules.labelled.sources import JoinedSource, LabelledSource, PeopleSource, few

__all__ = [
    "CIFAR10",
    "CIFAR100",
    "EMNIST",
    "MNIST",
    "ORL",
    "CelebA",
    "ClassificationDataModule",
    "Digits",
    "Digits8x8",
    "FaceDataModule",
    "FashionMNIST",
    "Glyphs",
    "ImageFolder",
    "JoinedSource",
    "LabelledDataModule",
    "LabelledSource",
    "Manifest",
    "PeopleDataset",
    "PeopleFolder",
    "PeopleSource",
    "PeopleTable",
    "UnlabelledFolder",
    "few",
    "read_pairs",
]
