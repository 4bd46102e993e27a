"""Train and use instance segmentation: ``python -m pipelines.instance_segmentation fit|validate|test|predict``."""

from collections.abc import Sequence

from modules import InstanceSegmentationModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def instance_segmentation(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of instance segmentation; see `pipelines.engine.cli.main`. Data must have masks: --data.masks true."""
    return main("instance_segmentation", InstanceSegmentationModule, "datamodules.DigitScenes", args)


if __name__ == "__main__":
    print_table("instance_segmentation", instance_segmentation().rows)
