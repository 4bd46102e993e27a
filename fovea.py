"""Fovea from Python: what ``python -m pipelines.TASK fit`` and ``python -m pipelines.predict`` do, for scripts and notebooks.

```python
import fovea

training = fovea.train("classification", data="ImageFolder", root="FOLDER", backbone="resnet18", max_epochs=10)
training.metrics["test/accuracy"]
training.model.predict(["PICTURE.jpg"])
training.register("mine")  # 'models:/mine/1'
fovea.load("models:/mine/1").predict(["PICTURE.jpg"])
```
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import PIL.Image

if TYPE_CHECKING:
    import lightning as L

    from modules import VisionModule
    from pipelines.serving.model import VisionModel


__all__ = ["Model", "Training", "load", "train"]

Picture = str | os.PathLike[str] | bytes | PIL.Image.Image | Any  # the last: a uint8 array H×W or H×W×C


@dataclass(frozen=True)
class Model:
    """A trained model that answers about pictures.

    Args:
        answering: reads and prepares the pictures, and asks the module.
    """

    answering: "VisionModel"

    @property
    def module(self) -> "VisionModule":
        """The network, a Lightning module in evaluation mode."""
        return self.answering.module

    def predict(self, pictures: Iterable[Picture], batch_size: int = 64) -> list[dict[str, Any]]:
        """Answers, one for each picture; what is in them depends on the task, see the module's ``predict``.

        Args:
            pictures: files, bytes of files, pictures of Pillow's, or uint8 arrays H×W or H×W×C; or one of them. With tabular inputs,
                dictionaries with one of these as ``image``, and each input by its name; or a DataFrame with these columns.
            batch_size: how many go through the network together.

        Raises:
            ValueError: one cannot be read; the message names it.
        """
        import numpy as np
        import pandas as pd

        if isinstance(pictures, pd.DataFrame):
            pictures = self.answering.named(pictures).to_dict("records")
        array = isinstance(pictures, np.ndarray) and (
            pictures.ndim == 2 or (pictures.ndim == 3 and pictures.shape[2] <= 4)
        )
        if array or isinstance(pictures, str | bytes | os.PathLike | PIL.Image.Image | Mapping):
            pictures = [pictures]
        answers = []
        for answer in self.answering.stream(pictures, batch_size):
            if isinstance(answer, ValueError):
                raise answer
            answers.append(answer)
        return answers

    def draw(self, picture: Picture, answer: Mapping[str, Any] | None = None) -> PIL.Image.Image:
        """Draws what the model answers about a picture, such as boxes, or a label above it.

        Args:
            picture: as `predict` takes it.
            answer: one of `predict`; by default the model is asked.

        Raises:
            ValueError: the picture cannot be read.
        """
        answer = self.predict([picture])[0] if answer is None else dict(answer)
        return PIL.Image.fromarray(self.module.answers.draw(self.answering.read(picture), answer))


@dataclass(frozen=True)
class Training:
    """A training that has ended.

    Args:
        output: folder with its checkpoints.
        metrics: what the best checkpoint was measured to be on the test split (``test/…``), or without one on the validation
            split (``val/…``).
        model: it, with the best weights.
        run_id: of its run in MLflow; None where it was not tracked.
        address: of the registered model, ``models:/NAME/VERSION``; None where it has no name.
        given: the arguments of `train`.
    """

    output: Path
    metrics: dict[str, float]
    model: Model
    run_id: str | None
    address: str | None
    given: dict[str, Any]

    def register(self, name: str) -> str:
        """Registers the best weights under a name, as ``fit --register`` does; they are not trained again, but measured.

        Args:
            name: of the model in MLflow's registry.

        Returns:
            The version's address, ``models:/NAME/VERSION``.

        Raises:
            ValueError: MLflow does not take the name, or does not answer.
        """
        return str(train(**self.given | {"output": self.output, "register": name}).address)


def train(
    task: str,
    *,
    data: str | None = None,
    root: str | os.PathLike[str] | None = None,
    backbone: str | None = None,
    config: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
    max_epochs: int | None = None,
    batch_size: int | Literal["auto"] | None = None,
    lr: float | None = None,
    seed: int | None = None,
    output: str | os.PathLike[str] | None = None,
    register: str | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: "Sequence[L.Callback]" = (),
) -> Training:
    """Trains, measures the best checkpoint, and registers it if it is given a name: ``python -m pipelines.TASK fit``.

    The run is tracked in MLflow. A training that was interrupted goes on when it is called again with its ``output``.

    Args:
        task: such as ``classification``; ``python -m pipelines`` lists them.
        data: class of the data, such as ``ImageFolder``.
        root: folder of the data.
        backbone: name of timm's or Fovea's, or a registered model's address.
        config: a recipe in YAML, or several of which the later ones win.
        max_epochs: passes over the training split.
        batch_size: images that are learned from at a time; ``auto`` for as many as memory has room for.
        lr: learning rate.
        seed: of all that is random.
        output: folder of the training; by default a new one in ``outputs/``.
        register: name under which the best weights are registered.
        settings: any others, by their names on the command line, such as ``{"model.mixup": 0.2}``.
        callbacks: of Lightning's trainer.

    Raises:
        ValueError: it cannot be done as given; the message says what to give instead.
        KeyboardInterrupt: it was interrupted; ``output`` goes on.
    """
    given = {key: value for key, value in locals().items() if key != "task"} | {"task": task}
    from pipelines.engine.task import find_task
    from pipelines.serving.model import VisionModel

    named = {"data": data, "data.root": root, "backbone": backbone, "max_epochs": max_epochs, "batch_size": batch_size,
             "lr": lr, "seed": seed, "output": output, "register": register}  # fmt: skip
    recipes = [config] if isinstance(config, str | os.PathLike) else config
    args = ["fit", *(f"--config={os.fspath(file)}" for file in recipes)]
    args += [f"--{key}={_text(value)}" for key, value in named.items() if value is not None]
    args += [f"--{key}={_text(value)}" for key, value in (settings or {}).items()]
    try:
        cli = find_task(task).run(args, callbacks)
    except SystemExit as end:  # how a command tells whoever started it that a signal has ended it
        if end.code == 130:
            raise KeyboardInterrupt from None
        raise
    address = cli.rows.get("registered")
    if register and not str(address).startswith("models:/"):
        raise ValueError(f"{register} was not registered: {address}")
    metrics = {key: float(value) for key, value in cli.trainer.callback_metrics.items()}
    logger = cli.trainer.logger
    model = Model(VisionModel().take(cli.model, cli.datamodule.preprocessing))
    return Training(cli.output, metrics, model, str(logger.version) if logger else None, address, given)


def load(address: str, device: str = "auto") -> Model:
    """Looks up a registered model by its address.

    Args:
        address: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        device: where it shall run, such as ``cuda:1``; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: there is no such model or device.
    """
    from pipelines.serving import registry

    return Model(registry.load(address, device))


def _text(value: Any) -> str:
    """A setting as the command line has it."""
    return os.fspath(value) if isinstance(value, str | os.PathLike) else json.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has for a number or array of NumPy's or PyTorch's, and for a path in a list."""
    return value.tolist() if hasattr(value, "tolist") else os.fspath(value)
