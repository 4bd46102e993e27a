"""Train and use detectors: ``python -m pipelines.detection fit|validate|test|predict``."""

from collections.abc import Sequence

from modules import DetectionModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def detection(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of detection; see `pipelines.engine.cli.main`."""
    return main("detection", DetectionModule, "datamodules.DigitScenes", args)


if __name__ == "__main__":
    print_table("detection", detection().rows)
