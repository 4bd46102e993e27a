"""Transferability of a backbone's features, stage by stage: ``python -m pipelines.transferability --backbone NAME
--data NAME``."""

from pathlib import Path
from typing import Any

from datamodules import ClassificationDataModule
from pipelines.engine.command import command
from pipelines.engine.terminal import print_table


def transferability(
    *,
    backbone: str,
    data: ClassificationDataModule,
    pretrained: bool = True,
    backbone_options: dict[str, Any] | None = None,
    images: int = 2000,
    output: Path = Path("outputs", "transfer"),
    experiment: str = "transfer",
) -> dict[str, float]:
    """Trains a linear probe on each stage of a backbone and plots accuracy against depth (Yosinski et al. 2014,
    arXiv:1411.1792; Alain & Bengio 2016, arXiv:1610.01644).

    A linear classifier (ridge regression, its penalty by leaving one out) is fitted to what the stage makes of
    training images (its maps averaged to a grid, a thousand numbers), and measured on validation images; the same on random weights says what is due to learning.

    Args:
        backbone: any timm name, a file of weights, or a registered model (``models:/name@alias``).
        data: the target data set.
        pretrained: start from published weights.
        backbone_options: further arguments of the backbone, such as ``architecture`` of a file of weights.
        images: maximum number of training images, and of validation images.
        output: folder for ``transferability.png``.
        experiment: MLflow experiment.

    Returns:
        The accuracy by stage, starting with the image itself.
    """
    import lightning as L
    import mlflow
    import numpy as np

    from modules import ClassificationModule
    from modules.callbacks.transfer import probe
    from modules.networks.backbones import untrained
    from modules.networks.features import Stages, extract
    from modules.spec import Backbone, DataSpec
    from pipelines.engine.disk import write_image
    from pipelines.tracking.client import active_run, experiment_id, needed, tracking_client

    L.seed_everything(data.seed, verbose=False)
    place = experiment_id(tracking_client(), experiment)
    module = ClassificationModule(
        DataSpec(num_classes=data.num_classes, in_chans=data.in_chans, image_size=data.image_size),
        Backbone(backbone, pretrained=pretrained, options=backbone_options),
    )
    loaders = [data.plain_loader(split, images) for split in ("train", "val")]
    scores: dict[str, dict[str, float]] = {}
    for name, network in (
        ("learned", module.backbone),
        ("random", untrained(module.backbone, data.in_chans, data.image_size)),
    ):
        stages = Stages(network)
        (train, labels), (val, truth) = (extract(stages, loader, module.normalize) for loader in loaders)
        ends = np.cumsum(list(stages.widths.values()))[:-1]
        parts = zip(np.split(train, ends, 1), np.split(val, ends, 1), strict=True)
        scores[name] = {
            stage: probe((fit, labels), (test, truth)) for stage, (fit, test) in zip(stages.widths, parts, strict=True)
        }
    sheet = _draw(scores, f"{backbone} on {data.title}, {len(loaders[0].dataset):,} images")
    write_image(output / "transferability.png", sheet)
    run_name = f"{Path(backbone).name}-{data.title}".lower()
    with needed(), active_run(place, run_name) as run:
        mlflow.set_tags({"task": "transfer", "backbone": backbone, "data": data.title})
        mlflow.log_params({"backbone": backbone, "pretrained": pretrained, "image_size": data.image_size,
                           "images": len(loaders[0].dataset)})  # fmt: skip
        for name, values in scores.items():
            for depth, value in enumerate(values.values()):
                mlflow.log_metric(f"probe/{name}", value, step=depth)
        columns = {"stage": list(scores["learned"])} | {name: list(v.values()) for name, v in scores.items()}
        mlflow.log_table(columns, "transferability.json")
        mlflow.log_artifact(str(output / "transferability.png"))
    rows = {stage: f"{value:.3f}   {scores['random'][stage]:.3f}" for stage, value in scores["learned"].items()}
    rows |= {"picture": str(output / "transferability.png"), "run": run.info.run_id}
    print_table("accuracy of a linear classifier: learned, random weights", rows)
    return scores["learned"]


def _draw(scores: dict[str, dict[str, float]], title: str) -> Any:
    """Plot of accuracy against depth, uint8 H×W×3."""
    from matplotlib.figure import Figure

    from modules.pictures.charts import rasterize

    names = list(scores["learned"])
    figure = Figure((1.5 + 0.55 * len(names), 4), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    for name, style in (("learned", "o-C0"), ("random", "o--C7")):
        axes.plot(list(scores[name].values()), style, label=f"{name} weights")
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
    axes.set_ylabel("validation accuracy of a linear classifier")
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    axes.legend()
    return rasterize(figure)


if __name__ == "__main__":
    command(transferability)
