"""Range checks of Lightning's and torch's settings, which they themselves misread or fail on later."""

from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from pipelines.engine.command import UsageError

LEAST = {
    "trainer.accumulate_grad_batches": 1,
    "trainer.log_every_n_steps": 1,
    "trainer.check_val_every_n_epoch": 1,
    "trainer.gradient_clip_val": 0,
    "trainer.max_epochs": -1,
    "trainer.max_steps": -1,
    "trainer.min_epochs": 0,
    "trainer.min_steps": 0,
    "trainer.num_sanity_val_steps": -1,
}
LIMITS = {  # of which 0 leaves nothing to do
    "fit": ("max_epochs", "max_steps", "limit_train_batches"),
    "validate": ("limit_val_batches",),
    "test": ("limit_test_batches",),
    "predict": ("limit_predict_batches",),
}
UNLIMITED = ("last_epoch", "max_depth", "save_top_k")  # of parts, where -1 has a meaning


def check_ranges(verb: str, settings: Mapping[str, Any]) -> None:
    """Checks that all numbers of a command are in range.

    Raises:
        UsageError: one is not.
    """
    for name, least in LEAST.items():
        if (value := _setting(settings, name)) is not None and not value >= least:
            raise UsageError(f"--{name} must be at least {least}, not {value}.")
    for name in LIMITS.get(verb, ()):
        if _setting(settings, f"trainer.{name}") == 0:
            raise UsageError(f"--trainer.{name} 0 leaves nothing to {verb}: leave it out, or give at least 1.")
    for name, value in _counts(settings):
        if value < 0:
            raise UsageError(f"--{name} must be at least 0, not {value}.")
    if (length := _setting(settings, "trainer.max_time")) is not None and verb == "fit":
        try:
            timer = Timer(length)
        except (MisconfigurationException, ValueError, TypeError):
            raise UsageError(
                f"--trainer.max_time must be days:hours:minutes:seconds, such as 00:08:00:00 for eight hours, not {length}."
            ) from None
        check_time(timer, f"--trainer.max_time {length}")


def check_time(timer: Timer, setting: str) -> None:
    """Checks the value of ``max_time``.

    Raises:
        UsageError: it may not.
    """
    if timer.time_remaining() == 0:
        raise UsageError(f"{setting} leaves nothing to fit: give some time, as days, hours, minutes and seconds.")


def _setting(settings: Any, name: str) -> Any:
    """A setting by its dotted name; None if it does not exist."""
    return reduce(lambda inner, key: inner.get(key) if isinstance(inner, Mapping) else None, name.split("."), settings)


def _counts(value: Any, name: str = "", owner: str = "") -> Iterator[tuple[str, int]]:
    """Names of the integer settings of torch's and Lightning's own classes; all of them are counts."""
    if isinstance(value, Mapping):
        owner = str(value.get("class_path") or owner)
        for key, inner in value.items():
            yield from _counts(inner, name if key == "init_args" else f"{name}.{key}".removeprefix("."), owner)
    elif isinstance(value, list):
        for inner in value:
            yield from _counts(inner, name, owner)
    elif type(value) is int and owner.startswith(("torch.", "lightning.")) and name.rpartition(".")[2] not in UNLIMITED:
        yield name, value
