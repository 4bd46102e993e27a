"""Data sets: one data module for each format; the names of `__init__.pyi`, each imported when it is first used."""

import os

import lazy_loader

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import would ask the network for a newer version

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
