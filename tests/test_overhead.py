"""What a step is spared: nothing that anybody has in a step may be left out."""

import threading
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.trainer import call

from pipelines.engine.overhead import CLIPPING, STEP_HOOKS
from pipelines.engine.terminal import quieten
from pipelines.engine.trainer import VisionTrainer

MODULE_HOOKS = (*STEP_HOOKS, CLIPPING[0])

Seen = list[tuple[str, str, str | None]]  # who, in which hook, and the hook that Lightning has noted for `log`


def note(seen: Seen, who: str, hook: str, module: L.LightningModule | None = None) -> Callable[..., None]:
    def noted(*args: Any, **kwargs: Any) -> None:
        own = module or next(one for one in args if isinstance(one, L.LightningModule))
        seen.append((who, hook, own._current_fx_name))

    return noted


def trained(kind: type[L.Trainer], busy: bool, **settings: Any) -> Seen:
    """Trains for four steps, and returns which hooks were called in which order."""
    seen: Seen = []
    lambdas = LambdaCallback(**{hook: note(seen, "lambda", hook) for hook in STEP_HOOKS[:4]})
    late = type("Late", (L.Callback,), {hook: note(seen, "class", hook) for hook in STEP_HOOKS[1:]})()
    model, strategy = BoringModel(), SingleDeviceStrategy(torch.device("cpu"))
    if busy:
        model = type("Busy", (BoringModel,), {hook: note(seen, "module", hook) for hook in MODULE_HOOKS})()
        strategy.on_train_batch_start = note(seen, "strategy", "on_train_batch_start", model)
    trainer = kind(
        max_steps=4, limit_val_batches=1, val_check_interval=2, log_every_n_steps=1, logger=False, strategy=strategy,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=[lambdas, L.Callback(), late] if busy else [L.Callback()], **settings,
    )  # fmt: skip
    trainer.fit(model)
    assert trainer.global_step == 4
    return seen


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"profiler": "simple"}], ids=str)
def test_each_hook_of_a_step_is_called_as_lightning_calls_it(settings: dict[str, Any]) -> None:
    """Where it fails after an update, see what `pipelines/engine/overhead.py` replaces; it was written for Lightning 2.6."""
    seen = trained(VisionTrainer, True, **settings)
    assert seen == trained(L.Trainer, True, **settings), f"Lightning is {version('lightning')}"
    assert {(who, hook) for who, hook, _ in seen} >= {("module", hook) for hook in MODULE_HOOKS}
    assert ("strategy", "on_train_batch_start", "on_train_batch_start") in seen


def test_what_does_nothing_in_a_step_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for hook in STEP_HOOKS:
        # As Lightning's own are, these are those of the base class.
        monkeypatch.setattr(L.Callback, hook, lambda *args, hook=hook: called.append(hook))
    trained(VisionTrainer, False)
    assert called == []
    trained(L.Trainer, False)
    assert {*called} == {*STEP_HOOKS}


def test_callbacks_and_hooks_that_come_or_go_while_training_are_called_as_lightning_calls_them() -> None:
    def seen(kind: type[L.Trainer]) -> list[tuple[str, int]]:
        called: list[tuple[str, int]] = []

        def told(who: str) -> Callable[..., None]:
            return lambda *args: called.append((who, trainer.global_step))

        class Changing(L.Callback):
            def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
                if trainer.global_step == 2:
                    trainer.callbacks = [one for one in trainer.callbacks if one is not leaving]
                    trainer.callbacks.append(LambdaCallback(on_train_batch_start=told("late")))

            def on_train_epoch_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
                if trainer.current_epoch == 1:
                    self.on_before_backward = told("own")  # type: ignore[method-assign]
                    module.on_after_backward = told("module")  # type: ignore[method-assign]

        leaving = LambdaCallback(on_train_batch_start=told("leaving"))
        trainer = kind(
            max_epochs=2, limit_train_batches=3, limit_val_batches=0, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[leaving, Changing()], accelerator="cpu",
        )  # fmt: skip
        trainer.fit(BoringModel())
        return called

    assert seen(VisionTrainer) == seen(L.Trainer)
    assert {who for who, _ in seen(VisionTrainer)} == {"leaving", "late", "own", "module"}


def test_the_report_of_a_profiler_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    quieten()
    trained(VisionTrainer, False, profiler="simple")
    assert "FIT Profiler Report" in caplog.text


def test_all_is_as_before_after_a_training_and_after_an_error() -> None:
    def parts() -> list[Any]:
        calls = [call._call_callback_hooks, call._call_lightning_module_hook, call._call_strategy_hook]
        return [*calls, training_epoch_loop.is_param_in_hook_signature, torch.cuda._cached_device_count]

    before = parts()
    trained(VisionTrainer, True)
    assert parts() == before
    # Of two in threads, the one that begins first ends first.
    quiet: dict[str, Any] = {
        "max_steps": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    both = {who: threading.Event() for who in ("first", "last")}
    waits = LambdaCallback(on_train_start=lambda *args: both["first"].set() or both["last"].wait(60))
    first = threading.Thread(target=VisionTrainer(callbacks=[waits], **quiet).fit, args=[BoringModel()])
    first.start()
    assert both["first"].wait(60)
    joins = LambdaCallback(on_train_start=lambda *args: both["last"].set() or first.join())
    VisionTrainer(callbacks=[joins], **quiet).fit(BoringModel())
    assert parts() == before
    failing = LambdaCallback(on_before_backward=lambda *args: 1 / 0)
    trainer = VisionTrainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[failing])
    with pytest.raises(ZeroDivisionError):
        trainer.fit(BoringModel())
    assert parts() == before
