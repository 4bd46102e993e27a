"""GIFs of a training: one for each series of pictures."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from pipelines.tracking.logger import RunLogger


def make_films(output: Path, series: Iterable[str], logger: "RunLogger") -> None:
    """Writes a GIF of each series of pictures to the run's folder ``films``."""
    for key in series:
        name = key.replace("/", "_")
        files = sorted((output / "pictures").glob(f"{name}-*.png"), key=lambda f: int(f.stem.rsplit("-", 1)[1]))
        frames = []
        for picture in files:
            with suppress(OSError, SyntaxError), Image.open(picture) as frame:  # one that is torn is left out
                frames.append(np.asarray(frame))
        if len(frames) > 1:
            logger.log_film(key, frames, 300)
