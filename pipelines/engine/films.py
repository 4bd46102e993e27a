"""Films of a training: each series of its pictures as a GIF."""

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from pipelines.engine.disk import whole
from pipelines.engine.terminal import say
from pipelines.tracking.logger import RunLogger


def make_films(output: Path, series: Iterable[str], logger: RunLogger) -> None:
    """Makes a GIF of each series of pictures, in the run's folder ``films``.

    Args:
        output: folder of the training.
        series: keys of pictures.
        logger: of the run.
    """
    for key in series:
        name = key.replace("/", "_")
        files = sorted((output / "pictures").glob(f"{name}-*.png"), key=lambda f: int(f.stem.rsplit("-", 1)[1]))
        frames = []
        for picture in files:
            with suppress(OSError, SyntaxError), Image.open(picture) as frame:  # one that is torn is left out
                frame.load()
                frames.append(frame)
        if len(frames) > 1:
            file = output / f"{name}.gif"
            try:
                with whole(file) as part:
                    frames[0].save(part, save_all=True, append_images=frames[1:], duration=300, loop=0)
            except OSError as error:  # it is only for looking at
                say(f"There is no film of {key}: {error}")
            else:
                logger.log_file(file, "films")
