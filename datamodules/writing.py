"""Writing data sets to folders that are complete or absent."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from datamodules.errors import DataError


@contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yields the path of a new folder to write to, which is renamed to its final name once complete, and removed on errors.

    Raises:
        DataError: the folder exists.
    """
    if Path(folder).exists():
        raise DataError(f"{Path(folder).resolve()} already exists: name a new folder.")
    place = Path(folder).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{place.name}-", dir=place.parent) as part:
        made = Path(part, place.name)
        yield made
        try:
            made.rename(place)
        except OSError:
            if place.exists():  # another command wrote it meanwhile
                raise DataError(f"{place} already exists: name a new folder.") from None
            raise
