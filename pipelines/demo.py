"""``make demo``: train LeNet-5 on real digits, register it, make it champion, and ask it about a picture."""

from pathlib import Path

from pipelines.engine.command import command
from pipelines.engine.terminal import print_table

ROOT = Path(__file__).parents[1]
NAME = "digits-lenet5"


def demo() -> None:
    """Trains, registers, promotes and uses a model, and ends with one table."""
    from PIL import Image

    from pipelines.classification import classification
    from pipelines.serving import registry
    from pipelines.serving.promotion import promote

    cli = classification(
        ["fit", "--config", str(ROOT / "configs" / "classification" / "lenet5_digits.yaml"), "--register", NAME]
    )
    promotion = promote(NAME, cli.rows["registered"].rsplit("/", 1)[1])
    sample = cli.datamodule.sources["test"][7]
    picture = cli.output / "picture.png"
    Image.fromarray(sample["image"][..., 0]).save(picture)
    answer = registry.load(f"models:/{NAME}@champion").predict(None, [picture]).iloc[0]
    print_table(
        "Fovea demo",
        {
            "accuracy on 1,000 held-out digits": cli.rows["test/accuracy"],
            "training": cli.rows["training"],
            "run": cli.rows["run"],
            "champion": promotion,
            f"{picture}": f"a {sample['label']}, seen as {answer['label']} with probability {answer['probability']:.3f}",
            "see the run": ".venv/bin/mlflow ui",
            "ask again": f".venv/bin/python -m pipelines.predict models:/{NAME}@champion {picture}",
            "your own images, a folder for each class": ".venv/bin/python -m pipelines.classification fit "
            "--config configs/classification/folder.yaml --data.root FOLDER",
        },
    )


if __name__ == "__main__":
    command(demo)
