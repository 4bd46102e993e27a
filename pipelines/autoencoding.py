"""Train and use autoencoders: ``python -m pipelines.autoencoding fit|validate|test|predict|preview``."""

from collections.abc import Sequence

from modules import AutoencodingModule
from pipelines.cli import VisionCLI, main, print_table


def autoencoding(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of autoencoding; see `pipelines.cli.main`."""
    return main("autoencoding", AutoencodingModule, "datamodules.Digits", args)


if __name__ == "__main__":
    print_table("autoencoding", autoencoding().rows)
