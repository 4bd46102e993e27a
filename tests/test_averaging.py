"""The average of a training's best checkpoints."""

import math
from pathlib import Path

import pytest
import torch
from test_evaluation import DIGITS, refused, run

from modules import ClassificationModule
from modules.checkpoints import read_checkpoint
from modules.training_data import settings_of
from pipelines.classification import classification
from pipelines.engine.averaging import average_best, mean_of
from pipelines.engine.checkpoint import KeptCheckpoints
from pipelines.gan import gan

SMALL = [*DIGITS, "--data.train_per_class", "30", "--data.batch_size", "150", "--data.num_workers", "0", "--backbone", "test_resnet",
         "--trainer.max_epochs", "3", "--output", "out"]  # fmt: skip


def test_weights_are_averaged_and_counters_are_not() -> None:
    one, two = ({"w": torch.tensor([w, 0.5]), "n": torch.tensor(n)} for w, n in ((1.0, 3), (2.0, 4)))
    assert {key: value.tolist() for key, value in mean_of([one, two]).items()} == {"w": [1.5, 0.5], "n": 3}


def test_an_average_is_kept_where_validation_finds_it_better_with_norms_that_fit_it() -> None:
    cli = classification(["fit", *SMALL, "--keep_best", "3", "--average", "uniform"])
    (kept,) = (one for one in settings_of(cli.trainer).callbacks if isinstance(one, KeptCheckpoints))
    assert len(kept.files) == 3
    saved = [read_checkpoint(file)["state_dict"] for file in kept.files]
    better = Path("out/average.ckpt").exists()
    assert cli.rows["checkpoint"] == ("out/average.ckpt" if better else "out/best.ckpt")
    assert run("out").data.tags["average"] == cli.rows["average"]

    cli.trainer.loggers = []  # the run has ended
    parts = (cli.trainer, cli.model, cli.datamodule, kept, kept.best)
    ranks = kept.ranks
    kept.ranks = dict.fromkeys(ranks, (math.inf, 0.0))
    for way in ("uniform", "greedy"):
        file, said = average_best(*parts, way)
        assert file is None
        assert "the best alone is kept" in said
        assert not Path("out/average.ckpt").exists(), "nor one of before"
    kept.ranks = dict.fromkeys(ranks, (-1.0, 0.0))  # than which any average is better
    file, said = average_best(*parts, "uniform")
    assert file == Path("out/average.ckpt")
    assert said.startswith("3 of 3 checkpoints")
    module = ClassificationModule.load_from_checkpoint(file)
    weight = "backbone.conv1.0.weight"
    assert torch.allclose(module.state_dict()[weight], torch.stack([one[weight] for one in saved]).mean(0))
    norm, seen = module.backbone.bn1, []
    norm.register_forward_pre_hook(lambda part, given: seen.append(given[0].mean((0, 2, 3))))
    with torch.no_grad():
        for batch in cli.datamodule.plain_loader("train"):
            module(batch["image"])
    assert torch.allclose(norm.running_mean, torch.stack(seen).mean(0), atol=1e-4)
    assert not torch.allclose(norm.running_mean, saved[0]["backbone.bn1.running_mean"], atol=1e-4)
    assert f"{float(cli.trainer.callback_metrics['val/accuracy']):.4f}, " in said
    assert Path("out/kept").is_dir()
    before = {file: file.read_bytes() for file in (*Path("out/kept").iterdir(), Path("out/average.ckpt"))}
    rows = classification(["fit", *SMALL, "--trainer.max_epochs", "4"]).rows  # which asks for the best alone
    assert rows["of an earlier command"].startswith("kept and average.ckpt")
    assert {file: file.read_bytes() for file in before} == before


def test_after_a_training_with_averaged_weights_those_at_hand_are_measured() -> None:
    cli = classification(["fit", *SMALL, "--model.optimization.ema_decay", "0.5"])
    cli.trainer.loggers = []
    with torch.no_grad():
        cli.model.head.weight.zero_()
        cli.model.head.bias.zero_()
    (nothing,) = cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
    assert nothing["val/loss"] == pytest.approx(math.log(10), abs=1e-4)


def test_an_average_of_one_and_of_adversaries_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --keep_best 5" in refused(["fit", *DIGITS, "--average", "greedy"], capsys)
    assert "--keep_best" in refused(["fit", *DIGITS, "--keep_best", "0"], capsys)
    with pytest.raises(SystemExit) as end:
        gan(["fit", "--data", "Digits8x8", "--trainer.max_epochs", "1", "--keep_best", "2", "--average", "uniform"])
    assert end.value.code == 2
    assert "trains several against each other" in capsys.readouterr().err
