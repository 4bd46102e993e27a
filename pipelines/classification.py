"""Train and use classifiers: ``python -m pipelines.classification fit|validate|test|predict``."""

from collections.abc import Sequence

from modules import ClassificationModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def classification(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of classification; see `pipelines.engine.cli.main`."""
    return main("classification", ClassificationModule, "datamodules.Digits", args)


if __name__ == "__main__":
    print_table("classification", classification().rows)
