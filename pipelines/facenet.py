"""Train and use embeddings of faces.

``python -m pipelines.facenet fit|validate|test|predict|preview`` trains and measures;
``python -m pipelines.facenet enrol|identify|verify|cluster`` uses a registered model;
``python -m pipelines.facenet align`` cuts faces out of photographs for both.
"""

import sys
from collections.abc import Sequence

from modules import FaceNetModule
from pipelines import recognition
from pipelines.cli import VisionCLI, main
from pipelines.console import print_table


def facenet(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of FaceNet's training; see `pipelines.cli.main`."""
    return main("facenet", FaceNetModule, "datamodules.ORL", args)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in recognition.COMMANDS:
        recognition.main(sys.argv[1:])
    else:
        print_table("facenet", facenet().rows)
