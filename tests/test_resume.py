"""A training that ends at whatever moment, and goes on, comes to what it would have come to."""

import contextlib
import json
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faults
import lightning as L
import numpy as np
import pytest
import tifffile
import torch
from conftest import start
from mlflow.tracking import MlflowClient
from test_contract import QUIET, TASKS, Case

from pipelines.autoencoding import autoencoding
from pipelines.classification import classification
from pipelines.engine.checkpoint import BestCheckpoint, KeptCheckpoints
from pipelines.engine.trainer import VisionTrainer
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of

DIGITS = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--data.num_workers", "0", *QUIET]
SMALL = [
    *DIGITS,
    "--data.train_per_class",
    "30",
    "--data.batch_size",
    "100",
    "--trainer.log_every_n_steps",
    "1",
    "--trainer.max_epochs",
    "2",
]  # of three steps each
SHORT = [*SMALL, "--data.batch_size", "150"]  # of two
POINTS = ["--trainer.callbacks+=faults.Points", "--trainer.callbacks.folder"]
VARIANTS = {
    "plain": [],
    "seldom checkpoints": ["--checkpoint_seconds", "300"],
    "validation in mid-epoch": ["--trainer.val_check_interval", "1"],
    "validation in mid-accumulation": ["--trainer.val_check_interval", "1", "--trainer.accumulate_grad_batches", "2"],
    "validation each second epoch": ["--trainer.check_val_every_n_epoch", "2"],
    "validation by steps": ["--trainer.check_val_every_n_epoch", "null", "--trainer.val_check_interval", "2"],
    "a number of steps": ["--trainer.max_steps", "5", "--trainer.max_epochs", "-1"],
    "part of an epoch": ["--trainer.limit_train_batches", "2"],
    "averaged weights": ["--model.optimization.ema_decay", "0.9"],
    "a plateau": ["--model.optimization.lr_scheduler", "lightning.pytorch.cli.ReduceLROnPlateau", "--model.optimization.lr_scheduler.monitor",
                  "val/loss", "--model.optimization.lr_scheduler.patience", "0", "--model.optimization.lr_scheduler.threshold", "9",
                  "--trainer.max_epochs", "3"],
    "the best are kept and averaged": ["--trainer.val_check_interval", "1", "--keep_best", "3", "--average", "greedy",
                                       "--model.optimization.ema_decay", "0.9"],
    "the loader's workers": ["--data.num_workers", "2"],
}  # fmt: skip


def content(file: str) -> dict[str, Any]:
    """All that a checkpoint holds, by its place; without the names of folders."""

    def walk(value: Any, place: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                key = "best" if str(key).endswith("best.ckpt") else key
                yield from walk(inner, f"{place}/{key}")
        elif not place.endswith(("path", "dirpath")) and "/recipe/settings/" not in place:
            yield place, value.tolist() if isinstance(value, torch.Tensor) else value

    return dict(walk(torch.load(file, weights_only=True), ""))


def different(a: str, b: str) -> list[str]:
    """Where two checkpoints are not the same; a NaN is the same as another."""
    one, two = content(a), content(b)
    return [key for key in one.keys() | two.keys() if repr(one.get(key, "none")) != repr(two.get(key, "none"))]


def measured(output: str) -> Counter[Any]:
    """All that MLflow has of a training, but for what the machine did."""
    client, run_id = MlflowClient(), run_id_of(output)
    keys = [k for k in client.get_run(run_id).data.metrics if not k.startswith("system/") and "per_second" not in k]
    found = Counter((key, m.step, m.value) for key in keys for m in client.get_metric_history(run_id, key))
    files = [file.path for file in client.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    found.update(tuple(Path(file).name.split("+")[:3:2]) for file in files)
    return found


def registered(name: str) -> dict[str, torch.Tensor]:
    """Weights of the newest version."""
    (newest, *_) = MlflowClient().search_model_versions(f"name='{name}'", order_by=["version_number DESC"])
    return registry.load(f"models:/{name}/{newest.version}").module.state_dict()


def with_a_run_of_its_own(folder: Path, output: str) -> None:
    """What a kill at this moment would have left: a copy of the folder, of which MLflow has nothing yet."""
    shutil.copytree(folder, output)
    run = json.loads(Path(output, "run.json").read_text())
    Path(output, "run.json").write_text(json.dumps(run | {"run_id": MlflowClient().create_run("0").info.run_id}))
    Path(output, "journal.sent").unlink(missing_ok=True)


def same(output: str) -> bool:
    kept = {str(file.relative_to("whole")) for file in Path("whole").rglob("*.ckpt")}
    assert kept == {str(file.relative_to(output)) for file in Path(output).rglob("*.ckpt")}
    for file in kept:
        assert different(f"whole/{file}", f"{output}/{file}") == []
    assert measured(output) == measured("whole")
    assert MlflowClient().get_run(run_id_of(output)).info.status == "FINISHED"
    return True


def killed(task: Case, args: list[str], every: bool) -> int:
    """Trains, and goes on from what a kill at each moment would have left: from all that differs in anything, or else from
    the last of the moments that left the same checkpoints. Returns the number of moments."""
    names: list[str] = []

    def keep(number: int, name: str) -> None:
        names.append(name)
        shutil.copytree("whole", f"at/{number}")

    faults.Points.act = keep
    try:
        task.command([*args, "--output", "whole", *POINTS, "whole"])
    finally:
        faults.Points.act = None
    kept: dict[Any, Path] = {}
    for number in range(len(names)):
        folder = Path("at", str(number))
        files = (
            [folder / "last.ckpt", folder / "best.ckpt", *sorted(folder.glob("kept/*"))]
            if not every
            else sorted(folder.rglob("[!.]*"))
        )
        left = [(f.name, f.read_bytes()) for f in files if f.is_file() and f.name != "journal.sent"]
        kept[tuple(left)] = folder
    for folder in kept.values():
        with_a_run_of_its_own(folder, f"from-{folder.name}")
        task.command([*args, "--output", f"from-{folder.name}"])
        assert same(f"from-{folder.name}"), names[int(folder.name)]
    return len(names)


def stopped(task: Case, args: list[str], output: str, at: int, name: str = "SIGTERM") -> bool:
    """Trains until a signal comes at a moment; returns whether it did."""
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(SystemExit):
        task.command([*args, "--output", output, *POINTS, output, "--trainer.callbacks.at", str(at),
                      "--trainer.callbacks.signal_name", name])  # fmt: skip
        return False
    assert signal.getsignal(signal.SIGTERM) == before
    return True


def test_a_kill_at_whatever_moment_changes_nothing() -> None:
    count = killed(TASKS["classification"], [*SHORT, "--checkpoint_seconds", "0"], every=False)
    assert count >= 2 * 2 * 4 + 2 * 5


def test_a_stop_in_each_step_and_validation_of_one_training_changes_nothing() -> None:
    task = TASKS["classification"]
    task.command([*SHORT, "--output", "whole", "--register", "whole"])
    stops = 0
    while stopped(task, [*SHORT, "--register", "cut"], "cut", at=2 if stops else 0):
        stops += 1
        assert MlflowClient().get_run(run_id_of("cut")).info.status == "KILLED"
    assert stops >= 2 * 2
    assert same("cut")
    one, two = registered("whole"), registered("cut")
    assert all(torch.equal(one[key], two[key]) for key in one | two)


def random(name: str) -> tuple[Case, list[str]]:
    """A small training of a task with all its randomness."""
    task = TASKS[name]
    return task, ["fit", *task.small, *QUIET, *task.random, "--data.num_workers", "0", "--trainer.max_epochs", "2",
                  "--trainer.limit_train_batches", "3", "--trainer.log_every_n_steps", "1", "--checkpoint_seconds", "0"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_kill_at_every_moment_of_every_task_changes_nothing(name: str) -> None:
    task, args = random(name)
    assert killed(task, args, every=True) >= 2 * 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_a_stop_at_every_moment_of_every_task_changes_nothing(name: str) -> None:
    task, args = random(name)
    task.command([*args, "--output", "whole"])
    at = 0
    while stopped(task, args, f"cut-{at}", at):
        task.command([*args, "--output", f"cut-{at}"])
        assert same(f"cut-{at}")
        at += 1
    assert at >= 2 * 3 * 3


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_a_kill_in_every_kind_of_training_changes_nothing(variant: list[str]) -> None:
    args = [*SMALL, "--checkpoint_seconds", "0", "--model.backbone.options.drop_rate", "0.3", *variant]
    assert killed(TASKS["classification"], args, every=False) > 10


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGKILL", -9), ("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_at_every_moment_changes_nothing(name: str, code: int) -> None:
    args = [*SMALL, "--checkpoint_seconds", "0"]
    assert start(classification, [*args, "--output", "whole"]) == [0]
    for at in range(1000):
        fault = [*POINTS, f"cut-{at}", "--trainer.callbacks.at", str(at), "--trainer.callbacks.signal_name", name]
        end = start(classification, [*args, "--output", f"cut-{at}", *fault])
        if end == [0]:
            break
        assert end == [code]
        assert start(classification, [*args, "--output", f"cut-{at}"]) == [0]
        assert same(f"cut-{at}")
    assert at > 2 * 3 * 4


@pytest.mark.slow
def test_two_processes_that_are_killed_go_on_to_the_same() -> None:
    both = [*SMALL, "--data.batch_size", "50", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    assert start(classification, [*both, "--output", "whole"], 2) == [0, 0]
    kill = ["--trainer.callbacks+=faults.Kill", "--trainer.callbacks.step", "4"]
    assert start(classification, [*both, "--output", "cut", *kill], 2) == [-9, -9]
    assert start(classification, [*both, "--output", "cut"], 2) == [0, 0]
    assert same("cut")


HOOKS = ["on_test_batch_end", "on_train_end", "on_fit_start", "on_train_batch_start", "on_validation_batch_end", "on_test_start",
         "on_test_end"]  # fmt: skip
QUICK = [("on_test_batch_end", "SIGTERM"), ("on_train_end", "SIGTERM"), ("on_fit_start", "SIGINT")]
SIGNALS = [
    pytest.param(h, n, marks=[] if (h, n) in QUICK else pytest.mark.slow) for h in HOOKS for n in ("SIGTERM", "SIGINT")
]


@pytest.mark.usefixtures("_interruptible")
@pytest.mark.parametrize(("hook", "name"), SIGNALS)
def test_a_signal_ends_a_command_wherever_it_is(hook: str, name: str) -> None:
    """Also after the last step, and in the test: the run is told, and the same command does what is left."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    command = [*SMALL, "--output", "out", "--register", f"{hook}-{name}"]
    with pytest.raises(SystemExit) as end:
        classification(command, [faults.Send(hook, name)])
    assert end.value.code == (143 if name == "SIGTERM" else 130)
    assert {number: signal.getsignal(number) for number in before} == before
    assert MlflowClient().get_run(run_id_of("out")).info.status == "KILLED"
    assert classification(command).rows["registered"] == f"models:/{hook}-{name}/1"
    run = MlflowClient().get_run(run_id_of("out"))
    assert run.info.status == "FINISHED"
    assert "error" not in run.data.tags
    assert len(MlflowClient().get_metric_history(run.info.run_id, "test/accuracy")) == 1


def test_a_signal_ends_an_evaluation(trained: Path) -> None:
    for verb, tracked in (("test", True), ("validate", True), ("predict", False)):
        hook = f"on_{'validation' if verb == 'validate' else verb}_batch_end"
        command = [
            verb,
            "--ckpt_path",
            str(trained / "best.ckpt"),
            "--output",
            verb,
            "--trainer.enable_progress_bar=false",
        ]
        with pytest.raises(SystemExit) as end:
            classification([*command, *([] if tracked else ["--trainer.logger=false"])], [faults.Send(hook)])
        assert end.value.code == 143
        assert not tracked or MlflowClient().get_run(run_id_of(verb)).info.status == "KILLED"


def rates(output: str) -> dict[int, float]:
    client, run_id = MlflowClient(), run_id_of(output)
    return {metric.step: metric.value for metric in client.get_metric_history(run_id, "lr")}


def test_more_epochs_and_another_rate_are_taken_up(capsys: pytest.CaptureFixture[str]) -> None:
    classification([*SMALL, "--trainer.max_epochs", "4", "--output", "at-once"])
    classification([*SMALL, "--output", "bit-by-bit"])
    last = torch.load("bit-by-bit/last.ckpt", weights_only=True)
    for new in ("data.init_args.flip", "model.label_smoothing", "model.backbone.compile", "trainer.max_time"):
        last["recipe"]["settings"].pop(new, None)  # as a version that did not have these
    torch.save(last, "bit-by-bit/last.ckpt")
    capsys.readouterr()
    longer = ["--trainer.max_epochs", "4", "--model.label_smoothing", "0.01"]
    more = classification([*SMALL, "--output", "bit-by-bit", *longer]).rows["training"]
    said = capsys.readouterr()
    changed = "Changed since then: model.label_smoothing is 0.01 (was not set); trainer.max_epochs is 4 (was 2).\n"
    assert changed in said.err
    assert "computed anew over 12 steps instead of 6: from step 6 on" in said.out
    assert "s since it went on, 4 epochs" in more
    assert [rates("bit-by-bit")[step] for step in range(6, 12)] == [rates("at-once")[step] for step in range(6, 12)]
    also = ["--trainer.max_epochs", "5", "--model.optimization.lr", "0.01", "--model.optimization.lr_scheduler",
            "modules.optimization.WarmupCosine", "--model.optimization.lr_scheduler.final", "0.5"]  # fmt: skip
    classification([*SMALL, "--output", "bit-by-bit", *also])
    classification([*SMALL, "--output", "anew", *also])
    assert [rates("bit-by-bit")[step] for step in range(12, 15)] == [rates("anew")[step] for step in range(12, 15)]


def test_a_schedule_by_epochs_takes_up_another_rate() -> None:
    steps = ["--model.optimization.lr_scheduler", "torch.optim.lr_scheduler.StepLR", "--model.optimization.lr_scheduler.step_size",
             "1", "--model.optimization.lr_scheduler.gamma", "0.5", "--output", "out"]  # fmt: skip
    classification([*SMALL, *steps, "--model.optimization.lr", "0.01"])
    classification([*SMALL, *steps, "--model.optimization.lr", "0.1", "--trainer.max_epochs", "4"])
    assert [rates("out")[step] for step in (0, 3, 6, 9)] == pytest.approx([0.01, 0.005, 0.025, 0.0125])


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        (["--model.optimization.optimizer", "SGD"], "--model.optimization.optimizer AdamW, and this command says SGD"),
        (["--data.batch_size", "30"], "100, and this command says 30"),
        (["--data.train_per_class", "29"], "was trained on other data: the train split"),
        (["--data.crop_pct", "0.5"], "--data.crop_pct 1.0, and this command says 0.5"),
        (["--data.sampling", "sqrt"], "--data.sampling none, and this command says sqrt"),
        (["--seed_everything", "1"], "--seed_everything 0, and this command says 1"),
        (["--model.optimization.ema_decay", "0.9"], "--model.optimization.ema_decay"),
        (["--trainer.accumulate_grad_batches", "2"], "--trainer.accumulate_grad_batches"),
        (["--trainer.max_epochs", "1"], "2 epochs, more than --trainer.max_epochs 1"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_change_within_a_training_is_refused_by_name(
    trained: Path, changed: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()}
    with pytest.raises(SystemExit) as end:
        classification([*SMALL, "--output", str(trained), "--trainer.max_epochs", "3", *changed])
    assert end.value.code == 2
    assert told in capsys.readouterr().err
    assert {file: file.read_bytes() for file in trained.rglob("*") if file.is_file()} == before
    assert MlflowClient().get_run(run_id_of(trained)).info.status == "FINISHED"


def test_bands_in_another_order_are_another_training(capsys: pytest.CaptureFixture[str]) -> None:
    """Also where their means were given, and are all the same."""
    for number in range(12):
        Path(f"bands/{number % 2}").mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 4096, (8, 8, 2)).astype(np.uint16)
        tifffile.imwrite(f"bands/{number % 2}/{number}.tif", pixels, photometric="minisblack", planarconfig="contig")
    same = ["fit", "--data", "ImageFolder", "--data.root", "bands", "--data.image_size", "16", "--data.mean", "[900, 900]",
            "--data.std", "[500, 500]", "--backbone", "lenet5", "--trainer.logger", "false", "--output", "out"]  # fmt: skip
    classification([*same, "--data.bands", "[1, 2]", "--trainer.max_epochs", "1"])
    with pytest.raises(SystemExit):
        classification([*same, "--data.bands", "[2, 1]", "--trainer.max_epochs", "2"])
    assert "with --data.bands [1, 2], and this command says [2, 1]" in " ".join(capsys.readouterr().err.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    classification([*SMALL, "--output", str(folder)])
    return folder


def test_a_folder_that_was_moved_keeps_its_best_and_its_run() -> None:
    classification([*SMALL, "--output", "here"])
    run_id, best = run_id_of("here"), Path("here/best.ckpt").read_bytes()
    Path("here").rename("moved")
    classification([*SMALL, "--output", "moved", "--model.optimization.lr", "100", "--trainer.max_epochs", "3"])
    assert Path("moved/best.ckpt").read_bytes() == best
    assert run_id_of("moved") == run_id
    assert max(rates("moved")) == 8


def test_a_copy_of_a_folder_goes_on_in_a_run_of_its_own(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Which has all that the original had; that stays as it was, also where both go on."""
    client, original = MlflowClient(), run_id_of(trained)
    run, history = client.get_run(original), measured(str(trained))
    shutil.copytree(trained, "copy")
    longer = [*SMALL, "--output", "copy", "--trainer.max_epochs", "3"]
    classification(longer)
    assert f"copy is a copy of {trained}" in " ".join(capsys.readouterr().err.split())
    copied = run_id_of("copy")
    assert copied != original
    assert client.get_run(copied).data.tags["copy_of"] == original
    assert sorted(rates("copy")) == list(range(9))
    assert sorted(rates(str(trained))) == list(range(6))
    again = client.get_run(original)
    assert (again.info.status, again.info.end_time, again.data.tags) == ("FINISHED", run.info.end_time, run.data.tags)
    assert measured(str(trained)) == history
    classification(longer)
    assert run_id_of("copy") == copied


def test_a_finished_command_that_is_given_again_neither_trains_nor_registers_again() -> None:
    stop = ["--trainer.callbacks+=lightning.pytorch.callbacks.EarlyStopping", "--trainer.callbacks.monitor", "val/loss",
            "--trainer.callbacks.patience", "1", "--trainer.callbacks.min_delta", "1000"]  # fmt: skip
    command = [*SMALL, *stop, "--output", "out", "--trainer.max_epochs", "5", "--register", "once"]
    first = classification(command)
    assert first.trainer.current_epoch == 2
    again = classification(command)
    assert (again.trainer.current_epoch, again.trainer.global_step) == (2, 6)
    assert again.rows["registered"] == first.rows["registered"] == "models:/once/1"
    assert len(MlflowClient().search_model_versions("name='once'")) == 1
    assert classification([*command, "--register", "twice"]).rows["registered"] == "models:/twice/1"
    # what a command leaves that is cut off while it registers: a version without a description
    run = again.trainer.logger.run_id
    torn = MlflowClient().create_model_version("once", Path("out").resolve().as_uri(), run_id=run).version
    longer = classification([*command, "--trainer.max_epochs", "6"])
    assert longer.trainer.current_epoch > 2
    assert longer.rows["registered"] == "models:/once/3"
    assert str(torn) not in {str(v.version) for v in MlflowClient().search_model_versions("name='once'")}


def test_a_best_checkpoint_that_is_torn_or_gone_is_told_before_the_training(capsys: pytest.CaptureFixture[str]) -> None:
    classification([*SMALL, "--output", "out", "--trainer.max_epochs", "1"])
    best, more = Path("out/best.ckpt"), [*SMALL, "--output", "out", "--trainer.max_epochs", "2"]
    whole = best.read_bytes()
    best.unlink()  # the last checkpoint is the same file
    best.write_bytes(whole[: len(whole) // 2])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        classification(more)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert "best.ckpt" in said
    assert "epochs and" not in said  # it did not begin
    best.unlink()
    assert classification(more).trainer.current_epoch == 2
    assert "best.ckpt, the best checkpoint so far, is gone" in capsys.readouterr().err
    assert best.exists()


def test_a_training_without_validation_says_that_there_is_no_best_model(capsys: pytest.CaptureFixture[str]) -> None:
    seldom = [
        *SMALL,
        "--trainer.check_val_every_n_epoch",
        "3",
        "--output",
        "out",
        "--keep_best",
        "2",
        "--average",
        "greedy",
    ]
    with pytest.raises(SystemExit) as end:
        classification([*seldom, "--register", "none"])
    assert end.value.code == 2
    assert "--trainer.check_val_every_n_epoch 3" in capsys.readouterr().err
    rows = classification(seldom).rows
    assert "nothing was validated" in rows["checkpoint"]
    assert "nothing was validated" in rows["average"]
    short = [*SMALL, "--trainer.max_steps", "1", "--output", "short"]
    with pytest.raises(SystemExit):
        classification([*short, "--register", "none"])
    assert "--trainer.max_steps 1 ends before the first one" in capsys.readouterr().err
    assert "nothing was validated" in classification(short).rows["checkpoint"]


class Weights(L.Callback):
    """Notes how much the divergence of a variational autoencoder counts in each step."""

    def __init__(self) -> None:
        self.seen: set[float] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bottleneck: Any = pl_module.bottleneck
        bottleneck.register_forward_hook(self._note)

    def _note(self, bottleneck: Any, given: tuple[Any, ...], code: Any) -> None:
        if bottleneck.training:
            self.seen |= {round(weight, 3) for weight in (code.loss / code.kl.flatten(1).sum(1)).tolist()}


class Clock(L.Callback):
    """Gives each step a tenth of a second, however fast the processor is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("lightning.pytorch.callbacks.timer.time", SimpleNamespace(monotonic=lambda: self.now))

    def on_train_batch_start(self, *_: object) -> None:
        self.now += 0.1


def test_a_training_of_limited_time_ends_its_rate_with_it_and_keeps_its_weights(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variational autoencoder's divergence counts less at first, as a share of the training."""
    weights, whole = Weights(), Weights()
    vae = ["--model.bottleneck", "Variational", "--model.bottleneck.beta", "0.5", "--model.bottleneck.warmup", "0.5"]
    cli = autoencoding([*SMALL, *vae, "--output", "out", "--trainer.max_epochs", "-1", "--trainer.max_time", "00:00:00:01"],
                       [weights, Clock(monkeypatch)])  # fmt: skip
    assert cli.trainer.global_step > 0
    found = [*rates("out").values()]
    assert max(found) > 0.0009
    assert found[-1] < 0.1 * max(found)
    assert "it reaches its end after 0:00:01 of training." in capsys.readouterr().out
    assert weights.seen == {0.5}
    assert MlflowClient().get_run(run_id_of("out")).info.status == "FINISHED"
    autoencoding([*SMALL, *vae, "--output", "whole"], [whole])
    assert whole.seen == {0.0, 0.167, 0.333, 0.5}


def test_a_limited_time_goes_on_where_it_stopped(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    long = [*SMALL, "--trainer.max_epochs", "-1", "--output", "out"]
    clock = Clock(monkeypatch)
    classification([*long, "--trainer.max_time", "00:00:00:01"], [clock])
    end = max(rates("out"))
    capsys.readouterr()
    done = classification([*long, "--trainer.max_time", "00:00:00:02"], [clock]).trainer.current_epoch
    assert "after 0:00:02 of training, of which 0:00:01 are over" in capsys.readouterr().out
    found = rates("out")
    assert found[end + 2] > 0.0003, "half a cosine, taken up in its middle"
    assert found[max(found)] < 0.0001
    plain = classification([*SMALL, "--output", "out", "--trainer.max_epochs", str(done + 1)])
    assert "follows the time" not in capsys.readouterr().out
    assert plain.trainer.lr_scheduler_configs[0].scheduler.elapsed is None


class Planned(L.LightningModule):
    """Has the figures that it is told to have, one pair for each epoch."""

    def __init__(self, figures: list[tuple[float, float]]) -> None:
        super().__init__()
        self.figures, self.weight = figures, torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: torch.Tensor) -> None:
        accuracy, loss = self.figures[self.current_epoch]
        self.log_dict({"val/accuracy": accuracy, "val/loss": loss})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.mark.parametrize(
    ("figures", "order"),
    [
        ([(0.5, 0.1), (0.9, 0.5), (0.9, 0.4), (0.9, 0.6)], [2, 1]),
        ([(0.9, 0.5), (0.9, 0.5), (0.8, 0.1)], [1, 0]),
        ([(0.9, 0.5), (0.95, 0.9), (0.9, 0.1)], [1, 2]),
        ([(0.9, 0.5)], [0]),
    ],
)
def test_of_equal_validations_the_lower_loss_is_kept_and_then_the_later(
    figures: list[tuple[float, float]], order: list[int]
) -> None:
    best = BestCheckpoint(Path(), "val/accuracy", "max")
    kept = KeptCheckpoints(Path(), 2, best)
    trainer = VisionTrainer(
        max_epochs=len(figures), accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, callbacks=[best, kept],
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(torch.ones(2, 1))
    trainer.fit(Planned(figures), loader, loader)
    assert torch.load("best.ckpt", weights_only=True)["epoch"] == order[0]
    assert [torch.load(file, weights_only=True)["epoch"] for file in kept.files] == order
    assert {*Path("kept").iterdir()} == {*kept.files}
