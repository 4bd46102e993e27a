"""Train and use classifiers of clips and series: ``python -m pipelines.sequences fit|validate|test|predict|preview|extend``."""

from modules.ranges import PositiveInt
from pipelines.engine.task import Task


def extend(model: str, numbers: list[int], count: PositiveInt = 1, device: str = "auto") -> str:
    """Continues a series of numbers by what a registered model says comes next.

    Args:
        model: ``models:/name@alias`` or ``models:/name/version``, trained on `Series`.
        numbers: the series so far.
        count: number of numbers to add.
        device: where the model runs, such as ``cuda``; ``auto`` is the GPU if there is one.

    Returns:
        The series, with the probability of each number.

    Raises:
        ValueError: there is no such model, it is for another task, or a number is not from 0 to 255.
    """
    import numpy as np

    from modules import SequenceModule
    from pipelines.serving import registry

    answering, module = registry.load_as(SequenceModule, model, ", which continues no series.", device)
    if module.image_size != 1:
        raise ValueError(f"{model} has learned from clips of pictures: ask python -m pipelines.predict about a video.")
    if not numbers or not all(0 <= number < 256 for number in numbers):
        raise ValueError(f"A series is numbers from 0 to 255, not {' '.join(map(str, numbers)) or 'nothing'}.")
    series, said = list(numbers), list[str]()
    for _ in range(count):
        (answer,) = answering.stream([np.array(series, np.uint8).reshape(-1, 1, 1, 1)])
        assert isinstance(answer, dict)  # an array can be read
        series.append(int(answer["label"]))
        said.append(f"{answer['label']} ({answer['probability']:.3f})")
    return f"{' '.join(map(str, numbers))} → {' '.join(said)}"


sequences = Task("sequences", "modules.SequenceModule", "datamodules.MovingDigits", ("pipelines.sequences.extend",))

if __name__ == "__main__":
    sequences.main()
