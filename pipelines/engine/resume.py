"""Resuming a training: its identity, and which settings may not change."""

import json
import pkgutil
from collections.abc import Callable
from inspect import signature
from typing import Any

import lightning as L
import yaml
from jsonargparse import ArgumentParser, Namespace

from datamodules import VisionDataModule
from modules import Optimization, VisionModule
from modules.training_data import settings_of
from pipelines.engine.command import UsageError
from pipelines.engine.settings import current, upgraded, written
from pipelines.engine.terminal import say
from pipelines.tracking.provenance import flatten

TOTAL = "data.batch_size, times the processes,"


def batch_size(checkpoint: dict[str, Any] | None, processes: int) -> int | None:
    """Batch size per process with which a training resumes; None for a new training or a checkpoint of an earlier
    version.

    Raises:
        UsageError: the batches cannot be divided among them.
    """
    total = ((checkpoint or {}).get("recipe") or {"fixed": {}})["fixed"].get(TOTAL)
    if total and total % processes:
        raise UsageError(
            f"The training has batches of {total}, which cannot be divided among {processes} processes: take another number "
            "of them, or start a new training with another --output."
        )
    return total and total // processes


def identity(trainer: L.Trainer, model: VisionModule, datamodule: VisionDataModule, recipe: str) -> dict[str, Any]:
    """Identity of a training: the settings that must not change until its end, the data, and all other settings."""
    settings = dict(flatten(upgraded(yaml.safe_load(recipe))))
    settings |= {f"model.optimization.{key}": str(value) for key, value in vars(model.optimization).items()}
    unsaid = ("model.optimization.optimizer", "model.optimization.lr_scheduler", "model.optimization.lr")
    silent = (
        "output",
        "start",
        "experiment",
        "run_name",
        "register",
        "register_code",
        "ckpt_path",
        "checkpoint_seconds",
        "config",
        "tta",
        "keep_best",
        "average",
    )
    splits = datamodule.identity()["splits"] if trainer.is_global_zero else {}  # which may download them
    prepared = datamodule.preprocessing
    accumulated = getattr(model, "accumulate_grad_batches", trainer.accumulate_grad_batches)
    return {
        "fixed": {
            "seed_everything": datamodule.seed,
            TOTAL: datamodule.batch_size * trainer.world_size,
            "trainer.accumulate_grad_batches": accumulated,
            "trainer.limit_train_batches": trainer.limit_train_batches,
            "trainer.overfit_batches": settings_of(trainer).overfit_batches,
            "model.backbone.transfer": str(model.transfer),
            "monitor": model.monitor,
            **{f"model.{name}": getattr(model, name) for name in ("weighting",) if hasattr(model, name)},
            # Of two, the figures cannot be compared, and a registered model would have that of the last for the best weights.
            **{
                f"data.{name}": getattr(prepared, name)
                for name in ("fit", "crop_pct", "frames", "bands")
                if hasattr(datamodule, name)
            },
            **{
                f"data.{name}": getattr(datamodule, name)
                for name in ("sampling", "memory_size", "epoch_batches", "clip_rewards")
                if hasattr(datamodule, name)
            },
            **{f"model.optimization.{key}": value for key, value in model.optimization.fixed.items()},
        },
        "data": {name: split["digest"] for name, split in splits.items()},
        "settings": {
            key: value
            for key, value in settings.items()
            if key not in ("model.optimization", *silent) and not key.startswith(unsaid)
        },
    }


def is_default(parser: ArgumentParser, options: Namespace, key: str, value: str) -> bool:
    """Whether a setting of a command has its default.

    Args:
        parser: the command's.
        options: all its settings.
        key: the setting, such as ``data.init_args.check``.
        value: its value, as `identity` has it.
    """
    holder, _, name = key.rpartition(".")
    if holder == "model.optimization":
        default = vars(Optimization()).get(name)
    elif holder.endswith(".init_args"):
        kind = pkgutil.resolve_name(options[f"{holder.removesuffix('.init_args')}.class_path"])
        default = signature(kind).parameters[name].default
    else:
        try:
            default = parser.get_default(key)
        except KeyError:  # such as the class of a part
            return False
    return value in (str(default), json.dumps(default, default=str))


def go_on(
    file: str,
    checkpoint: dict[str, Any],
    now: dict[str, Any],
    trainer: L.Trainer,
    data: str,
    is_default: Callable[[str, str], bool],
) -> bool:
    """Reports where a training resumes and which settings differ.

    Args:
        file: its checkpoint.
        checkpoint: what that holds.
        now: what `identity` says.
        trainer: Lightning's.
        data: class path of the data.
        is_default: whether a setting has the given value by default. Of those that an earlier version did not have,
            only others are told.

    Returns:
        Whether it is to go on also if it has ended early: its settings are not the same.

    Raises:
        UsageError: something is other than before that must not be.
    """
    epoch = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    step = checkpoint["global_step"]
    for name, limit, done in (("epochs", trainer.max_epochs or -1, epoch), ("steps", trainer.max_steps, step)):
        if 0 <= limit < done:
            raise UsageError(
                f"{file} has completed {done} {name}, more than --trainer.max_{name} {limit}: give at least {done}, or "
                "start a new training with another --output."
            )
    way_out = f"start a new training with another --output, which can begin with these weights (--start {file})."
    before = checkpoint.get("recipe") or {"fixed": {}, "data": {}, "settings": now["settings"]}
    for name, value in before["fixed"].items():
        key = current(name)
        if key in now["fixed"] and now["fixed"][key] != value:
            raise UsageError(
                f"{file} was trained with --{key} {value}, and this command says {now['fixed'][key]}. It cannot "
                f"change within a training: give the same value, or {way_out}"
            )
    for split in ("train", "val"):
        if trainer.is_global_zero and before["data"].get(split, "") not in ("", now["data"].get(split)):
            raise UsageError(
                f"{file} was trained on other data: the {split} split of {data} has changed (digest "
                f"{before['data'][split]}, now {now['data'].get(split)}). Give the same data as before, or {way_out}"
            )
    before["settings"] = {current(key): written(value) for key, value in before["settings"].items()}
    keys = sorted(before["settings"].keys() | now["settings"].keys())
    pairs = {key: (before["settings"].get(key, "not set"), now["settings"].get(key, "not set")) for key in keys}
    other = {
        key: f"{key} is {new} (was {old})"
        for key, (old, new) in pairs.items()
        if old != new and not (key not in before["settings"] and is_default(key, new))
    }
    say(
        f"Resuming from {file}: {epoch} epoch{'s' * (epoch != 1)} and {step} step{'s' * (step != 1)} are done."
        + (f" Changed since then: {'; '.join(other.values())}." if other else "")
    )
    goes_on = any(key.startswith(("trainer.max", "trainer.min", "trainer.callbacks")) for key in other)
    if checkpoint.get("stopped") and not goes_on:
        say(
            "It had stopped early and does not continue: change --trainer.callbacks or raise --trainer.max_epochs to train further."
        )
    return goes_on
