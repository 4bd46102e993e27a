"""A logger that tests read."""

from collections import defaultdict

from lightning.pytorch.loggers.logger import Logger


class Steps(Logger):
    """Keeps metrics in memory, with their steps."""

    name, version = "steps", 0

    def __init__(self) -> None:
        self.series: dict[str, list[tuple[int | None, float]]] = defaultdict(list)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.series[key].append((step, value))

    def log_hyperparams(self, params: object) -> None: ...
