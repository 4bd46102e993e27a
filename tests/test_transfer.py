"""A backbone is put to its new use as the strategy says, and the choice of one follows what was measured."""

import inspect
import json
import signal
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import timm
import torch
from conftest import built, start
from mlflow.tracking import MlflowClient
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn

import modules
from datamodules import DataError, DigitMasks, Digits8x8, DigitScenes
from modules import (
    BackboneError,
    ClassificationModule,
    DetectionModule,
    InstanceSegmentationModule,
    MaskedAutoencodingModule,
    Optimization,
    SegmentationModule,
    VisionModule,
    create_backbone,
)
from modules.adversarial import AdversarialModule
from modules.callbacks.freezing import Freezing, layers, unfreezing
from modules.callbacks.support_vectors import Scaler, machine, solve
from modules.callbacks.transfer import LARGE, Evidence, choose, probe
from modules.instance_segmentation import MaskRCNN
from modules.networks.backbones import untrained
from modules.networks.features import Stages, extract
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine.command import command
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of
from pipelines.transferability import transferability

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
         "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}  # fmt: skip
FIT = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--data.train_per_class", "20", "--trainer.accelerator",
       "cpu", "--trainer.enable_progress_bar", "false"]  # fmt: skip


def weights_file(backbone: str = "resnet10t", image_size: int = 16, file: str = "source.safetensors") -> str:
    """Weights that were not drawn by the test's own seed, and batch norms that saw data."""
    torch.manual_seed(7)
    model = create_backbone(backbone, in_chans=1, image_size=image_size, num_classes=10)
    with torch.no_grad():
        model.train()(torch.randn(16, 1, image_size, image_size))
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, file)
    return file


def small(
    transfer: str | None, backbone: str = "resnet10t", pretrained: str | None = None, **plan
) -> ClassificationModule:
    if transfer not in (None, "scratch"):
        pretrained = pretrained or weights_file(backbone)
    torch.manual_seed(0)
    options = {"architecture": backbone} if pretrained else {}
    plan = {"optimizer": partial(torch.optim.AdamW, lr=0.01)} | plan
    return ClassificationModule(DataSpec(num_classes=10, in_chans=1, image_size=16), Backbone(pretrained or backbone, options=options, transfer=transfer), optimization=Optimization(**plan))  # fmt: skip


def data(**options) -> Digits8x8:
    return Digits8x8(**{"image_size": 16, "batch_size": 32, "num_workers": 0, "augmentation": "none"} | options)


class Moved(L.Callback):
    """Notes what changes in each epoch."""

    def __init__(self) -> None:
        self.epochs: list[set[str]] = []
        self.rates: dict[str, float] = {}

    def on_train_start(self, trainer, module) -> None:
        names = {parameter: name for name, parameter in module.named_parameters()}
        self.rates = {names[p]: g["initial_lr"] for g in trainer.optimizers[0].param_groups for p in g["params"]}

    def on_train_epoch_start(self, trainer, module) -> None:
        self.before = {key: value.clone() for key, value in module.state_dict().items()}

    def on_train_epoch_end(self, trainer, module) -> None:
        now = module.state_dict()
        self.epochs.append({key for key, value in self.before.items() if not torch.equal(value, now[key])})


def test_head_of_fixed_features_is_scikit_learns():
    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32)
    order = np.random.default_rng(0).permutation(len(labels))
    for classes, scale in ((10, 1), (2, 1), (10, 100)):
        chosen = order[labels[order] < classes]
        fit, held = chosen[:150], chosen[150:]
        found = solve(scale * pixels[fit], labels[fit], classes)
        logits = scale * pixels[held] @ found.weight.T + found.bias
        expected = machine(found.penalty).fit(scale * pixels[fit], labels[fit]).predict(scale * pixels[held])
        assert (logits.argmax(1) == expected).mean() > 0.999  # float32 pixels
        assert found.accuracy is not None
        assert abs(found.accuracy - (expected == labels[held]).mean()) < 0.1
        confidence = np.exp(logits - logits.max(1, keepdims=True))
        confidence = (confidence / confidence.sum(1, keepdims=True)).max(1).mean()
        assert abs(confidence - (expected == labels[held]).mean()) < 0.1, "a probability"


def test_head_where_little_is_known():
    pixels, labels = load_digits(return_X_y=True)
    one = np.array([np.flatnonzero(labels == k)[0] for k in range(10)])
    found = solve(pixels[one].astype(np.float32), labels[one], 10)
    assert found.accuracy is None
    assert "cross-validation is impossible" in str(found)
    assert ((pixels[one] @ found.weight.T + found.bias).argmax(1) == labels[one]).all()
    some = np.flatnonzero(labels % 2 == 0)[:60]
    found = solve(pixels[some].astype(np.float32), labels[some], 10)
    assert set((pixels @ found.weight.T + found.bias).argmax(1)) <= {0, 2, 4, 6, 8}
    for counts in ((3000, 2), (1500, 1500, 2), (700, 700, 601)):  # C is chosen on about 2,000
        truth = np.repeat(range(len(counts)), counts)
        far = 9 * np.eye(len(counts), dtype=np.float32)[truth]
        found = solve(far, truth, len(counts))
        assert ((far @ found.weight.T + found.bias).argmax(1) == truth).mean() > 0.99, counts


def test_a_feature_that_all_but_rests_does_not_outweigh_the_others():
    quiet = np.zeros((10, 1))
    quiet[0] = 1e-6
    features = np.concatenate([np.random.default_rng(0).normal(size=(10, 5)), quiet], 1)
    scaler = Scaler().fit(features)
    assert scaler.transform(np.full((1, 6), 1.0))[0, 5] < 10
    assert np.allclose(scaler.transform(features)[:, :5].mean(0), 0)


@pytest.mark.parametrize(
    ("count", "head", "epochs", "expected"),
    [
        (5, 2, 10, [4, 3, 3, 2, 2]),
        (3, 1, 8, [3, 2, 1]),
        (3, 1, 2, [1, 1, 1]),
        (3, 2, 0, [4, 3, 2]),
        (0, 1, 10, []),
    ],
)
def test_layers_open_from_the_top_down(count, head, epochs, expected):
    assert unfreezing(count, head, epochs) == expected


def test_unfreezing_moves_what_it_should_when_it_should():
    module, watch = small("freeze_unfreeze"), Moved()
    L.Trainer(**QUIET, max_epochs=10, limit_train_batches=2, limit_val_batches=1, callbacks=[watch]).fit(module, data())
    state = {key for key, value in module.backbone.state_dict().items() if value.is_floating_point()}
    depth = layers(module.backbone, coarse=True)
    opens = [4, 3, 3, 2, 2]  # of stem and four stages; a fifth of ten epochs is the head's
    assert max(depth.values()) == 4

    def opening(key: str) -> int:  # statistics go with the weights of their norm
        return opens[depth[key.replace("running_mean", "weight").replace("running_var", "weight")]]

    for epoch, changed in enumerate(watch.epochs):
        inner = {key.removeprefix("backbone.") for key in changed if not key.startswith(("head.", "means."))}
        moved = {key for key in inner if not key.endswith("num_batches_tracked")}
        assert moved == {key for key in state if opening(key) <= epoch}, epoch
        assert "head.weight" in changed
    assert module.train().backbone.bn1.training
    assert not any(part.training for part in module.eval().modules())


def test_frozen_stages_are_in_evaluation_mode_and_the_others_are_not():
    module, freezing = small("freeze_unfreeze"), Freezing()
    freezing.freeze(module.backbone, 3)
    modes = {name: part.training for name, part in module.backbone.named_modules() if isinstance(part, nn.BatchNorm2d)}
    assert {name for name, training in modes.items() if training} == {
        n for n in modes if n.startswith(("layer3", "layer4"))
    }
    freezing.freeze(module.backbone, 0)
    assert all(part.training for part in module.backbone.modules())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_what_never_learned_stays_so():
    module, freezing = small("freeze_unfreeze"), Freezing()
    module.backbone.bn1.weight.requires_grad_(False)
    freezing.freeze(module.backbone, 5)
    freezing.freeze(module.backbone, 0)
    assert not module.backbone.bn1.weight.requires_grad
    assert module.backbone.bn1.bias.requires_grad


def test_rates_of_each_strategy():
    def rates(transfer, **plan) -> dict[str, float]:
        module, watch = small(transfer, **plan), Moved()
        L.Trainer(**QUIET, max_epochs=2, limit_train_batches=1, limit_val_batches=0, callbacks=[watch]).fit(
            module, data()
        )
        return {key: rate for key, rate in watch.rates.items() if key.endswith("weight") and "downsample" not in key}

    assert set(rates("finetune").values()) == {0.01}
    found = rates("freeze_unfreeze")
    assert found["head.weight"] == 0.01
    assert found["backbone.conv1.0.weight"] == pytest.approx(0.001)
    assert list(found.values()) == sorted(found.values())
    depth = layers(small(None).backbone)
    count = max(depth.values()) + 1
    for key, rate in found.items():
        if key != "head.weight":
            assert rate == pytest.approx(0.01 * 0.1 ** ((count - depth[key.removeprefix("backbone.")]) / count))
    own = rates("finetune", layer_decay=0.5)
    assert own["backbone.layer4.0.conv2.weight"] == pytest.approx(0.005)
    plain = rates("scratch", layer_decay=0.5, backbone_lr_scale=0.1, frozen_epochs=1)
    assert set(plain.values()) == {0.01}


def test_layers_of_feature_pyramids_and_transformers_are_ordered():
    for name, options in (
        ("tf_efficientnet_lite0", {}),
        ("resnet18", {}),
        ("vit_tiny_patch16_224", {}),
        ("lenet5", {}),
    ):
        for features_only in (False, True):
            model = create_backbone(name, image_size=32, features_only=features_only, **options)
            depth = layers(model, coarse=True)
            names = [key for key, _ in model.named_parameters()]
            assert set(depth) == set(names), name
            first = next(key for key in names if "token" not in key)
            assert depth[first] == 0
            assert max(depth.values()) > 0


def test_scratch_forgets():
    file = weights_file()
    learned, forgot = small(None, pretrained=file), small("scratch", pretrained=file)
    key = "layer2.0.conv1.weight"
    saved = timm.create_model("resnet10t", in_chans=1)
    assert saved.state_dict()[key].shape == learned.backbone.state_dict()[key].shape
    assert not torch.equal(learned.backbone.state_dict()[key], forgot.backbone.state_dict()[key])
    assert not forgot.pretrained
    assert (
        float(forgot.backbone.bn1.running_mean.abs().max()) == 0 < float(learned.backbone.bn1.running_mean.abs().max())
    )


def test_wishes_that_contradict_each_other_are_refused(capsys):
    with pytest.raises(BackboneError, match="frozen_epochs"):
        small("finetune", frozen_epochs=-1)
    with pytest.raises(SystemExit) as end:
        classification([*FIT, "--model.backbone.transfer", "fine_tune"])
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert "freeze_unfreeze" in message
    assert "Traceback" not in message
    with pytest.raises(SystemExit):
        classification([*FIT, "--model.backbone.transfer", "finetune"])
    message = capsys.readouterr().err
    assert "random weights" in message
    assert "--model.backbone.pretrained true" in message
    loader = data().plain_loader("train")
    with pytest.raises(BackboneError, match="data module"):
        L.Trainer(**QUIET, max_epochs=1).fit(small("auto"), loader, loader)


CASES = {
    "small, similar": (Evidence(400, 40, 0.9, 0.7), "features"),
    "large, similar": (Evidence(400_000, 40, 0.9, 0.7), "finetune"),
    "small, different": (Evidence(400, 40, 0.6, 0.7), "finetune"),
    "large, different": (Evidence(400_000, 40, 0.6, 0.7), "finetune"),
    "small, similarity unknown": (Evidence(400, 40), "finetune"),
    "large, similarity unknown": (Evidence(400_000, 40), "finetune"),
}


@pytest.mark.parametrize("quadrant", CASES)
def test_the_quadrants(quadrant):
    evidence, strategy = CASES[quadrant]
    choice = choose(evidence)
    assert (choice.quadrant, choice.strategy) == (quadrant, strategy)
    assert strategy in str(choice)
    if evidence.similar is not None:
        assert f"{evidence.features:.0%} accuracy on the features and 70% on the pixels" in str(choice)
    assert f"{evidence.images:,}" in choice.report()


def test_the_border_of_the_sizes():
    few, many = (choose(Evidence(10 * n, 10, 0.8, 0.7)) for n in (LARGE - 1, LARGE))
    assert (few.quadrant, many.quadrant) == ("small, similar", "large, similar")


def test_the_border_of_the_similarities():
    # 25 and 27 errors of 100 where pixels have 20, and 20 of 100 where they have none
    near, far, none = (choose(Evidence(200, 10, f, p)) for f, p in ((0.75, 0.8), (0.73, 0.8), (0.8, 1.0)))
    assert (near.quadrant, far.quadrant, none.quadrant) == ("small, similar", "small, different", "small, different")
    assert choose(Evidence(200, 10, 1.0, 1.0)).strategy == "features"


def test_auto_keeps_the_better_of_the_fitted_head_and_the_training_and_tells_why(capsys):
    module = ClassificationModule(DataSpec(num_classes=10, in_chans=1, image_size=12), Backbone("lenet5"))
    L.Trainer(**QUIET, max_epochs=6).fit(module, Digits8x8(image_size=12, batch_size=32, num_workers=0))
    save_file({key: value.contiguous() for key, value in module.backbone.state_dict().items()}, "lenet5.safetensors")
    common = [*FIT[:5], *FIT[7:], "--data.num_workers", "0", "--data.augmentation", "none", "--data.batch_size", "16",
              "--trainer.max_epochs", "4", "--model.backbone.options.architecture", "lenet5"]  # fmt: skip
    cases = {
        "rests": ["--data.train_per_class", "5", "--model.backbone", "lenet5.safetensors", "--model.optimization.lr", "1e-9"],
        "learns": ["--model.backbone", weights_file("lenet5", 12), "--model.optimization.lr", "0.01"],
    }  # fmt: skip

    def trained(transfer, name):
        args = [*common, *cases[name], "--model.backbone.transfer", transfer, "--output", f"{name}-{transfer}"]
        return classification([*args, "--register", name] if transfer == "auto" else args)

    def state(folder, file="last"):
        return torch.load(f"{folder}/{file}.ckpt", weights_only=True)

    for name in cases:
        alone = {s: trained(s, name).trainer.checkpoint_callback.best_model_score for s in ("features", "finetune")}
        capsys.readouterr()
        cli = trained("auto", name)
        said = capsys.readouterr().err
        first, kept = (f"{float(alone[s]):.4f}" for s in ("features", max(alone, key=alone.get)))
        assert f"The head on fixed features has val/accuracy {first}" in said
        run = MlflowClient().get_run(run_id_of(f"{name}-auto"))
        winner = "features" if alone["features"] >= alone["finetune"] else "finetune"
        assert run.data.tags["transfer"] == winner
        assert run.data.tags["quadrant"] in said
        assert cli.rows["transfer"].startswith(winner)
        assert kept in cli.rows["transfer"]
        report = Path(MlflowClient().download_artifacts(run.info.run_id, "transfer.md", name)).read_text()
        assert f"val/accuracy {first}" in report
        assert "(large from" in report
        # the training is that of `finetune`, bit for bit, and what is kept that of the better one
        for one, file in (("finetune", "last"), (winner, "best")):
            mine, theirs = (state(f"{name}-{each}", file)["state_dict"] for each in ("auto", one))
            assert [key for key in theirs if not torch.equal(mine[key], theirs[key])] == []
        assert {state(f"{name}-auto", file)["transfer"] for file in ("best", "last")} == {"finetune"}
        loaded = registry.load(cli.rows["registered"]).module.state_dict()
        model = MlflowClient().get_logged_model(MlflowClient().get_model_version(name, "1").source.split("/")[-1])
        figure = next(metric.value for metric in model.metrics if metric.key == "val/accuracy")
        assert figure == float(alone[winner]), "the model's page has the figure of what was kept"
        best = state(f"{name}-auto", "best")["state_dict"]
        assert [key for key in loaded if not torch.equal(loaded[key], best[key])] == []
        before = Path(f"{name}-auto/best.ckpt").stat().st_mtime_ns
        again = trained("auto", name)
        assert again.rows["transfer"] == cli.rows["transfer"]
        assert Path(f"{name}-auto/best.ckpt").stat().st_mtime_ns == before, "what is done is not done again"
    assert MlflowClient().get_run(run_id_of("rests-auto")).data.tags["transfer"] == "features"
    assert MlflowClient().get_run(run_id_of("learns-auto")).data.tags["transfer"] == "finetune"
    # a registered model is a backbone as any other
    again = classification(
        [*FIT, "--backbone", "models:/rests/1", "--model.backbone.transfer", "features", "--output", "two"]
    )
    assert again.rows["training"].endswith("1 epoch")


def test_auto_fine_tunes_where_there_are_too_many_images_for_a_head(monkeypatch, capsys):
    monkeypatch.setattr("pipelines.engine.transfer.SOLVED", 10 * 200 - 1)
    cli = classification([*FIT, "--trainer.max_epochs", "1", "--model.backbone", weights_file("lenet5", 12), "--output", "out",
                          "--model.backbone.options.architecture", "lenet5", "--model.backbone.transfer", "auto"])  # fmt: skip
    assert "200 images of 10 classes are too many" in capsys.readouterr().err
    assert (cli.model.strategy, "transfer" in cli.rows) == ("finetune", False)
    assert MlflowClient().get_run(run_id_of("out")).data.tags["transfer"] == "finetune"


def test_fine_tuning_that_an_earlier_version_began_keeps_its_rates():
    file = str(Path(weights_file("lenet5", 12)).resolve())
    args = [*FIT, "--data.num_workers", "0", "--data.train_per_class", "9", "--model.backbone", file,
            "--model.backbone.options.architecture", "lenet5"]  # fmt: skip
    falling = [*args, "--model.optimization.layer_decay", "0.5", "--output", "old"]
    classification([*falling, "--trainer.max_epochs", "1"])
    old = torch.load("old/last.ckpt", weights_only=True)
    old["recipe"]["fixed"] |= {"model.backbone.transfer": "finetune", "model.optimization.layer_decay": 1.0}
    for name in ("last", "best"):
        Path(f"old/{name}.ckpt").unlink()
        torch.save(old, f"old/{name}.ckpt")
    finetune = ["--model.backbone.transfer", "finetune", "--output", "old", "--trainer.max_epochs", "2"]
    groups = classification([*args, *finetune]).trainer.optimizers[0].param_groups
    assert len({group["initial_lr"] for group in groups}) > 2


def test_auto_lets_a_network_that_knows_nothing_learn():
    module, watch = small("auto"), Moved()
    L.Trainer(**QUIET, max_epochs=1, limit_val_batches=1, callbacks=[watch]).fit(module, data(train_per_class=5))
    assert module.strategy == "finetune"
    assert "backbone.conv1.0.weight" in watch.epochs[0]


@pytest.mark.parametrize(
    ("transfer", "backbone"),
    [("freeze_unfreeze", "test_resnet"), pytest.param("auto", "lenet5", marks=pytest.mark.slow)],
)
def test_a_killed_unfreezing_goes_on_and_ends_bit_identical(transfer, backbone):
    file = str(Path(weights_file(backbone, 12)).resolve())
    args = [*FIT, "--data.num_workers", "0", "--data.train_per_class", "9", "--data.batch_size", "30", "--model.backbone",
            file, "--data.augmentation", "light", "--model.backbone.options.architecture", backbone, "--model.backbone.transfer",
            transfer, "--trainer.max_epochs", "6", "--trainer.limit_val_batches", "1"]  # fmt: skip
    assert start(classification, [*args, "--output", "whole"]) == [0]
    kill = ["--trainer.callbacks+=faults.Kill", "--trainer.callbacks.step", "8"]  # in the third epoch, with layers open
    assert start(classification, [*args, *kill, "--output", "cut", "--checkpoint_seconds", "0"]) == [-signal.SIGKILL]
    chosen = "finetune" if transfer == "auto" else transfer
    assert torch.load("cut/last.ckpt", weights_only=True)["transfer"] == chosen
    assert start(classification, [*args, "--output", "cut", "--checkpoint_seconds", "0"]) == [0]
    for name in ("last", "best"):
        whole, cut = (torch.load(f"{each}/{name}.ckpt", weights_only=True)["state_dict"] for each in ("whole", "cut"))
        assert [key for key in whole if not torch.equal(whole[key], cut[key])] == []


def test_two_processes_unfreeze_only_where_ddp_allows_it_and_find_the_same_head():
    file = str(Path(weights_file("lenet5", 12)).resolve())
    known = ["--model.backbone", file, "--model.backbone.options.architecture", "lenet5"]
    both = [
        *known,
        "--trainer.devices",
        "2",
        "--data.num_workers",
        "0",
        "--trainer.max_epochs",
        "2",
        "--trainer.strategy",
    ]
    refused = [*FIT, *both, "ddp", "--model.backbone.transfer", "freeze_unfreeze", "--output", "refused"]
    assert start(classification, refused, 2) == [2, 2]
    free = [
        *FIT,
        *both,
        "ddp_find_unused_parameters_true",
        "--model.backbone.transfer",
        "freeze_unfreeze",
        "--output",
        "free",
    ]
    assert start(classification, free, 2) == [0, 0]
    two = [*FIT, *both, "ddp", "--model.backbone.transfer", "features", "--output", "two"]
    assert start(classification, two, 2) == [0, 0]
    classification([*FIT, *known, "--model.backbone.transfer", "features", "--output", "one"])
    one, other = (
        torch.load(f"{name}/best.ckpt", weights_only=True)["state_dict"]["head.weight"] for name in ("one", "two")
    )
    assert torch.allclose(one, other, rtol=0.01, atol=0.001 * float(one.abs().max()))
    auto = [
        *FIT,
        *both,
        "ddp",
        "--model.backbone.transfer",
        "auto",
        "--model.optimization.lr",
        "1e-9",
        "--output",
        "auto",
    ]
    assert start(classification, auto, 2) == [0, 0]
    kept = torch.load("auto/best.ckpt", weights_only=True)
    assert kept["global_step"] == 0
    assert torch.equal(kept["state_dict"]["head.weight"], other)


def test_a_detector_freezes_unfreezes_and_chooses_too():
    file = weights_file("resnet10t", 64)
    scenes = DigitScenes(scene_size=64, train=8, val=4, test=4, batch_size=4, augmentation="none", num_workers=0)

    def trained(transfer, epochs):
        torch.manual_seed(0)
        module, watch = (
            DetectionModule(
                DataSpec(num_classes=10, image_size=64), Backbone(file, options=options, transfer=transfer)
            ),
            Moved(),
        )
        L.Trainer(**QUIET, max_epochs=epochs, limit_val_batches=1, callbacks=[watch]).fit(module, scenes)
        return module, [{key for key in epoch if key.startswith("backbone.")} for epoch in watch.epochs]

    options = {"architecture": "resnet10t"}
    assert trained("auto", 1)[0].strategy == "finetune"
    module, moved = trained("freeze_unfreeze", 3)
    assert [bool(epoch) for epoch in moved] == [False, True, True]
    assert moved[1] < moved[2] or len(moved[1]) == len(moved[2])
    assert trained("features", 1)[1] == [set()]
    module, moved = trained("finetune", 1)
    assert {"backbone.conv1.0.weight", "backbone.layer4.0.conv2.weight"} <= moved[0]
    rates = {group["name"]: group["initial_lr"] for group in module.trainer.optimizers[0].param_groups}
    assert rates["backbone"] == rates["head"]


@pytest.mark.parametrize("task", ["segmentation", "instance_segmentation", "masked_autoencoding"])
def test_other_tasks_take_every_strategy_too(task):
    scenes = {
        "scene_size": 64,
        "train": 8,
        "val": 4,
        "test": 4,
        "batch_size": 4,
        "augmentation": "none",
        "num_workers": 0,
    }
    options = {"architecture": "resnet10t"}
    if task == "masked_autoencoding":
        options = {"architecture": "vit_tiny_patch16_224", "patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
        backbone = create_backbone("vit_tiny_patch16_224", in_chans=1, image_size=16, num_classes=10,
                                   **{key: value for key, value in options.items() if key != "architecture"})  # fmt: skip
        save_file(backbone.state_dict(), "source.safetensors")
        data = Digits8x8(image_size=16, augmentation="none", batch_size=32, num_workers=0)
    else:
        weights_file("resnet10t", 64)
        data = DigitMasks(**scenes) if task == "segmentation" else DigitScenes(**scenes, masks=True)
    makers = {
        "segmentation": lambda **given: built(SegmentationModule, num_classes=11, image_size=64, **given),
        "instance_segmentation": lambda **given: built(
            InstanceSegmentationModule,
            num_classes=10,
            image_size=64,
            detector=partial(MaskRCNN, width=16, hidden=16, mask_width=16),
            **given,
        ),
        "masked_autoencoding": lambda **given: built(
            MaskedAutoencodingModule, in_chans=1, image_size=16, decoder_dim=16, decoder_depth=1, **given
        ),
    }

    def moved(transfer):
        torch.manual_seed(0)
        module, watch = (
            makers[task](backbone="source.safetensors", backbone_options=dict(options), transfer=transfer),
            Moved(),
        )
        batches = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
        L.Trainer(**QUIET, **batches, callbacks=[watch]).fit(module, data)
        return module, {key for key in watch.epochs[0] if key.startswith("backbone.")}

    module, learned = moved("finetune")
    assert learned
    rates = {group["name"]: group["initial_lr"] for group in module.trainer.optimizers[0].param_groups}
    assert rates["backbone"] == rates["head"]
    assert moved("features")[1] == set()
    assert moved("freeze_unfreeze")[1] == set()
    assert moved("scratch")[1]
    if task == "segmentation":
        assert moved("auto")[0].strategy == "finetune"


def test_every_task_with_one_backbone_takes_a_strategy_and_can_be_compiled():
    for name in modules.__all__:
        kind = getattr(modules, name)
        if isinstance(kind, type) and issubclass(kind, VisionModule) and kind is not VisionModule:
            taken = inspect.signature(kind).parameters
            assert isinstance(taken["backbone"].default, Backbone), name
            if issubclass(kind, AdversarialModule):
                with pytest.raises(BackboneError, match=r"--model\.backbone\.transfer finetune"):
                    built(kind, label_names=["a", "b"], image_size=32, transfer="finetune")


def test_so_many_images_a_class():
    whole, part, less = data(), data(train_per_class=20), data(train_per_class=5)
    assert (np.bincount(part.sources["train"].labels) == 20).all()
    assert len(part.sources["val"]) == len(whole.sources["val"])

    def rows(module):
        return {image.tobytes() for image in module.sources["train"].images}

    assert rows(less) < rows(part) < rows(whole)
    assert rows(data(train_per_class=5, seed=1)) != rows(less)
    with pytest.raises(DataError, match="fewer than --data"):
        _ = data(train_per_class=500).sources
    with pytest.raises(DataError, match="at least 1"):
        _ = data(train_per_class=0).sources


def test_a_plain_look_at_data_takes_each_sample_once():
    module = data(augmentation="strong", train_per_class=7)
    batches = list(module.plain_loader("train"))
    assert sum(len(batch["label"]) for batch in batches) == 70
    few = [torch.cat([batch["image"] for batch in module.plain_loader("train", 40)]) for _ in range(2)]
    assert torch.equal(*few)
    assert len(few[0]) == 40
    everything = {image.numpy().tobytes() for batch in batches for image in batch["image"]}
    assert {image.numpy().tobytes() for image in few[0]} <= everything


@pytest.mark.parametrize("name", ["resnet10t", "lenet5", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_stages_are_those_of_timms_own_maps(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, in_chans=1, image_size=32).eval()
    stages, image = Stages(backbone), torch.randn(2, 1, 32, 32)
    numbers = stages(image)
    found = dict(zip(stages.widths, numbers.split(list(stages.widths.values()), 1), strict=True))
    assert torch.equal(found["image"], image.flatten(1))  # 32×32 are just the thousand numbers
    assert torch.equal(found["answer"], backbone(image))
    maps = create_backbone(name, in_chans=1, image_size=32, features_only=True)
    if name != "vit_tiny_patch16_224":
        assert len(found) == len(maps.feature_info.channels()) + 2
    if name == "resnet10t":
        last = backbone.forward_intermediates(image, intermediates_only=True)[-1]
        assert last.shape[1:] == (512, 2, 2)
        assert torch.allclose(found["layer4"], last.mean((2, 3)), atol=1e-6)


def test_the_command_draws_accuracy_against_depth(capsys):
    file = weights_file("lenet5", 12)
    command(transferability, ["--backbone", file, "--backbone_options", json.dumps({"architecture": "lenet5"}), "--data", "Digits8x8",
                  "--data.image_size", "12", "--images", "300", "--output", "drawn"])  # fmt: skip
    assert Path("drawn/transferability.png").stat().st_size > 5000
    said = capsys.readouterr().out
    run = MlflowClient().search_runs([MlflowClient().get_experiment_by_name("transfer").experiment_id])[0]
    steps = MlflowClient().get_metric_history(run.info.run_id, "probe/learned")
    assert [metric.step for metric in steps] == [0, 1, 2, 3]
    assert run.info.run_id in said
    assert f"{steps[0].value:.3f}" in said
    source = data(image_size=12)
    network = ClassificationModule(
        DataSpec(num_classes=10, in_chans=1, image_size=12), Backbone(file, options={"architecture": "lenet5"})
    )
    parts = [
        extract(network.backbone, source.plain_loader(split, 300), network.normalize) for split in ("train", "val")
    ]
    assert steps[-1].value == pytest.approx(probe(*parts))
    with pytest.raises(SystemExit) as end:
        command(transferability, ["--backbone", "lenet6", "--data", "Digits8x8"])
    assert end.value.code == 2


def test_an_untrained_twin_has_the_same_shape_and_other_weights():
    for features_only in (False, True):
        model = create_backbone("resnet10t", image_size=32, features_only=features_only)
        twin = untrained(model, 3, 32)
        same = {key: value.shape for key, value in model.state_dict().items()}
        assert same == {key: value.shape for key, value in twin.state_dict().items()}
        assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
