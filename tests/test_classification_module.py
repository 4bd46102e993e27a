"""Classification does what its options say: metrics, losses, schedules, averaging, freezing."""

import json
import math
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import built
from lightning.pytorch.loggers.logger import Logger
from loggers import Steps
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, precision_score, recall_score, top_k_accuracy_score
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection

from datamodules import Digits8x8
from modules import ClassificationModule, Optimization, WarmupCosine
from modules.callbacks.publish import Report
from modules.callbacks.support_vectors import solve
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine.cli import VisionCLI
from pipelines.tracking.logger import run_id_of


class Tables(Logger):
    """Keeps tables and the names of pictures in memory."""

    name, version = "tables", 0

    def __init__(self) -> None:
        self.tables: dict[str, list[list]] = {}
        self.pictures: list[str] = []

    def log_metrics(self, metrics, step=None) -> None: ...

    def log_hyperparams(self, params) -> None: ...

    def log_table(self, key, columns, rows, step) -> None:
        self.tables[key] = [columns, *rows]

    def log_image(self, key, images, step) -> None:
        self.pictures.append(key)


class Watch(L.Callback):
    """Notes weights and learning rates during a training."""

    def __init__(self) -> None:
        self.steps, self.epochs, self.validated, self.rates, self.losses = [], [], [], [], []

    @staticmethod
    def copy(module: L.LightningModule) -> dict[str, torch.Tensor]:
        return {key: value.clone() for key, value in module.state_dict().items()}

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        self.steps.append(self.copy(module))
        self.losses.append(float(outputs["loss"]))

    def on_train_epoch_end(self, trainer, module) -> None:
        self.epochs.append(self.copy(module))

    def on_validation_batch_start(self, trainer, module, batch, batch_idx, dataloader_idx=0) -> None:
        self.validated.append(self.copy(module))


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
             "enable_model_summary": False, "accelerator": "cpu"}  # fmt: skip
    return L.Trainer(**quiet | options)


def small(backbone: str = "lenet5", **plan) -> tuple[ClassificationModule, Digits8x8]:
    torch.manual_seed(0)
    side = 12 if backbone == "lenet5" else 16
    module = ClassificationModule(
        DataSpec(num_classes=10, in_chans=1, image_size=side), Backbone(backbone), optimization=Optimization(**plan)
    )
    return module, Digits8x8(image_size=side, batch_size=32, num_workers=0)


def saying(logits: torch.Tensor) -> tuple[ClassificationModule, torch.Tensor]:
    """A module whose answers are given, and the images that carry them."""
    module = ClassificationModule(DataSpec(num_classes=logits.shape[1], in_chans=1, image_size=12))
    module.backbone, module.head = nn.Flatten(), nn.Identity()
    return module, (logits[:, None, None] - module.shift) / module.scale


def measure(logits: torch.Tensor, labels: torch.Tensor, sizes: list[int]) -> tuple[dict[str, float], Tables]:
    """Validates given answers in batches of given sizes."""
    module, images = saying(logits)
    batches = [{"image": i, "label": k} for i, k in zip(images.split(sizes), labels.split(sizes), strict=True)]
    logger = Tables()
    loader = DataLoader(batches, batch_size=None)
    return trainer(logger=logger).validate(module, loader, verbose=False)[0], logger


@pytest.mark.parametrize("perfect", [0, 23])
def test_metrics_are_those_of_scikit_learn_over_unequal_batches(perfect):
    torch.manual_seed(0)
    logits, labels = 2 * torch.randn(40, 10), torch.arange(40) % 9  # none of the tenth class
    logits[range(40), labels] += 1.5
    logits[range(perfect), labels[:perfect]] += 20  # nothing in the first batch tells the figures apart
    found, logger = measure(logits, labels, [23, 1, 16])
    probabilities, guesses = logits.softmax(1).numpy(), logits.argmax(1)
    expected = {
        "val/accuracy": accuracy_score(labels, guesses),
        "val/balanced_accuracy": recall_score(labels, guesses, labels=range(9), average="macro"),
        "val/f1": f1_score(labels, guesses, average="macro"),
        "val/accuracy_top5": top_k_accuracy_score(labels, probabilities, k=5, labels=range(10)),
        "val/loss": float(-np.log(probabilities[range(40), labels]).mean()),
        "val/calibration_error": 0.0,
    }
    confidence, right = probabilities.max(1), (guesses == labels).numpy()
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            expected["val/calibration_error"] += float(inside.mean() * gap)
    assert found == pytest.approx(expected, abs=1e-5)
    columns, *rows = logger.tables["val/per_class"]
    recalls, precisions = (
        score(labels, guesses, labels=range(10), average=None, zero_division=0)
        for score in (recall_score, precision_score)
    )
    assert columns == ["class", "images", "accuracy", "precision"]
    for k, (name, images, accuracy, precision) in enumerate(rows):
        assert (name, images) == (str(k), int((labels == k).sum()))
        assert (accuracy, precision) == (pytest.approx(recalls[k]) if k < 9 else None, pytest.approx(precisions[k]))


def test_figures_of_a_collection_are_not_joined_by_what_the_first_batch_looks_like():
    """torchmetrics would by itself: this is why no collection may leave it to it."""
    right, wrong = 20 * torch.eye(10), 20 * torch.eye(10).roll(1, 0) + 10 * torch.eye(10)
    found, _ = measure(torch.cat([right, wrong]), torch.arange(20) % 10, [10, 10])
    assert found["val/accuracy"] == 0.5
    assert found["val/accuracy_top5"] == 1
    figures = [
        part for part in ClassificationModule(DataSpec(num_classes=10)).modules() if isinstance(part, MetricCollection)
    ]
    assert len(figures) == 2
    for part in figures:
        part.update(right, torch.arange(10))
        assert all(len(group) == 1 for group in part.compute_groups.values())


def test_the_loss_of_a_step_is_that_of_all_its_batches():
    module, data = small()
    parts, logger = [], Steps()
    losses = module.losses
    module.losses = lambda batch: parts.append(value := losses(batch)) or value
    options = {"accumulate_grad_batches": 3, "log_every_n_steps": 1, "limit_train_batches": 7, "limit_val_batches": 0}
    trainer(max_epochs=1, logger=logger, **options).fit(module, data)
    means = [
        float(torch.stack([losses.total for losses in part]).mean()) for part in (parts[:3], parts[3:6], parts[6:])
    ]
    assert logger.series["train/loss_step"] == [(k, pytest.approx(mean, rel=1e-6)) for k, mean in enumerate(means)]


def test_calibration_error_by_hand():
    sure, unsure = [math.log(9), 0.0], [math.log(1.5), 0.0]  # 0.9 and 0.6 for the first class
    logits, labels = torch.tensor([sure] * 4 + [unsure] * 2), torch.tensor([0, 0, 0, 1, 0, 1])
    found, _ = measure(logits, labels, [6])
    assert found["val/calibration_error"] == pytest.approx(4 / 6 * (0.9 - 0.75) + 2 / 6 * (0.6 - 0.5), abs=1e-6)
    assert "val/accuracy_top5" not in found


@pytest.mark.parametrize(("l1", "l2"), [(0.01, 0.0), (0.0, 0.02), (0.01, 0.02)])
def test_penalties_are_sums_over_weights_without_biases(l1, l2):
    module, data = small(optimizer=partial(torch.optim.SGD, lr=0.0), l1_penalty=l1, l2_penalty=l2)
    watch = Watch()
    run = trainer(max_steps=1, callbacks=[watch], limit_val_batches=0)
    run.fit(module, data)
    weights = [value.double() for key, value in module.state_dict().items() if key.endswith("weight")]
    assert len(weights) == 5
    penalty = sum(l1 * w.abs().sum() + l2 * w.pow(2).sum() for w in weights)
    assert watch.losses[0] - float(run.callback_metrics["train/loss"]) == pytest.approx(float(penalty), rel=1e-4)


def test_label_smoothing_spreads_its_share_over_all_classes():
    torch.manual_seed(0)
    logits, labels, share = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1]), 0.3
    module, images = saying(logits)
    module.label_smoothing = share
    target = (1 - share) * F.one_hot(labels, 4) + share / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(module.losses({"image": images, "label": labels}).total, expected, atol=1e-6)


def test_classes_weigh_as_they_are_said_to_and_easy_images_count_little():
    images, labels = torch.randint(256, (4, 1, 12, 12), dtype=torch.uint8), torch.tensor([0, 1, 2, 2])
    data = DataSpec(1, 12, 3, class_weights=[0.5, 2, 1])
    module = ClassificationModule(data)
    with torch.no_grad():
        likely = module(images).log_softmax(1)[range(4), labels]
        weights = torch.tensor([0.5, 2, 1, 1])
        assert module.losses({"image": images, "label": labels}).total == pytest.approx(
            float(-(weights * likely).mean())
        )
        module.focal_gamma = 2.0
        expected = -(weights * (1 - likely.exp()) ** 2 * likely).mean()
        assert module.losses({"image": images, "label": labels}).total == pytest.approx(float(expected), rel=1e-5)
        soft = 0.7 * torch.eye(3)[labels] + 0.1
        module.label_smoothing, module.focal_gamma = 0.3, 1e-9
        expected = -(soft * torch.tensor(data.class_weights) * module(images).log_softmax(1)).sum(1).mean()
        assert module.losses({"image": images, "label": labels}).total == pytest.approx(float(expected), rel=1e-5)
    module.focal_gamma = 0.5
    with torch.no_grad():
        module.head.weight.zero_()
        module.head.bias.copy_(torch.tensor([200.0, 0, 0]))
    module.losses({"image": images[:1], "label": labels[:1]}).total.backward()  # one that could not be more certain
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


def test_weights_of_classes_let_a_solved_head_find_the_rare():
    rng = np.random.default_rng(0)
    features = np.concatenate([rng.normal(0, 1, (400, 2)), rng.normal(1, 1, (12, 2))]).astype(np.float32)
    labels = np.repeat([0, 1], (400, 12))
    found = []
    for weights in (None, [0.515, 17.2]):
        solution = solve(features, labels, 2, weights)
        found.append(int((features[400:] @ solution.weight.T + solution.bias).argmax(1).sum()))
    assert found[0] < 6 < found[1]


def mixed(**options) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Images before and after mixing, logits, and the loss of a training step."""
    module = built(ClassificationModule, num_classes=10, in_chans=1, image_size=12, **options)
    seen, said = [], []
    module.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))
    module.head.register_forward_hook(lambda *all: said.append(all[-1]))
    images = torch.randint(256, (10, 1, 12, 12), dtype=torch.uint8)
    loss = module.losses({"image": images, "label": torch.arange(10)}).total
    return module.normalize(images), seen[0], said[0].detach(), float(loss.detach())


def kind(before: torch.Tensor, after: torch.Tensor) -> tuple[str, float]:
    """How each image was mixed with the one before it, and its own share."""
    other = before.roll(1, 0)
    own = (after == before).all(0)[0]
    if torch.equal(after, torch.where(own, before, other)):
        rows, columns = (~own).any(1), (~own).any(0)
        assert int(rows.sum() * columns.sum()) == int((~own).sum()), "the patch is a rectangle"
        return "cutmix", float(own.float().mean())
    share = float(((after - other) * (before - other)).sum() / (before - other).square().sum())
    assert 0 <= share <= 1
    assert torch.allclose(after, share * before + (1 - share) * other, atol=1e-5)
    return "mixup", share


@pytest.mark.parametrize(
    ("options", "kinds"),
    [({"mixup": 1.0}, {"mixup"}), ({"cutmix": 1.0}, {"cutmix"}), ({"mixup": 1.0, "cutmix": 1.0}, {"mixup", "cutmix"})],
    ids=["mixup", "cutmix", "both"],
)
def test_targets_are_mixed_as_the_images_are(options, kinds):
    torch.manual_seed(0)
    found = set()
    for _ in range(12):
        before, after, logits, loss = mixed(**options)
        name, share = kind(before, after)
        target = share * torch.eye(10) + (1 - share) * torch.eye(10).roll(1, 0)
        assert loss == pytest.approx(float(-(target * logits.log_softmax(1)).sum(1).mean()), abs=1e-4)
        found.add(name)
    assert found == kinds


def test_warm_up_then_half_a_cosine():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupCosine(optimizer, total_steps=10, warmup=0.2, final=0.1)
    rates = []
    for _ in range(12):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[4] == pytest.approx(2 * (0.1 + 0.9 * (2 + math.sqrt(2)) / 4))  # a quarter of the way down
    assert rates[6] == pytest.approx(2 * 0.55)
    assert rates[10:] == pytest.approx([0.2, 0.2])


def test_of_steps_and_time_the_further_one_counts():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    by_both, by_time = (WarmupCosine(optimizer, total_steps=steps, warmup=0.0) for steps in (10, 0))
    for by_steps, elapsed in ((6, 0.3), (2, 0.8), (2, 0.3), (10, 0.3), (3, 1.0)):
        by_both.elapsed = by_time.elapsed = elapsed
        down = (1 + math.cos(math.pi * (max(by_steps, 10 * elapsed) - 1) / 9)) / 2  # the first step is the warm-up
        assert by_both._factor(by_steps) == pytest.approx(down)
        assert by_time._factor(by_steps) == pytest.approx((1 + math.cos(math.pi * elapsed)) / 2, abs=1e-3)


def test_a_schedule_of_epochs_is_stepped_once_an_epoch():
    watch = Watch()
    module, data = small(lr=1e-3, lr_scheduler=partial(StepLR, step_size=1, gamma=0.5))
    trainer(max_epochs=3, limit_train_batches=2, limit_val_batches=0, callbacks=[watch]).fit(module, data)
    assert watch.rates == pytest.approx([1e-3, 1e-3, 5e-4, 5e-4, 2.5e-4, 2.5e-4])


def test_a_schedule_of_steps_is_told_how_many():
    watch = Watch()
    module, data = small(lr_scheduler=partial(OneCycleLR, max_lr=0.1, pct_start=0.5, anneal_strategy="linear"))
    run = trainer(max_epochs=3, limit_train_batches=3, limit_val_batches=0, callbacks=[watch])
    run.fit(module, data)
    assert run.lr_scheduler_configs[0].scheduler.total_steps == 9
    assert watch.rates.index(max(watch.rates)) in (3, 4)
    assert watch.rates[-1] == pytest.approx(0.1 / 25 / 1e4)


def rates_and_decays(module: ClassificationModule, data: Digits8x8) -> dict[str, tuple[float, float]]:
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(module, data)
    names = {parameter: name for name, parameter in module.named_parameters()}
    groups = run.optimizers[0].param_groups
    found = [(names[p], (g["initial_lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert sorted(name for name, _ in found) == sorted(names.values())  # each once
    return dict(found)


def test_layers_learn_the_slower_the_nearer_they_are_to_the_input():
    plan = {"optimizer": partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3), "layer_decay": 0.5}
    found = rates_and_decays(*small(**plan, backbone_lr_scale=0.1))
    rates = {name: rate for name, (rate, _) in found.items() if name.endswith("weight")}
    assert list(rates.values()) == pytest.approx([0.000125, 0.00025, 0.0005, 0.0005, 0.01])
    assert next(iter(rates)) == "backbone.conv1.weight"
    found = rates_and_decays(*small("resnet10t", **plan))
    convs = [rate for name, (rate, _) in found.items() if "downsample" not in name]
    assert convs == sorted(convs)
    assert len(set(convs)) > 4
    assert convs[-1] == 0.01


def test_biases_and_norms_are_not_decayed():
    module, data = small("resnet10t", optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.3))
    found = rates_and_decays(module, data)
    plain = {name for name, (_, decay) in found.items() if decay == 0}
    norms = {f"{n}.{k}" for n, m in module.named_modules() for k in ("weight", "bias") if isinstance(m, nn.BatchNorm2d)}
    assert plain == norms | {"head.bias"}
    assert {decay for _, decay in found.values()} == {0, 0.3}


@pytest.mark.parametrize("backbone", ["lenet5", "resnet10t"])
def test_averaged_weights_are_validated_and_kept(backbone):
    watch = Watch()
    module, data = small(backbone, lr=0.01, ema_decay=0.2)
    trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=1, callbacks=[watch]).fit(module, data)
    first, second, third = watch.steps
    expected = {}
    for key, value in first.items():
        if value.is_floating_point():  # the decays are 2/11 and then 0.2, less than 3/12
            mean = 2 / 11 * value + 9 / 11 * second[key]
            expected[key] = 0.2 * mean + 0.8 * third[key]
        else:
            expected[key] = third[key]
    kept = module.state_dict()
    assert all(torch.allclose(kept[key], value, atol=1e-6) for key, value in expected.items())
    assert all(torch.allclose(watch.validated[0][key], value, atol=1e-6) for key, value in expected.items())
    assert not torch.allclose(kept["head.weight"], third["head.weight"], atol=1e-4)
    assert ("backbone.bn1.running_mean" in expected) == (backbone != "lenet5")


@pytest.mark.parametrize("frozen_epochs", [1, -1])
def test_a_frozen_backbone_stays_as_it_is(frozen_epochs):
    watch = Watch()
    module, data = small("resnet10t", lr=0.01, frozen_epochs=frozen_epochs)
    before = Watch.copy(module)
    trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=1, callbacks=[watch]).fit(module, data)
    backbone = [key for key in before if key.startswith("backbone.")]
    changed = [{key for key in backbone if not torch.equal(before[key], epoch[key])} for epoch in watch.epochs]
    assert changed[0] == set()
    assert changed[1] == (set(backbone) if frozen_epochs == 1 else set())
    assert all(not torch.equal(before["head.weight"], epoch["head.weight"]) for epoch in watch.epochs)
    assert module.backbone.training == (frozen_epochs == 1)


def test_a_module_and_its_data_need_nothing_else():
    torch.manual_seed(0)
    module = ClassificationModule(DataSpec(num_classes=10, in_chans=1, image_size=12))
    run = trainer(max_epochs=8)
    run.fit(module, Digits8x8(image_size=12))
    assert run.callback_metrics["val/accuracy"] > 0.3


@pytest.fixture
def _plain_torch():
    yield
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()


SHORT = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--trainer.accelerator", "cpu",
         "--trainer.enable_progress_bar", "false"]  # fmt: skip


def command(output: str, *args: str, epochs: int = 1) -> tuple[VisionCLI, dict[str, float]]:
    """A training with some options, which ends well, and its last figures."""
    cli = classification([*SHORT, "--output", output, "--trainer.max_epochs", str(epochs), *args])
    run = MlflowClient().get_run(run_id_of(output))
    assert run.info.status == "FINISHED"
    assert math.isfinite(run.data.metrics["val/loss"])
    metrics = {key: value for key, value in run.data.metrics.items() if key.startswith(("train/", "val/", "test/"))}
    return cli, {key: value for key, value in metrics.items() if "second" not in key}


COMPILER = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
OPTIONS = {
    "bf16": (["--trainer.precision", "bf16-mixed"], lambda cli: cli.trainer.precision == "bf16-mixed"),
    "clip": (["--trainer.gradient_clip_val", "1"], lambda cli: cli.trainer.gradient_clip_val == 1),
    "deterministic": (
        ["--trainer.deterministic", "true"], lambda cli: torch.are_deterministic_algorithms_enabled()
    ),
    "optimiser": (
        ["--model.optimization.optimizer", "timm.optim.Lion", "--model.optimization.optimizer.weight_decay", "0.1"],
        lambda cli: {g["weight_decay"] for g in cli.trainer.optimizers[0].param_groups} == {0, 0.1},
    ),
    "contiguous": (
        ["--model.backbone.channels_last", "false"],
        lambda cli: not cli.model.backbone.conv2.weight.is_contiguous(memory_format=torch.channels_last),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("_plain_torch")
@pytest.mark.parametrize(("args", "took_effect"), OPTIONS.values(), ids=OPTIONS)
def test_options_of_the_command_line_reach_the_training(args, took_effect):
    cli, _ = command("out", *args)
    assert took_effect(cli)


@COMPILER
@pytest.mark.slow
@pytest.mark.usefixtures("_plain_torch")
def test_a_compiled_backbone_learns_the_same():
    _, plain = command("plain")
    cli, compiled = command("compiled", "--model.backbone.compile", "true")
    assert cli.model.backbone._compiled_call_impl is not None
    assert compiled == pytest.approx(plain, rel=1e-2)


def test_a_training_stops_early():
    stop = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val/loss",
            "--trainer.callbacks.patience", "0", "--trainer.callbacks.min_delta", "100"]  # fmt: skip
    cli, _ = command("out", *stop, epochs=5)
    assert cli.trainer.current_epoch == 2


def test_a_found_learning_rate_trains_as_a_given_one():
    plan = ["--data.batch_size", "32", "--model.optimization.backbone_lr_scale", "0.5"]
    finder = ["--trainer.callbacks+=LearningRateFinder", "--trainer.callbacks.num_training_steps", "30"]
    cli, found = command("found", *plan, *finder)
    assert cli.model.lr is not None
    _, given = command("given", *plan, "--model.optimization.lr", str(cli.model.lr))
    assert found == given
    assert {f.name for f in Path("found").iterdir()} == {f.name for f in Path("given").iterdir()}


def test_a_picture_that_fails_is_told_once_and_ends_nothing() -> None:
    class Clumsy(ClassificationModule):
        def report(self, stage: str) -> Report:  # type: ignore[override]
            report = super().report(stage)  # type: ignore[arg-type]
            report.pictures["broken"] = lambda: 1 / 0  # type: ignore[assignment, return-value]
            return report

    album = Tables()
    run = trainer(max_epochs=2, limit_train_batches=1, limit_val_batches=1, logger=album)
    with pytest.warns(UserWarning, match="The picture val/broken could not be made .ZeroDivisionError") as told:
        run.fit(built(Clumsy, num_classes=10, in_chans=1, image_size=8, backbone="mlp"), Digits8x8(num_workers=0))
    assert run.current_epoch == 2
    assert sum("val/broken" in str(warning.message) for warning in told) == 1
    assert "val/confusion_matrix" in album.pictures


def test_answers_for_a_part_of_the_test_split_are_beside_the_files_they_are_of():
    images = Digits8x8(image_size=12).sources["test"].images
    for k in range(12):
        split = "test" if k < 8 else "val" if k < 10 else "train"
        file = Path("data", split, str(k % 2), f"{k}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images[k][..., 0]).save(file)
    args = ["--data", "ImageFolder", "--data.root", "data", "--data.in_chans", "1", "--data.image_size", "12",
            "--data.batch_size", "3", "--trainer.enable_progress_bar", "false",
            "--trainer.max_epochs", "1", "--output", "out"]  # fmt: skip
    classification(["fit", *args])
    looks = [classification(["predict", *args, *part]) for part in (["--trainer.limit_predict_batches", "2"], [])]
    some, every = ([json.loads(line) for line in (look.output / "predictions.jsonl").open()] for look in looks)
    assert (len(some), len(every)) == (6, 8)
    assert some == every[:6]
