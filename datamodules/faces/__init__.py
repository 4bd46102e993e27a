"""Pictures of people: folders, CelebA, tables, the pairs of a verification protocol, and two sets that come with packages."""

from datamodules.faces.base import FaceDataModule, FaceSource, PeopleDataset
from datamodules.faces.files import CelebA, PeopleFolder, PeopleTable, read_pairs
from datamodules.faces.packaged import ORL, Glyphs

__all__ = [
    "ORL",
    "CelebA",
    "FaceDataModule",
    "FaceSource",
    "Glyphs",
    "PeopleDataset",
    "PeopleFolder",
    "PeopleTable",
    "read_pairs",
]
