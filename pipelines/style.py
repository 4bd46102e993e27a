"""Paints one picture in the style of another: ``python -m pipelines.style CONTENT STYLE --out FILE``."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console
from rich.progress import Progress, TextColumn

from pipelines.engine.command import UsageError, command
from pipelines.engine.terminal import print_table

if TYPE_CHECKING:
    from torch import Tensor

FRAMES = 60  # of the film, ten a second


def style(
    content: str, style: str, out: str = "style.png", backbone: str = "vgg19", pretrained: bool = True,
    backbone_options: dict[str, Any] | None = None, style_layers: list[str] | None = None,
    content_layer: str | None = None, content_weight: float = 1.0, style_weight: float = 30.0,
    variation_weight: float = 100.0, keep_colour: bool = False, size: int = 512,
    start: Literal["content", "noise"] = "content", optimizer: Literal["lbfgs", "adam"] = "lbfgs", steps: int = 300,
    seed: int = 0,
) -> None:  # fmt: skip
    """Paints a picture in the style of another (Gatys et al. 2016), and saves a film of the optimisation.

    Args:
        content: the picture to paint.
        style: the style picture.
        out: file of the result; the film has its name with ``.mp4``.
        backbone: network whose features are compared: a timm name, a file of weights, a registered model (``models:/name@alias``).
        pretrained: use published weights.
        backbone_options: further arguments of the backbone, such as ``architecture`` of a file of weights.
        style_layers: layers whose Gram matrices are compared; by default the paper's of VGG19, all stages of others.
        content_layer: layer whose maps are compared; by default conv4_2 of VGG19, the last stage up to stride 8 of others.
        content_weight: α.
        style_weight: β.
        variation_weight: weight of the total variation, which smooths the picture.
        keep_colour: keep the colours of the content and change only its brightness.
        size: longer side of both pictures, in pixels.
        start: initial picture: the content, or noise.
        optimizer: L-BFGS as in the paper, or Adam, which takes less memory.
        steps: number of loss evaluations.
        seed: random seed of the noise.

    Raises:
        ValueError: a file cannot be read or written, or there is no such backbone or layer.
    """
    settings = dict(locals())
    import lightning as L
    import mlflow
    import torch
    from torch import Tensor

    from datamodules.images import WRITTEN
    from modules.measures.images import FixedFeatures
    from modules.pictures.sheets import sheet
    from modules.style import StyleLosses, StyleObjective, luminance, stylize
    from pipelines.engine.disk import write_image
    from pipelines.serving.video import Drawing
    from pipelines.tracking.client import active_run, experiment_id, needed, tracking_client

    for name in ("size", "steps", "content_weight", "style_weight", "variation_weight"):
        if not (least := {"size": 16, "steps": 1}.get(name, 0)) <= settings[name] < float("inf"):
            raise UsageError(f"--{name} must be at least {least} and finite, not {settings[name]}.")
    if (file := Path(out)).suffix.lower() not in WRITTEN:
        raise UsageError(f"--out {out} must end in one of {', '.join(WRITTEN)}.")
    if os.path.realpath(out) in (os.path.realpath(content), os.path.realpath(style)):
        raise UsageError(f"--out {out} would replace the picture {os.path.realpath(out)}: name another file.")
    L.seed_everything(seed, verbose=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    wanted, model = _read(content, size).to(device), _read(style, size).to(device)
    target, tiles = wanted, [_array(wanted), _array(model)]
    if keep_colour:
        target, model = luminance(wanted), luminance(model)
        model = (model - model.mean()) / model.std().clamp_min(1e-6) * target.std() + target.mean()
    objective = StyleObjective(
        FixedFeatures(backbone, pretrained, backbone_options), target.expand_as(wanted), model.expand(-1, 3, -1, -1),
        style_layers, content_layer, (content_weight, style_weight, variation_weight),
    )  # fmt: skip
    settings |= {"style_layers": objective.style_layers, "content_layer": objective.content_layer}

    def finish(x: Tensor) -> Any:
        return _array(wanted + x - target if keep_colour else x)

    every = max(1, steps // FRAMES)
    place = experiment_id(tracking_client(), "style")
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[losses]}"))
    file.parent.mkdir(parents=True, exist_ok=True)
    with (
        needed(),
        active_run(place, f"{Path(content).stem}-{Path(style).stem}") as run,
        Progress(*columns, console=Console(stderr=True)) as progress,
        Drawing(str(file.with_suffix(".mp4")), 10) as film,
    ):
        mlflow.set_tag("task", "style")
        mlflow.log_params(settings)
        bar = progress.add_task("style", total=steps, losses="")

        def seen(step: int, losses: StyleLosses, x: Tensor) -> None:
            values = {f"loss/{key}": float(value) for key, value in losses._asdict().items()}
            told = ", ".join(f"{key[5:]} {value:.4f}" for key, value in values.items())
            progress.update(bar, completed=min(step, steps), losses=told)
            if step % every == 0 or step == 1:
                mlflow.log_metrics(values, step=step)
                film.write(finish(x), step / every / 10)

        first = target if start == "content" else torch.rand_like(target)
        result = finish(stylize(objective, first, steps, optimizer, seen))
        film.write(result, steps / every / 10 + 1)
        film.close()
        write_image(file, result)
        mlflow.log_image(sheet([*tiles, result], 3, ["content", "style", "result"], side=256), "overview.png")
        mlflow.log_artifact(str(file))
        mlflow.log_artifact(film.file)
    print_table("style", {"picture": str(file), "film": film.file, "run": run.info.run_id})


def _read(file: str, size: int) -> "Tensor":
    """Reads a picture, resized to a longer side, as float 1×3×H×W in [0, 1]."""
    import numpy as np
    import torch
    from PIL import Image

    from datamodules.images import read_image

    picture = Image.fromarray(read_image(file))
    sides = [max(1, round(side * size / max(picture.size))) for side in picture.size]
    small = np.array(picture.resize((sides[0], sides[1]), Image.Resampling.LANCZOS))
    return torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255


def _array(image: "Tensor") -> Any:
    return (image[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()


if __name__ == "__main__":
    command(style)
