"""Training with weights, gradients and optimiser states split among the processes. What splits them takes long to import, so that
only a training that is split imports it."""

import pkgutil
from typing import Any

import torch
from jsonargparse import Namespace
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    StrategyRegistry,
)
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from typing_extensions import override

from modules import VisionModule
from pipelines.engine.command import UsageError

SPLITTING = (DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy)
BLOCK = 2**16  # parameters of the smallest block that is put together by itself
HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)

NAME = "--trainer.strategy fsdp2"
WAY_OUT = "Train with --trainer.strategy ddp."
WHOLE: dict[
    str, tuple[tuple[Any, ...], str]
] = {  # settings that need whole weights: values that do not, and why others do
    "model.optimization.ema_decay": ((None,), "averages whole weights"),
    "model.optimization.l1_penalty": ((None, 0), "sums over whole weights, other than the optimiser's weight_decay"),
    "model.optimization.l2_penalty": ((None, 0), "sums over whole weights, other than the optimiser's weight_decay"),
    "model.optimization.frozen_epochs": ((None, 0), "changes on the way what learns"),
    "model.backbone.transfer": ((None, "finetune", "scratch"), "needs whole weights"),
    "model.backbone.compile": ((None, False), "has not been tried with it"),
    "model.pcgrad": ((None, False), "compares whole gradients"),
    "trainer.precision": (
        (None, 32, "32", "32-true", "bf16", "bf16-mixed"),
        "has not been tried with it, only 32-true and bf16-mixed",
    ),
}


def check_settings(options: Namespace, kind: type[VisionModule]) -> None:
    """Checks that a training can do what its strategy does to the weights, before any data are read.

    Args:
        options: all settings of the training.
        kind: the module.

    Raises:
        UsageError: it cannot; names the setting.
    """
    given = options.trainer.strategy
    if isinstance(given, str):
        strategy = StrategyRegistry[given]["strategy"] if given in StrategyRegistry else None
    else:
        strategy = pkgutil.resolve_name(given.class_path)
    check_whole(strategy)
    if not (isinstance(strategy, type) and issubclass(strategy, SplitStrategy)):
        return
    parts = [
        part.class_path for part in vars(options.model).values() if isinstance(part, Namespace) and "class_path" in part
    ]
    kinds = [*map(pkgutil.resolve_name, parts), kind]
    decisive = next(each for each in kinds if hasattr(each, "needs_whole_weights"))
    if decisive.needs_whole_weights:
        raise UsageError(
            f"{NAME} splits the weights among the processes, which {decisive.__name__} does not allow: "
            f"{decisive.needs_whole_weights}. {WAY_OUT}"
        )
    for name, (able, why) in WHOLE.items():
        if (value := options.get(name)) not in able:
            raise UsageError(
                f"{NAME} splits the weights among the processes, and --{name} {value} {why}: leave that out, or train with "
                "--trainer.strategy ddp."
            )


def check_whole(strategy: Any) -> None:
    """Refuses the strategies, or their classes, that split weights other than `SplitStrategy` does.

    Raises:
        UsageError: it is one.
    """
    kind = strategy if isinstance(strategy, type) else type(strategy)
    if issubclass(kind, SPLITTING):
        raise UsageError(
            f"--trainer.strategy {kind.__name__} splits the weights among the processes, and what keeps, averages and "
            f"registers them needs them whole. {NAME} splits them, too, and keeps whole checkpoints."
        )


class Split(nn.Module):
    """A module whose weights are split by `torch.distributed.fsdp.fully_shard`: blocks of its backbone are put together one
    after the other, all other weights for the whole step. In a validation, all weights are whole.

    Splitting needs kernels in contiguous order, whatever `Backbone.channels_last` says; activations keep theirs.

    Args:
        module: what is split, in place.
        device: of this process.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__()
        self.module = module
        processes = torch.distributed.get_world_size()
        self.mesh = init_device_mesh(device.type, (processes,))
        self.strides = {name: value.stride() for name, value in module.named_parameters()}
        self._sync([*module.parameters(), *module.buffers()])
        for parameter in module.parameters():
            parameter.data = parameter.data.contiguous()
        self.hooks = {one: {name: vars(one)[name].copy() for name in HOOKS} for one in module.modules()}
        for block in blocks(module):
            fully_shard(block, mesh=self.mesh)
        fully_shard(self, mesh=self.mesh)

    def _sync(self, values: list[Tensor]) -> None:
        """Takes over the first process's values, as DDP does."""
        if values := [value.detach() for value in values]:
            torch.distributed._broadcast_coalesced(self.mesh.get_group(), values, 2**28, 0)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the module, with the buffers of the first process."""
        self._sync([*self.module.buffers()])
        return self.module(*args, **kwargs)

    def gather(self, stay: bool) -> None:
        """Puts all weights together for a validation, or splits them again after it."""
        from torch.distributed.fsdp import FSDPModule

        for part in self.modules():
            if isinstance(part, FSDPModule):
                part.set_reshard_after_forward(not stay, recurse=False)
                (part.unshard if stay else part.reshard)()

    @torch.no_grad()
    def undo(self) -> None:
        """Gives the module its weights back, whole and in their former order, and takes away what splitting added."""
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor

        self.gather(stay=False)
        for name, stride in self.strides.items():
            place, _, key = name.rpartition(".")
            owner, split = self.module.get_submodule(place), self.module.get_parameter(name)
            if isinstance(split, DTensor):  # not where another name of the same has been given back
                whole = split.full_tensor()
                value = torch.empty_strided(whole.shape, stride, dtype=whole.dtype, device=whole.device).copy_(whole)
                owner._parameters[key] = nn.Parameter(value, split.requires_grad)
        for part, hooks in self.hooks.items():
            vars(part).update(hooks)
            if isinstance(part, FSDPModule):
                part.__class__ = type(part).__mro__[FSDPModule._orig_cls_mro_index]


def blocks(module: nn.Module) -> list[nn.Module]:
    """Returns the blocks of a module's backbone: the largest composed parts of its sequences that are worth a message."""
    found: list[nn.Module] = []

    def look(part: nn.Module) -> None:
        for child in part.children():
            size = sum(parameter.numel() for parameter in child.parameters())
            composed = any(True for _ in child.children()) and not isinstance(child, nn.Sequential | nn.ModuleList)
            if isinstance(part, nn.Sequential | nn.ModuleList) and composed:
                if size >= BLOCK:
                    found.append(child)
            else:
                look(child)

    for name, part in module.named_children():
        if name == "backbone":
            look(part)
    return found


def whole(value: Any) -> Any:
    """Returns a tensor as the checkpoint of one process has it; only the first process keeps its values. Others are
    returned as they are."""
    from torch.distributed.tensor import DTensor

    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor().detach()
    return full.cpu() if torch.distributed.get_rank() == 0 else torch.empty_like(full, device="meta")


def like(value: Any, own: Any) -> Any:
    """Returns this process's part of a whole tensor, split as ``own`` is; others are returned as they are."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(own, DTensor) or not isinstance(value, Tensor) or value.shape != own.shape:
        return value
    value = value.to(own.device).contiguous()
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


class SplitStrategy(DDPStrategy):
    """Trains as DDP does, with weights, gradients and optimiser states split among all processes (FSDP2). Its checkpoints
    are those of one process, and before and after a training the network is whole in each process."""

    strategy_name = "fsdp2"

    def check(self, module: VisionModule) -> None:
        """Checks that the weights of a module can be split, whatever `check_settings` knows of its settings.

        Raises:
            UsageError: they cannot.
        """
        scalars = [name for name, value in module.named_parameters() if value.ndim == 0]
        averaged = module.averaging(module.plan.ema_decay) is not None
        if scalars or averaged or not module.automatic_optimization:
            why = f"{', '.join(scalars)}, a learned number, cannot be split" if scalars else "it needs whole weights"
            raise UsageError(
                f"{NAME} splits the weights among the processes, which {type(module).__name__} does not allow: {why}. {WAY_OUT}"
            )

    @override
    def configure_ddp(self) -> None:
        assert self.model is not None
        self.model = Split(self.model, self.root_device)

    def on_validation_start(self) -> None:
        """Puts the weights together."""
        if isinstance(self.model, Split):
            self.model.gather(stay=True)

    def on_validation_end(self) -> None:
        """Splits them again."""
        if isinstance(self.model, Split):
            self.model.gather(stay=False)

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {key: whole(value) for key, value in super().lightning_module_state_dict().items()}

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        own = self.lightning_module.state_dict()
        weights = {key: like(value, own.get(key)) for key, value in checkpoint["state_dict"].items()}
        super().load_model_state_dict({**checkpoint, "state_dict": weights}, strict)

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state: dict[str, Any] = tree_map(whole, super().optimizer_state(optimizer))
        return state

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        states = []
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            numbers = [number for group in saved["param_groups"] for number in group["params"]]
            own = dict(zip(numbers, held, strict=True))
            split = {
                number: {key: like(value, own[number]) for key, value in state.items()}
                for number, state in saved["state"].items()
            }
            states.append({**saved, "state": split})
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def teardown(self) -> None:
        if isinstance(split := self.model, Split):
            module = self.lightning_module
            assert isinstance(module, LightningModule)
            # Not where a training was broken off: another process may be gone.
            if (
                module.trainer.state.fn == TrainerFn.FITTING
                and module.trainer.state.status != TrainerStatus.INTERRUPTED
            ):
                split.undo()
            self.model = module
        super().teardown()


StrategyRegistry.register("fsdp2", SplitStrategy, description="Weights, gradients and optimiser states split (FSDP2)")
