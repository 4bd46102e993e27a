"""Several tasks on one backbone: what they share, what each is alone, gradients that conflict, mistakes."""

import re
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import start
from PIL import Image
from torch import nn

from datamodules import COCODetection, DataError, DigitTasks, LabelColumns
from datamodules.loading import collate
from modules import Backbone, DataSpec, DetectionModule, MultiTaskModule, SegmentationModule
from modules.detection import YOLO
from modules.multi_task import resolved
from pipelines.multi_task import multi_task

SMALL = ["--data.scene_size", "32", "--data.train", "32", "--data.val", "5", "--data.test", "5", "--data.augmentation", "none",
         "--model.backbone", "test_convnext", "--model.detector.strides", "[4, 8]", "--model.detector.width", "8",
         "--model.detector.norm", "group", "--model.decoder", "FPN", "--model.decoder.width", "64", "--model.decoder.dropout", "0",
         "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]  # fmt: skip
TARGETS = {"classification": ["few", "many"], "segmentation": ["none", "a", "b"], "detection": ["a", "b"]}
FINDER = partial(YOLO, width=8, depth=1, strides=[4, 8])


def module(**options: Any) -> MultiTaskModule:
    torch.manual_seed(0)
    spec = DataSpec(image_size=32, targets=TARGETS)
    return MultiTaskModule(spec, Backbone("test_resnet"), detector=FINDER, **options)


def test_the_backbone_looks_once_and_each_task_says_what_it_says_alone() -> None:
    several = module().eval()
    looks: list[Any] = []
    several.backbone.register_forward_hook(lambda *_: looks.append(1))
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        told = several(image)
        assert len(looks) == 1
        for name, kind, options in (
            ("segmentation", SegmentationModule, {}),
            ("detection", DetectionModule, {"detector": FINDER}),
        ):
            names = TARGETS[name]
            alone: Any = kind(DataSpec(3, 32, len(names), names), Backbone("test_resnet"), **options).eval()
            alone.backbone.load_state_dict(several.backbone.state_dict())
            head = {key: value for key, value in several.tasks[name].state_dict().items() if "figures" not in key}
            assert not alone.load_state_dict(head, strict=False).unexpected_keys
            for mine, its in zip(told[name], alone(image), strict=True):
                torch.testing.assert_close(mine, its)


def test_class_maps_are_those_of_the_picture_without_what_was_laid_around_it() -> None:
    several = module(tasks=["segmentation", "detection"]).eval()
    logits = torch.zeros(1, 3, 32, 32)
    logits[:, 1, :, :16], logits[:, 2, :, 16:] = 1, 1  # of a picture half as high as wide, the lower half is padding
    logits[:, 0, 16:] = 5
    several.segmentation.forward = lambda _: logits
    batch = {"image": torch.zeros(1, 3, 32, 32, dtype=torch.uint8), "size": torch.tensor([[40, 80]])}
    (answer,) = several.predict(batch)
    assert answer["size"] == [40, 80]
    assert answer["segmentation"]["shares"] == {"a": 0.5, "b": 0.5}


def test_what_gradients_have_against_each_other_is_taken_out() -> None:
    agreeing = torch.tensor([[1.0, 2.0], [3.0, 0.5]])
    assert torch.equal(resolved(agreeing, torch.Generator()), agreeing.sum(0))
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    # (1, 0) without its part along (-1, 1) is (½, ½); (-1, 1) without its part along (1, 0) is (0, 1).
    assert torch.allclose(resolved(torch.stack([one, other]), torch.Generator()), torch.tensor([0.5, 1.5]))


def test_the_gradient_of_a_step_with_pcgrad_is_the_resolved_one_on_the_backbone_alone() -> None:
    several = module(pcgrad=True, tasks=["classification", "segmentation"])
    learning: list[nn.Parameter] = list(several.backbone.parameters())
    image = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    batch = {"image": image, "label": torch.tensor([0, 1]), "mask": torch.randint(3, (2, 32, 32), dtype=torch.uint8)}
    with several.seeing(image):
        terms = several.weighted({name: task.losses(batch).total for name, task in several.tasks.items()})
    found = [torch.autograd.grad(term, learning, retain_graph=True, allow_unused=True) for term in terms.values()]
    rows = [torch.cat([torch.zeros_like(p).flatten() if g is None else g.flatten() for g, p in zip(row, learning, strict=True)])
            for row in found]  # fmt: skip
    gradients = torch.stack([rows[0], -0.7 * rows[0] + 0.1 * rows[1]])  # in conflict
    correction = several._correction(gradients, learning)
    assert float(correction.detach()) == 0
    change = torch.autograd.grad(correction, learning)
    both = gradients.sum(0) + torch.cat([part.flatten() for part in change])
    torch.testing.assert_close(both, resolved(gradients, torch.Generator().manual_seed(0)))


def test_two_processes_learn_the_same_with_learned_weights_and_without_conflicts() -> None:
    args = ["fit", *SMALL, "--model.weighting", "uncertainty", "--model.pcgrad", "true", "--data.num_workers", "0",
            "--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.lr", "0.01",
            "--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1", "--trainer.logger", "false"]  # fmt: skip
    both = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.batch_size", "8"]
    assert start(multi_task, [*args, *both, "--output", "two"], 2) == [0, 0]
    multi_task([*args, "--data.batch_size", "16", "--output", "one"])
    one, two = (torch.load(Path(name, "last.ckpt"), weights_only=True)["state_dict"] for name in ("one", "two"))
    assert one["log_variances"].abs().min() > 0
    for key, value in one.items():
        if value.is_floating_point() and "threshold" not in key:
            torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--model.tasks", "[segmentation, detecton]"], "no task 'detecton', but .* Did you mean detection"),
        (["--model.tasks", "[detection]"], "detection is one: name two or more"),
        (["--model.tasks", "[classification, segmentation]", "--data", "DigitScenes", "--data.scene_size", "32"],
         "no targets of classification, but of detection, reconstruction: data with a label"),
        (["--model.tasks", "[detection, segmentation]", "--data", "DigitScenes", "--data.scene_size", "32"],
         "no targets of segmentation.* --data.masks true"),
        (["--model.weights", "{detectoin: 2}"], "detectoin is not among the tasks"),
        (["--model.weights", "{detection: 2}", "--model.weighting", "uncertainty"], "leave --model.weights out"),
        (["--data.image_size", "33"], "--data.image_size 32, not 33"),
        (["--model.decoder", "FPN", "--model.decoder.width", "32"], "--model.decoder.width of FPN must be a multiple of 64, not 32"),
        (["--data", "DigitMasks"], "it has no targets"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_paragraph(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        multi_task(["fit", *SMALL, "--trainer.logger", "false", *given])
    assert end.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(said, message), message
    assert len(message) < 700


def test_pieces_of_pictures_are_refused_whose_answers_could_not_be_put_together() -> None:
    with pytest.raises(DataError, match=r"--data\.tile 32 .* train detection alone"):
        _ = COCODetection(root="nowhere", tile=32).targets


def test_scenes_say_how_many_digits_are_left_of_them() -> None:
    data = DigitTasks(scene_size=48, train=8, val=1, test=1, augmentation="strong", batch_size=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["label"].tolist() == [len(labels) for labels in batch["labels"]]
    assert data.targets["classification"] == [*"0123456"]


COLUMNS = {"colour": ["red", "green", "blue"], "shape": ["square", "bar"]}


def table(name: str, columns: dict[str, list[str]] = COLUMNS, count: int = 48) -> str:
    """A table of pictures of a square or a bar in a colour, with their columns in the given order."""
    rows = [",".join(["path", *columns])]
    for i in range(count):
        own = {column: values[i % len(values)] for column, values in columns.items()}
        picture = np.zeros((16, 16, 3), np.uint8)
        channel = COLUMNS["colour"].index(own["colour"])
        picture[4:12, slice(4, 12) if own["shape"] == "square" else slice(7, 9), channel] = 150 + i
        Image.fromarray(picture).save(f"{name}-{i}.png")
        rows.append(",".join([f"{name}-{i}.png", *own.values()]))
    Path(f"{name}.csv").write_text("\n".join(rows))
    return f"{name}.csv"


def test_each_column_of_classes_has_a_head_and_is_known_by_name_again(capsys: pytest.CaptureFixture[str]) -> None:
    few = ["--data", "LabelColumns", "--data.image_size", "16", "--data.augmentation", "none", "--data.batch_size", "8",
           "--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu",
           "--output", "out", "--model.backbone", "lenet5", "--model.tasks", "[classification]"]  # fmt: skip
    fit = ["fit", *few, "--data.file", table("toys"), "--trainer.max_epochs", "1"]
    module: Any = multi_task([*fit, "--data.label_columns", "[colour, shape]"]).model
    assert list(module.targets.values()) == [["blue", "green", "red"], ["bar", "square"]]

    others = table("others", {"shape": ["bar", "square", "square"], "colour": ["red", "blue"]})  # turned, and no green
    again = ["test", *few, "--data.file", others]
    cli = multi_task([*again, "--data.label_columns", "[shape, colour]"])
    source = cli.datamodule.sources["test"]
    answers = MultiTaskModule.load_from_checkpoint("out/best.ckpt").predict(collate([*source]))
    rows = dict(line.split(",", 1) for line in Path(others).read_text().split())
    truth = [rows[Path(path).name].split(",") for path in source.paths]
    for k, column in enumerate(("shape", "colour")):
        right = [
            answer[f"classification/{column}"]["label"] == own[k] for answer, own in zip(answers, truth, strict=True)
        ]
        figure = cli.trainer.callback_metrics[f"test/classification/{column}/accuracy"]
        assert float(figure) == pytest.approx(np.mean(right)), column
    with pytest.raises(SystemExit):
        multi_task([*again, "--data.label_columns", "[shape]"])
    assert "no label/colour. --data.label_columns names" in " ".join(capsys.readouterr().err.split())


def test_a_column_that_tells_nothing_apart_is_refused() -> None:
    file = table("toys", {"colour": ["red", "blue"], "shape": ["bar"]})
    with pytest.raises(DataError, match="only 'bar' under 'shape'"):
        _ = LabelColumns(file, label_columns=["colour", "shape"]).targets
    with pytest.raises(DataError, match="no column 'size'"):
        _ = LabelColumns(file, label_columns=["colour", "size"]).targets
    with pytest.raises(DataError, match="without a point or a slash"):
        LabelColumns(file, label_columns=["colour", "a/b"])
