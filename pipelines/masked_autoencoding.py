"""Train masked autoencoders: ``python -m pipelines.masked_autoencoding fit|validate|test|predict|preview``."""

from collections.abc import Sequence

from modules import MaskedAutoencodingModule
from pipelines.engine.cli import VisionCLI, main
from pipelines.engine.terminal import print_table


def masked_autoencoding(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of masked autoencoding; see `pipelines.engine.cli.main`."""
    return main("masked_autoencoding", MaskedAutoencodingModule, "datamodules.Digits", args)


if __name__ == "__main__":
    print_table("masked autoencoding", masked_autoencoding().rows)
