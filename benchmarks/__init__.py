"""Measurements, which are no tests: speed as a ratio against a peer in the same run, and quality on real data."""

import os
import platform
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.engine.command import orderly

Seconds = NDArray[np.float64]  # that passed, and those of the processor, of all threads
COUNTS = (
    0 if torch.cuda.is_available() else 1
)  # which of them: the processor's are disturbed less by other work on the machine


@dataclass
class Row:
    """How fast something is done here, and by a peer in the same run.

    Args:
        what: that is done.
        images: that each round works on.
        ours: seconds of each round.
        peer: what does the same, with its version.
        theirs: its seconds, of rounds in turn with ours.
        wanted: which ratio.
        note: what else was seen.
    """

    what: str
    images: int
    ours: list[Seconds]
    peer: str = ""
    theirs: list[Seconds] = field(default_factory=list)
    wanted: str = ""
    note: str = ""

    @property
    def cells(self) -> list[str]:
        """The row of `table`."""
        speeds = [np.array([self.images / s for s in side]) for side in (self.ours, self.theirs) if side]
        told = [f"{one:,.0f}" if one >= 100 else f"{one:.3g}" for one in (np.median(s, 0)[COUNTS] for s in speeds)]
        if len(speeds) < 2:
            return [self.what, self.peer, *told, "", "", "", "", self.wanted, self.note]
        ratios = speeds[0] / speeds[1]
        ratio, other = np.median(ratios, 0)[[COUNTS, 1 - COUNTS]]
        spread = f"{ratios[:, COUNTS].min():.2f} … {ratios[:, COUNTS].max():.2f}"
        return [self.what, self.peer, *told, f"**{ratio:.2f}**", spread, f"{other:.2f}", self.wanted, self.note]


def table(rows: Iterable[Row]) -> str:
    """Markdown: images a second of the clock that `COUNTS`, and the ratios to those of the peers, above 1 where Fovea is the
    faster; of everything the median over the rounds."""
    clocks = ("time that passed", "processor time")
    columns = [
        "",
        "against",
        "Fovea",
        "peer",
        f"ratio of images/s, by {clocks[COUNTS]}",
        "rounds",
        f"by {clocks[1 - COUNTS]}",
    ]
    lines = [[*columns, "wanted", "note"], *(row.cells for row in rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def machine() -> str:
    """What a measurement was made with, and when."""
    device = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return (
        f"{datetime.now(UTC):%d %B %Y}: {device}{os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


def now() -> Seconds:
    """The clocks, once the device is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return np.array([time.perf_counter(), time.process_time()])


@contextmanager
def workshop() -> Iterator[Path]:
    """A temporary folder, which is the current one meanwhile, with an MLflow store and a cache of its own."""
    before = dict(os.environ)
    with (
        orderly(),
        tempfile.TemporaryDirectory() as folder,
        chdir(folder),
    ):  # SIGTERM, too, ends servers and removes files
        os.environ |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db", "XDG_CACHE_HOME": folder}
        try:
            yield Path(folder)
        finally:
            os.environ.clear()
            os.environ.update(before)
