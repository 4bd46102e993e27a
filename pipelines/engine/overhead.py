"""What Lightning and PyTorch find out anew in each step of a training, found out once.

Replaces private parts of Lightning 2.6 and PyTorch 2.15 while a training runs; `tests/test_overhead.py` compares what is
called with what Lightning itself calls.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from threading import Lock
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loops import training_epoch_loop
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer import trainer as trainer_module

STEP_HOOKS = (
    "on_train_batch_start",
    "on_train_batch_end",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_before_zero_grad",
)
CLIPPING = ("configure_gradient_clipping", "clip_gradients")  # of the module; the first calls the second

_lock = Lock()
_training: list[Any] = []  # trainers of this process, several at once in threads or one within another
_before: list[tuple[Any, str, Any]] = []  # what they all share, as it was before the first


class NoProfiler(PassThroughProfiler):
    """Lightning's default, which measures nothing, without the context that it would make for each of a step's hooks."""

    _nothing = nullcontext()

    def profile(self, action_name: str) -> Any:
        """Does nothing."""
        return self._nothing


@contextmanager
def spared(trainer: Any) -> Iterator[None]:
    """Context manager of a training: hooks of a step that do nothing are not called, and what Lightning and PyTorch look up
    in each step is looked up once.

    Args:
        trainer: Lightning's, with its module, callbacks and data.
    """
    selector, validation = trainer._data_connector._datahook_selector, trainer.fit_loop.epoch_loop.val_loop._data_source
    own: list[tuple[Any, str, Any]] = [
        (validation, "is_defined", cache(validation.is_defined)),
        (selector, "get_instance", cache(selector.get_instance)),
    ]
    if type(trainer.profiler) is PassThroughProfiler:
        own.append((trainer, "profiler", NoProfiler()))
    before = _noted(own)
    with _lock:
        shared = _shared(trainer)
        if not _training:
            _before[:] = _noted(shared)
        _training.append(trainer)
        _set([*own, *shared])
    try:
        yield
    finally:
        _set(before)
        with _lock:
            _training.remove(trainer)
            if not _training:
                _set(_before)
                _before.clear()


def _shared(trainer: Any) -> list[tuple[Any, str, Any]]:
    """What is replaced for all trainers of the process: places, names and values."""
    module, strategy = trainer.lightning_module, trainer.strategy
    return [
        (call, "_call_callback_hooks", _of_callbacks(trainer)),
        (
            call,
            "_call_lightning_module_hook",
            _of_one(trainer, module, L.LightningModule, call._call_lightning_module_hook),
        ),
        (call, "_call_strategy_hook", _of_one(trainer, strategy, Strategy, call._call_strategy_hook)),
        (training_epoch_loop, "is_param_in_hook_signature", cache(training_epoch_loop.is_param_in_hook_signature)),
        (trainer_module, "is_overridden", cache(trainer_module.is_overridden)),
        # PyTorch's optimisers ask how many GPUs there are, and without one NVML is looked for each time.
        (torch.cuda, "_cached_device_count", torch.cuda.device_count()),
    ]


def _noted(values: list[tuple[Any, str, Any]]) -> list[tuple[Any, str, Any]]:
    return [(place, name, getattr(place, name)) for place, name, _ in values]


def _set(values: list[tuple[Any, str, Any]]) -> None:
    for place, name, value in values:
        setattr(place, name, value)


def _has(one: Any, base: type, hook: str) -> bool:
    """Whether an object does something in a hook; LambdaCallback's hooks are the object's, not the class's."""
    return vars(one).get(hook, getattr(type(one), hook)) is not getattr(base, hook)


def _of_callbacks(trainer: Any) -> Callable[..., None]:
    """Returns Lightning's function that calls a hook of all callbacks, for those that do something in it."""
    plain, module = call._call_callback_hooks, trainer.lightning_module
    noted = vars(module)  # where Lightning notes which hook runs; torch's `__setattr__` is slow
    known: list[L.Callback] = []

    @cache
    def hooks(name: str) -> list[tuple[Callable[..., None], str]]:
        having = [one for one in known if _has(one, L.Callback, name)]
        return [(getattr(one, name), f"[Callback]{one.state_key}.{name}") for one in having]

    def call_hooks(of: Any, name: str, *args: Any, **kwargs: Any) -> None:
        if of is not trainer or name not in STEP_HOOKS:
            plain(of, name, *args, **kwargs)
            known.clear()  # what a callback has done between epochs, such as given another one a hook, counts
            return
        if known != trainer.callbacks:
            known[:] = trainer.callbacks
            hooks.cache_clear()
        if found := hooks(name):
            before, noted["_current_fx_name"] = noted["_current_fx_name"], name
            for hook, action in found:
                with trainer.profiler.profile(action):
                    hook(trainer, module, *args, **kwargs)
            noted["_current_fx_name"] = before

    return call_hooks


def _of_one(trainer: Any, one: Any, base: type, plain: Callable[..., Any]) -> Callable[..., Any]:
    """Returns Lightning's function that calls a hook of the module or of the strategy, if that does something in it.

    Args:
        trainer: Lightning's.
        one: the module or the strategy.
        base: the class whose hooks do nothing, `LightningModule` or `Strategy`.
        plain: Lightning's function.
    """
    noted = vars(trainer.lightning_module)

    @cache
    def idle(name: str) -> bool:
        return name in STEP_HOOKS and not _has(one, base, name)

    def call_hook(of: Any, name: str, *args: Any, **kwargs: Any) -> Any:
        if of is not trainer or "pl_module" in kwargs or type(of.profiler) is not NoProfiler:
            return plain(of, name, *args, **kwargs)
        nothing = idle(name) and name not in vars(one)
        if name == CLIPPING[0] and not of.gradient_clip_val:
            nothing = not any(_has(one, base, each) for each in CLIPPING)
        hook = None if nothing else getattr(one, name)
        if not callable(hook):
            return None
        before, noted["_current_fx_name"] = noted["_current_fx_name"], name
        result = hook(*args, **kwargs)
        noted["_current_fx_name"] = before
        return result

    return call_hook
