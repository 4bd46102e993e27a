"""Base class of adversarial training with two players, and its optimisation settings."""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torchmetrics.utilities.distributed import gather_all_tensors
from typing_extensions import override

from modules.adversarial.health import CAUSES, Health
from modules.adversarial.objectives import Objective, Verdict
from modules.adversarial.players import at_rest, follow
from modules.base import VisionModule
from modules.callbacks.averaging import WeightAverage
from modules.measures.extractors import CHUNK, Seen
from modules.measures.judge import Judge
from modules.measures.sets import effective_classes, neighbourhoods, spread
from modules.networks import BackboneError
from modules.optimization import (
    Optimization,
    build_optimizer,
    parameter_groups,
    rate_factor,
    total_steps,
)
from modules.ranges import Positive, PositiveInt, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.training_data import settings_of

WATCHED = 256  # number of samples for health checks


class AdversarialAdam(Adam):
    """Adam with momenta for GANs of images of up to 32 pixels.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        betas: decay rates of the moving averages; no momentum by default, since the other player changes too.
    """

    def __init__(self, params: Any, lr: Positive = 1e-3, betas: tuple[float, float] = (0.0, 0.99)) -> None:
        super().__init__(params, lr, betas)


class Constant(LambdaLR):
    """Constant learning rate.

    Args:
        optimizer: the optimiser.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda _: 1.0)


@dataclass
class AdversarialOptimization(Optimization):
    """Training settings of two players. Gradients are accumulated and clipped separately for each player.

    Args:
        optimizer: any optimiser of torch or timm; each player gets one.
        lr_scheduler: any schedule of torch, stepped with the generator.
        lr: learning rate of the generator; None for the optimiser's default.
        lr_batch_size: images per step that both learning rates are meant for: they are multiplied by the ratio of the
            actual number, processes × batch size × accumulated batches, to this one; None for no scaling.
        backbone_lr_scale: factor on the learning rate of the discriminator's backbone, relative to its head.
        layer_decay: factor on the discriminator's learning rate for each layer further from the output.
        frozen_epochs: epochs in which the discriminator's backbone is frozen; -1 for all.
        l1_penalty: weight of Σ|w| in each player's loss, over its weight matrices and kernels.
        l2_penalty: weight of Σw² in each player's loss.
        ema_decay: decay of the generator's moving average, which is sampled and evaluated, in [0, 1); the decay at step
            n is at most (1 + n) / (10 + n).
        discriminator_lr_scale: learning rate of the discriminator, relative to the generator's (Heusel et al. 2017,
            arXiv:1706.08500).
        discriminator_steps: steps of the discriminator for each step of the generator.
    """

    optimizer: OptimizerCallable = AdversarialAdam
    lr_scheduler: LRSchedulerCallable = Constant
    ema_decay: ShareBelowOne | None = 0.998
    discriminator_lr_scale: Positive = 1.0
    discriminator_steps: PositiveInt = 1


class AdversarialModule(VisionModule):
    """Base class of modules with a generator and a discriminator that are trained alternately: two optimisers,
    accumulation and clipping of gradients for each, the generator's moving average, schedules, exact resume, several
    processes.

    To write a subclass:

    - ``__init__`` calls the base class, which creates the discriminator's ``backbone``; creates further layers, such as
    a ``head``; and ends with ``self.play(generator)``. Several generators are put into an ``nn.ModuleDict``. Every
    other network that is trained with the discriminator is an attribute listed in ``discriminator_parts``.
    - `discriminator_losses` and `generator_losses` return the losses of a batch: named and weighted terms, whose sum
    the player minimises and each of which is logged as ``train/NAME``. The player whose turn it is is in training mode,
    the other is frozen: gradients flow through it, but neither parameters nor buffers change. The discriminator's turn
    comes first, and its generated images are created under ``torch.no_grad()``.
    - `measure`, `report` and `predict` are as in other tasks: validation and test losses of a batch, metrics and images
    of an evaluation, predictions. They use ``self.average``, the generator's moving average.
    - Random numbers come from `draw` with the ``key`` that the two methods get, so that two processes draw the same as
    one. State that lasts over steps, such as a pool of images, is a buffer or is added to the checkpoint.

    Each batch is one step of the discriminator, or a part of one if gradients are accumulated; after every
    ``discriminator_steps`` of them the generator makes a step on the same batches. ``global_step`` and ``max_steps``
    count the generator's steps.

    Args:
        data: description of the data.
        backbone: the network of the discriminator; ``compile`` compiles both players.
        optimization: optimisers and schedules of both players.
    """

    averages: ClassVar[Mapping[str, str]] = {"generator.": "average."}
    needs_whole_weights = "several networks are trained against each other"
    discriminator_parts: ClassVar[tuple[str, ...]] = ("backbone", "head")
    generator: nn.Module
    average: nn.Module
    objective: Objective
    health: Health | None = None  # of subclasses with health checks, see `check_health`
    judge: Judge | None = None  # feature extractor of the metrics
    stop_on_failure = False

    def __init__(self, data: DataSpec, backbone: Backbone, optimization: AdversarialOptimization | None = None) -> None:
        plan = optimization or AdversarialOptimization()
        if backbone.transfer is not None:
            raise BackboneError(
                f"--model.backbone.transfer {backbone.transfer} is for networks that learn a task with their "
                "backbone; here it is one of two networks that are both trained: leave it out."
            )
        super().__init__(data, backbone, plan)
        self.adversarial = plan
        self.automatic_optimization = False
        self.accumulate_grad_batches, self.gradient_clip_val = 1, cast(float | None, None)
        self.seed = torch.initial_seed()
        self.discriminator_steps = 0  # steps so far
        self.gradient_norm = torch.zeros(())  # of the generator's last step
        self._discriminates = True
        self._batches: list[dict[str, Tensor]] = []  # batches of the discriminator's current step
        self._terms: dict[str, list[Tensor]] = {}  # losses of the current steps of both players

    def play(self, generator: nn.Module) -> None:
        """Sets the generator, and initialises its moving average.

        Args:
            generator: generates images, float B×C×H×W in [-1, 1].
        """
        self.generator = generator
        if self.channels_last:
            generator.to(memory_format=torch.channels_last)
        self.average = deepcopy(generator).requires_grad_(False).eval()

    def discriminator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        """Computes the losses of the discriminator, by name; empty to skip its step.

        Args:
            batch: batch of images.
            key: key for `draw`.
        """
        raise NotImplementedError

    def generator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        """Computes the losses of the generator, by name.

        Args:
            batch: a batch of the discriminator's last step.
            key: key for `draw`.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Hook after each step of the generator; by default, does nothing.

        Args:
            step: number of the generator's steps before this one.

        Returns:
            Scalar metrics of the step to log, by name.
        """
        return {}

    def accuracy(self, *verdicts: Verdict) -> Tensor:
        """Computes the discriminator's accuracy, a scalar, from its verdicts on real and on generated images, and logs its mean."""
        real, fake = (verdict.score.detach() for verdict in verdicts)
        sign, threshold = -1 if self.objective.energy else 1, self.objective.threshold
        middle = (real.mean() + fake.mean()) / 2 if threshold is None else threshold
        right = ((sign * (real - middle) > 0).float().mean() + (sign * (fake - middle) < 0).float().mean()) / 2
        self.means.update("train/discriminator_accuracy", right, len(real))
        return right

    def tell_health(self, step: int, real: Tensor, made: Tensor, classes: Callable[[Seen], Tensor | None]) -> None:
        """Checks the health of the training, and reports it as metrics, as a warning when a failure is first detected,
        and as a tag. Stops the training if ``stop_on_failure`` is set.

        Args:
            step: number of the generator's steps so far.
            real: training images, uint8 N×C×H×W.
            made: images generated from the same input at every check, float N×C×H×W in [-1, 1].
            classes: returns the class probabilities, float N×K, from the extractor's output; None to skip the number of
                classes.
        """
        assert self.health is not None
        assert self.judge is not None
        there, here = self.judge.seen("watched", real), self.judge.extractor(as_uint8(made))
        figures = {"diversity": spread(here.features) / max(spread(there.features), 1e-12)}
        figures["coverage"] = neighbourhoods(there.features, here.features)["coverage"]
        wanted, given = classes(there), classes(here)
        if wanted is not None and given is not None:
            figures["classes"] = effective_classes(given) / effective_classes(wanted)
        figures = self.health.check(step, figures, made[:CHUNK], spread(real.flatten(1).float() / 127.5))
        self.publisher.figures(self.trainer, {f"health/{name}": value for name, value in figures.items()}, step - 1)
        failing = self.health.failing()
        for name in failing:
            if name not in self.health.found:
                self.health.found[name] = step
                seen = ", ".join(f"{key} {value:.3g}" for key, value in figures.items())
                rank_zero_warn(f"{name.capitalize()} at the generator's step {step} ({seen}): {CAUSES[name]}.")
        state = ", ".join(f"{name} since step {self.health.found[name]}" for name in failing) or "well"
        self.publisher.tags(self.trainer, {"health": state})
        if failing and self.stop_on_failure:
            self.trainer.should_stop = True

    def gathered(self, mine: Tensor) -> Tensor:
        """Gathers the rows of all processes in their order, where process r of w has the rows r, r + w, …"""
        if self.trainer.world_size == 1:
            return mine.contiguous()
        parts = gather_all_tensors(mine.contiguous())
        rows = torch.cat([torch.arange(len(part)) for part in parts])
        return torch.cat(parts)[rows.argsort(stable=True).to(self.device)]

    def as_input(self, image: Tensor) -> Tensor:
        """Normalises generated images, float B×C×H×W in [-1, 1], for the discriminator, in the same way as
        `normalize`."""
        return (image.float() + 1) * 127.5 * self.scale + self.shift

    def draw(self, make: Callable[[int, torch.Generator], Tensor], count: int, *key: int) -> Tensor:
        """Draws this process's share of random numbers for a batch of all processes, determined by the seed and a key.

        Args:
            make: draws N×… for a number of samples and a random generator.
            count: number of samples of this process.
            key: further integers that the random numbers depend on.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        return make(count * world, generator)[rank::world].to(self.device)

    def _names(self) -> tuple[str, ...]:
        """Returns the name prefixes of the discriminator's parameters."""
        return tuple(f"{part}." for part in self.discriminator_parts)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        """Makes a step of the discriminator, and, when it has made its number of steps, one of the generator."""
        first, second = cast(list[Any], self.optimizers())
        # Lightning counts the steps of all optimisers as global steps; only the generator's should count.
        second._on_before_step = second._on_after_step = _nothing
        step, key = self.global_step, (self.current_epoch, batch_idx)
        if not self._batches:
            self._terms = {}
        with at_rest(self.generator):
            losses = self.discriminator_losses(batch, *key)
            self._discriminates = bool(losses)
            if losses:
                self._pay(losses, self._names(), len(batch["image"]), self._parts(batch_idx))
        self._batches.append(batch)
        if self.holds_gradients(batch_idx):
            return
        if losses:
            second.step()
            second.zero_grad()
        self.discriminator_steps += 1
        batches, self._batches = self._batches, []
        if self.discriminator_steps % self.adversarial.discriminator_steps:
            return
        with at_rest(*(getattr(self, part) for part in self.discriminator_parts)):
            for part, one in enumerate(batches):
                costs = self.generator_losses(one, *key, 1, part)
                self._pay(costs, ("generator.",), len(one["image"]), len(batches))
        first.step()
        first.zero_grad()
        follow(self.average, self.generator, self._decay(step))
        figures = self.after_step(step)
        for config in self._schedules("step"):
            config.scheduler.step()
        if step % settings_of(self.trainer).log_every_n_steps == 0:
            means = {name: torch.stack(values).mean() for name, values in self._terms.items()}
            further = {f"train/{name}": float(value) for name, value in figures.items()}
            further["train/gradient_norm"] = float(self.gradient_norm)
            self.publisher.figures(self.trainer, further, step)
            self.guard.log_step(self, means, batch, step)

    def _set_clock(self) -> None:
        """Makes Lightning log an evaluation at the generator's last step, instead of at the number of batches."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, self.global_step - 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sets the clock for logging after this batch."""
        self._set_clock()

    def on_validation_epoch_end(self) -> None:
        """Sets the clock also for a training that resumes before its validation."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._set_clock()

    def _pay(self, losses: dict[str, Tensor], names: tuple[str, ...], size: int, parts: int) -> None:
        """Adds the gradients of a batch, one of ``parts`` of a step, and logs its losses."""
        penalty = self.adversarial.penalty((key, p) for key, p in self.named_parameters() if key.startswith(names))
        self.manual_backward((torch.stack([*losses.values()]).sum() + penalty) / parts)
        for name, value in losses.items():
            self.means.update(f"train/{name}", value.detach(), size)
            self._terms.setdefault(name, []).append(value.detach())

    def _parts(self, batch_idx: int) -> int:
        """Returns the number of batches in the discriminator's step that this batch belongs to."""
        size, total = self.accumulate_grad_batches, self.trainer.num_training_batches
        return size if not math.isfinite(total) else min(size, int(total) - batch_idx // size * size)

    @override
    def holds_gradients(self, batch_idx: int) -> bool:
        return (
            batch_idx + 1
        ) % self.accumulate_grad_batches != 0 and batch_idx + 1 != self.trainer.num_training_batches

    def _decay(self, step: int) -> float:
        return min(self.adversarial.ema_decay or 0.0, (1 + step) / (10 + step))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clips gradients, and computes the gradient norm of the generator: from here on gradients are unscaled."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, "norm")
        chosen = self.optimizers(use_pl_optimizer=False)
        if optimizer is cast(list[Any], chosen)[0]:
            gradients = [p.grad for p in self.generator.parameters() if p.grad is not None]
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def configure_optimizers(self) -> Any:
        """Returns an optimiser and a schedule for each player, the generator's first."""
        total = total_steps(self.trainer)
        if total != self.trainer.max_steps:  # number of batches
            each = self.accumulate_grad_batches * self.adversarial.discriminator_steps
            total = total and max(1, total // each)
        generator = parameter_groups(self, ("generator.",), "generator")
        discriminator = parameter_groups(self, self._names(), "discriminator")
        for group in discriminator:
            group["lr_scale"] *= self.adversarial.discriminator_lr_scale
        players, factor = (generator, discriminator), rate_factor(self)
        return [build_optimizer(self.adversarial, groups, total, self.lr, self.monitor, factor) for groups in players]

    def configure_callbacks(self) -> list[Callback]:
        """Removes the average of all weights: the generator's is kept here."""
        return [callback for callback in super().configure_callbacks() if not isinstance(callback, WeightAverage)]

    def setup(self, stage: str) -> None:
        """Compiles, and makes DDP accept that one player has no gradients during the other's turn."""
        if stage == "fit":
            if isinstance(self.trainer.strategy, DDPStrategy):
                self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
            if self.compile_backbone:
                several = isinstance(self.generator, nn.ModuleDict)
                for part in self.generator.children() if several else [self.generator]:
                    part.compile()
        super().setup(stage)

    def train(self, mode: bool = True) -> "AdversarialModule":
        """Sets the training mode, except for the moving average."""
        super().train(mode)
        self.average.eval()
        return self

    def on_train_epoch_end(self) -> None:
        """Steps the schedules with an interval of epochs."""
        super().on_train_epoch_end()
        for config in self._schedules("epoch"):
            plateau = isinstance(config.scheduler, ReduceLROnPlateau)
            config.scheduler.step(*([self.trainer.callback_metrics[str(config.monitor)]] if plateau else []))

    def _schedules(self, interval: str) -> list[Any]:
        """Returns the schedules with an interval of steps or epochs, of the players that are trained."""
        known = self.trainer.lr_scheduler_configs if self._discriminates else self.trainer.lr_scheduler_configs[:1]
        return [config for config in known if config.interval == interval]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds the state that an exact resume needs."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["gan"] = {"seed": self.seed, "discriminator_steps": self.discriminator_steps}
        if self.health is not None:
            checkpoint["gan"]["health"] = self.health.state()
        if self.judge is not None:
            checkpoint["gan"]["extractor"] = self.judge.state_dict()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if saved := checkpoint.get("gan"):
            self.seed, self.discriminator_steps = saved["seed"], saved["discriminator_steps"]
            if self.health is not None and "health" in saved:
                self.health.restore(saved["health"])
            if self.judge is not None:
                self.judge.load_state_dict(saved.get("extractor"))


def as_float(image: Tensor) -> Tensor:
    """Converts uint8 to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def as_uint8(image: Tensor) -> Tensor:
    """Converts generated images, float in [-1, 1], to uint8."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def _nothing() -> None:
    pass
