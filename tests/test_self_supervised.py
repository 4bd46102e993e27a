import math
import warnings

import lightning as L
import numpy as np
import pytest
import torch

from datamodules import Digits8x8
from modules import Backbone, DataSpec, Optimization, SelfSupervisedModule, create_backbone
from modules.measures.features import effective_rank, neighbours
from modules.self_supervised import DINO, VICReg
from modules.self_supervised import module as task
from modules.self_supervised.module import Teacher
from pipelines.self_supervised import self_supervised
from pipelines.serving import evaluation, registry

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
         "accelerator": "cpu", "use_distributed_sampler": False}  # fmt: skip


def own(values):
    return values


def digits(**options):
    return Digits8x8(image_size=16, batch_size=32, num_workers=0, **options)


def small(method, **options):
    return SelfSupervisedModule(DataSpec(1, 16, 10), Backbone("test_resnet"), Optimization(**options), method)


def test_dino_s_loss_is_the_mean_cross_entropy_of_pairs_of_different_views():
    method = DINO(prototypes=2, hidden=4, student_temperature=1, teacher_temperature=0.5, local_views=1)
    method.build(3)
    even, first, second = [0.0, 0.0], [math.log(3), 0.0], [0.0, math.log(3)]
    views = [torch.tensor([row]) for row in (even, second, even)]
    taught = [torch.tensor([row]) for row in (first, even)]
    # The teacher's temperature of 0.5 makes 9/10 of 3/4. It is compared with views 2 and 3, then with views 1 and 3.
    sharp = -(0.9 * math.log(0.25) + 0.1 * math.log(0.75))
    losses = method.losses(views, taught, own)
    assert losses.total.item() == pytest.approx((sharp + 3 * math.log(2)) / 4)
    entropy = (-(0.9 * math.log(0.9) + 0.1 * math.log(0.1)) + math.log(2)) / 2
    assert losses.figures["entropy"].item() == pytest.approx(entropy)
    assert losses.figures["kl"].item() == pytest.approx(losses.total.item() - entropy)
    assert method.centre.tolist() == pytest.approx([0.1 * math.log(3) / 2, 0])
    # Centred by what is there now, the teacher says less of the first.
    assert method.losses(views, taught, own).total.item() != pytest.approx(losses.total.item())


def test_vicreg_s_loss_has_three_terms():
    method = VICReg(size=2, invariance=25, variance=25, covariance=1)
    one = torch.tensor([[0.0, 0.0], [2.0, 2.0]])  # variances 2, covariance 2
    other = torch.tensor([[0.0, 0.5], [1.0, 0.5]])  # variances 1/2 and 0, covariance 0
    terms = {name: value.item() for name, value in method.losses([one, other], [], own).terms.items()}
    assert terms["invariance"] == pytest.approx(25 * (0.25 + 1 + 2.25) / 4)
    assert terms["variance"] == pytest.approx(25 * ((1 - math.sqrt(0.5001)) + 0.99) / 2 / 2)
    assert terms["covariance"] == pytest.approx((2 * 2**2) / 2)


def test_the_teacher_s_momentum_rises_to_one():
    teacher = Teacher(0.996)
    teacher.total = 100
    assert [teacher.decay_at(step) for step in (0, 50, 100, 101)] == pytest.approx([0.996, 0.998, 1, 1])


@pytest.mark.parametrize("method", [DINO(64, 32, 16), VICReg(16)])
def test_a_constant_output_is_told_while_it_trains(method, monkeypatch):
    monkeypatch.setattr(task, "GRACE", 3)
    module = small(method, lr=1e-9)
    for parameter in module.backbone.parameters():
        torch.nn.init.zeros_(parameter)
    trainer = L.Trainer(**QUIET, max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="The representation collapses: in epoch 1 (the teacher's output|all images)"):
        trainer.fit(module, digits())


def test_a_flat_representation_is_told_and_a_sound_one_is_not(monkeypatch):
    monkeypatch.setattr(task, "GRACE", 0)
    trainer = L.Trainer(**QUIET, max_epochs=1, limit_train_batches=2, limit_val_batches=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The representation collapses")
        trainer.fit(small(VICReg(16)), digits())
        monkeypatch.setattr(task, "FLAT", 1000)
        with pytest.raises(UserWarning, match="effective rank"):
            L.Trainer(**QUIET, max_epochs=1, limit_train_batches=2, limit_val_batches=0).fit(
                small(VICReg(16)), digits()
            )


def test_views_depend_on_seed_epoch_and_index_alone():
    data, same, other = digits(seed=1), digits(seed=1), digits(seed=2)
    for each in (data, same, other):
        small(DINO(4, 4, 4, local_views=3, local_size=8)).prepare(each)
    (one, again, foreign), keys = ((each.dataset("train", True) for each in (data, same, other)), [(5, 2), (9, 2)])
    sample, batch = one[5, 2], same.loader("train").dataset.load(keys)
    assert [view.shape for view in (sample["image"], *sample["views"])] == [(16, 16, 1)] * 2 + [(8, 8, 1)] * 3
    for view, twin in zip(sample["views"], again[5, 2]["views"], strict=True):
        np.testing.assert_array_equal(view, twin)
    assert [len(view) for view in batch["views"]] == [2] * 4
    unlike = [one[5, 3]["views"], one[6, 2]["views"], foreign[5, 2]["views"], sample["views"][1:]]
    for views in unlike:
        assert any(
            view.shape == own.shape and (view != own).any() for view, own in zip(views, sample["views"], strict=False)
        )
    assert "views" not in data.dataset("val", False)[0, 0]


def test_rank_and_neighbours():
    spread = torch.randn(500, 6, generator=torch.Generator().manual_seed(0))
    assert 5.8 < effective_rank(spread) <= 6
    assert effective_rank(torch.full((40, 8), 3.7)) == pytest.approx(1)
    # One close picture outweighs two that are further away, whatever their lengths.
    known = np.array([[1.0, 0.02], [0.0, 1.0], [0.1, 0.9]]) * [[5.0], [1.0], [1.0]]
    assert neighbours((known, np.array([0, 1, 1])), (np.array([[1.0, 0.0]]), np.array([0]))) == 1


def test_the_registered_backbone_is_the_teacher_and_starts_other_tasks():
    args = ["--data", "Digits8x8", "--data.image_size", "16", "--model.backbone", "test_resnet", "--trainer.accelerator", "cpu",
            "--trainer.enable_progress_bar", "false", "--trainer.limit_train_batches", "3", "--trainer.max_epochs", "1"]  # fmt: skip
    cli = self_supervised(
        ["fit", *args, "--output", "out", "--register", "seen-unlabelled", "--model.optimization.ema_decay", "0.5"]
    )
    checkpoint = torch.load("out/best.ckpt", weights_only=True)
    student, teacher = checkpoint["current_model_state"], checkpoint["state_dict"]
    key = "backbone.conv1.weight" if "backbone.conv1.weight" in teacher else next(iter(teacher))
    assert not torch.equal(student[key], teacher[key])
    assert {"test/knn", "test/probe", "test/rank"} <= cli.rows.keys()
    again = evaluation.evaluate(registry.model_folder("models:/seen-unlabelled/1"), accelerator="cpu")
    assert again.keys() == {"test/knn", "test/probe", "test/rank"}  # of its features, as it has no projection
    assert again["test/knn"] == pytest.approx(float(cli.rows["test/knn"]), abs=1e-3)
    backbone = create_backbone("models:/seen-unlabelled/1", in_chans=1, image_size=16)
    assert torch.equal(backbone.state_dict()[key.removeprefix("backbone.")], teacher[key])
    registered = registry.load("models:/seen-unlabelled/1").module.backbone.state_dict()
    assert torch.equal(registered[key.removeprefix("backbone.")], teacher[key])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--data", "DigitScenes"], "samples have no label"),
        (["--model.backbone", "vit_tiny_patch16_224"], "dynamic_img_size"),
        (["--model.backbone", "convnet"], "--model.method.local_size 16"),
        (["--model.method", "DINO", "--model.method.least", "0.5"], "least of a part"),
        (["--model.method", "VICReg", "--data.batch_size", "1"], "at least 2"),
        (["--data.image_size", "16x24"], "takes square images: --data.image_size 16"),
        (["--model.method", "BYOL"], "BYOL"),
        (["--model.method", "dino"], "Did you mean DINO?"),
        (["--model.method", "DINO", "--model.method.local_size", "17"], "--model.method.local_size 17 is more"),
        (["--model.method.local_views", "2"], "There is no --model.method.local_views before --model.method is named"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_a_paragraph(args, said, capsys):
    data = [] if "--data" in args else ["--data", "Digits8x8", "--data.image_size", "16"]
    with pytest.raises(SystemExit) as end:
        self_supervised(["fit", *data, "--model.backbone", "test_resnet", "--trainer.accelerator", "cpu",
                         "--trainer.enable_progress_bar", "false", *args])  # fmt: skip
    message = capsys.readouterr().err
    assert end.value.code == 2
    assert said in message
    assert "Traceback" not in message
