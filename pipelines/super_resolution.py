"""Train and use super-resolution, SRResNet and SRGAN: ``python -m pipelines.super_resolution fit|validate|test|predict``."""

from collections.abc import Sequence

from modules import SuperResolutionModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def super_resolution(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of super-resolution; see `pipelines.engine.cli.main`."""
    return main("super_resolution", SuperResolutionModule, "datamodules.Photographs", args)


if __name__ == "__main__":
    print_table("super-resolution", super_resolution().rows)
