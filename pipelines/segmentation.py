"""Train and use semantic segmentation: ``python -m pipelines.segmentation fit|validate|test|predict``."""

from collections.abc import Sequence

from modules import SegmentationModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def segmentation(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of segmentation; see `pipelines.engine.cli.main`."""
    return main("segmentation", SegmentationModule, "datamodules.DigitMasks", args)


if __name__ == "__main__":
    print_table("segmentation", segmentation().rows)
