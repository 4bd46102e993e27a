"""Train and use embeddings of faces.

``python -m pipelines.facenet fit|validate|test|predict|preview`` trains and measures;
``python -m pipelines.facenet enrol|identify|verify|cluster`` uses a registered model;
``python -m pipelines.facenet align`` cuts faces out of photographs for both.
"""

from collections.abc import Sequence
from functools import partial

from modules import FaceNetModule
from pipelines import faces as recognition
from pipelines.engine.cli import VisionCLI, main, task_command


def facenet(args: Sequence[str] | None = None) -> VisionCLI:
    """Runs the command line of FaceNet's training; see `pipelines.engine.cli.main`."""
    return main("facenet", FaceNetModule, "datamodules.ORL", args)


command = partial(task_command, facenet, recognition.COMMANDS)


if __name__ == "__main__":
    command()
