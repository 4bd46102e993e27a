"""Train and use embeddings of faces: ``python -m pipelines.facenet fit|validate|test|predict|…``."""

from collections.abc import Sequence

from modules import FaceNetModule
from pipelines.cli import VisionCLI, main, print_table


def facenet(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of FaceNet; see `pipelines.cli.main`."""
    return main("facenet", FaceNetModule, "datamodules.ORL", args)


if __name__ == "__main__":
    print_table("facenet", facenet().rows)
