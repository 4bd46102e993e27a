"""What all trainings of two players share: whose turn it is, and what happens in it."""

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
from modules.adversarial.objectives import Objective
from modules.adversarial.players import at_rest, follow
from modules.base import VisionModule
from modules.measures.extractors import CHUNK, Seen
from modules.measures.judge import Judge
from modules.measures.sets import effective_classes, neighbourhoods, spread
from modules.networks import BackboneError
from modules.optimization import (
    Optimization,
    WeightAverage,
    build_optimizer,
    parameter_groups,
    rate_factor,
    total_steps,
)
from modules.ranges import Positive, PositiveInt, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.training_data import settings_of

WATCHED = 256  # samples for the watch on the training's health


class AdversarialAdam(Adam):
    """Adam with momenta that suit GANs of up to 32 pixels.

    Args:
        params: what learns.
        lr: learning rate.
        betas: decay rates of the moving averages; no momentum by default, because the other player moves too.
    """

    def __init__(self, params: Any, lr: Positive = 1e-3, betas: tuple[float, float] = (0.0, 0.99)) -> None:
        super().__init__(params, lr, betas)


class Constant(LambdaLR):
    """The same rate all the time.

    Args:
        optimizer: the optimiser.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer, lambda _: 1.0)


@dataclass
class AdversarialOptimization(Optimization):
    """How two players are trained. Gradients are accumulated and clipped for each player by itself.

    Args:
        optimizer: any optimiser of torch or timm; each player gets one.
        lr_scheduler: any schedule of torch, stepped with the generator.
        lr: the generator's learning rate, if it is to be another than the optimiser's own.
        lr_batch_size: the images a step for which both rates are stated: with another number, processes × batch size ×
            accumulated batches, they are multiplied by their ratio; None leaves them as they are.
        backbone_lr_scale: factor on the rate of the discriminator's backbone, against that of its head.
        layer_decay: factor on the rate of the discriminator for each layer further from the output.
        frozen_epochs: epochs in which the discriminator's backbone does not learn; -1 for all.
        l1_penalty: weight of Σ|w| in each player's loss, over its weight matrices and kernels.
        l2_penalty: weight of Σw² in each player's loss.
        ema_decay: decay of the generator's moving average, which is sampled and measured, in [0, 1); the decay at
            step n is at most (1 + n) / (10 + n).
        discriminator_lr_scale: factor on the discriminator's rate, against the generator's (Heusel et al. 2017,
            arXiv:1706.08500).
        discriminator_steps: steps of the discriminator for each of the generator.
    """

    optimizer: OptimizerCallable = AdversarialAdam
    lr_scheduler: LRSchedulerCallable = Constant
    ema_decay: ShareBelowOne | None = 0.998
    discriminator_lr_scale: Positive = 1.0
    discriminator_steps: PositiveInt = 1


class AdversarialModule(VisionModule):
    """Base of all modules in which a generator and a discriminator take turns: two optimisers, accumulation and clipping
    of gradients for each, the generator's moving average, schedules, exact resume, several processes.

    How a variant is written:

    - ``__init__`` calls this one, which makes the discriminator's ``backbone``; makes what else there is, such as a
      ``head``; and ends with ``self.play(generator)``. Several generators go together into an ``nn.ModuleDict``. Every
      other network that learns with the discriminator is an attribute whose name stands in ``discriminator_parts``.
    - `discriminator_losses` and `generator_losses` say what a batch costs: named terms with their weights, whose sum the
      player minimises, and each of which is logged as ``train/NAME``. In its turn a player works as in training, and the
      other is at rest: gradients flow through it, but neither parameters nor statistics change. The discriminator's turn
      comes first, and wants its generated images made under ``torch.no_grad()``.
    - `measure`, `report` and `predict` are as in other tasks: the losses of a batch in validation and test, figures and
      pictures at their end, what a user is told. ``self.average`` is the generator to ask there.
    - Chance comes from `draw` with the ``key`` that the two methods are given, so that two processes draw what one does.
      What a variant remembers from step to step, such as a pool of images, is a buffer or goes into the checkpoint.

    Each batch is one step of the discriminator, or a part of one where gradients are accumulated; after every
    ``discriminator_steps`` of them the generator makes one, on the same batches. ``global_step`` and ``max_steps`` count
    the generator's.

    Args:
        data: description of its data.
        backbone: of the discriminator; ``compile`` compiles both players.
        optimization: how the players are trained.
    """

    averages: ClassVar[Mapping[str, str]] = {"generator.": "average."}
    discriminator_parts: ClassVar[tuple[str, ...]] = ("backbone", "head")
    generator: nn.Module
    average: nn.Module
    objective: Objective
    health: Health | None = None  # of a variant that watches over itself, see `tell_health`
    judge: Judge | None = None  # of its images
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
        self.discriminator_steps = 0  # made so far
        self.gradient_norm = torch.zeros(())  # of the generator's last step
        self._discriminates = True
        self._batches: list[dict[str, Tensor]] = []  # of the discriminator's step that is under way
        self._terms: dict[str, list[Tensor]] = {}  # its losses, then also those of the generator's step

    def play(self, generator: nn.Module) -> None:
        """Takes in the generator, and begins its moving average.

        Args:
            generator: what makes images, float B×C×H×W in [-1, 1].
        """
        self.generator = generator
        if self.channels_last:
            generator.to(memory_format=torch.channels_last)
        self.average = deepcopy(generator).requires_grad_(False).eval()

    def discriminator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        """What the discriminator minimises, by name; nothing where it shall not learn.

        Args:
            batch: of images.
            key: what `draw` wants.
        """
        raise NotImplementedError

    def generator_losses(self, batch: dict[str, Tensor], *key: int) -> dict[str, Tensor]:
        """What the generator minimises, by name.

        Args:
            batch: one that the discriminator's last step was made of.
            key: what `draw` wants.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> dict[str, Tensor]:
        """Comes after each step of the generator; by itself, nothing is done.

        Args:
            step: the generator's steps before this one.

        Returns:
            Figures of the step to log, scalars, by name.
        """
        return {}

    def right_share(self, real: Tensor, fake: Tensor) -> Tensor:
        """The share of images that the discriminator tells right, by its scores, float each; a scalar."""
        sign, threshold = -1 if self.objective.energy else 1, self.objective.threshold
        middle = (real.mean() + fake.mean()) / 2 if threshold is None else threshold
        return ((sign * (real - middle) > 0).float().mean() + (sign * (fake - middle) < 0).float().mean()) / 2

    def tell_health(self, step: int, real: Tensor, made: Tensor, classes: Callable[[Seen], Tensor | None]) -> None:
        """Judges how the training goes, and tells: as metrics, by a warning when a failure is first seen, and by a tag.
        Ends the training if ``stop_on_failure`` says so.

        Args:
            step: the generator's steps so far.
            real: training images, uint8 N×C×S×S.
            made: what the generator makes of the same input at every look, float N×C×S×S in [-1, 1].
            classes: the probabilities by which classes are counted, float N×K, of what the judge sees; None for no count.
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
        """The rows of all processes in their order, where process r of w has the rows r, r + w, …"""
        if self.trainer.world_size == 1:
            return mine.contiguous()
        parts = gather_all_tensors(mine.contiguous())
        rows = torch.cat([torch.arange(len(part)) for part in parts])
        return torch.cat(parts)[rows.argsort(stable=True).to(self.device)]

    def as_input(self, image: Tensor) -> Tensor:
        """What a generator makes, float B×C×H×W in [-1, 1], as the discriminator sees it: as `normalize` would do."""
        return (image.float() + 1) * 127.5 * self.scale + self.shift

    def draw(self, make: Callable[[int, torch.Generator], Tensor], count: int, *key: int) -> Tensor:
        """This process's share of random numbers for a batch of all processes, which the seed and a key determine.

        Args:
            make: draws them, N×…, of a number of samples and a generator of random numbers.
            count: samples of this process.
            key: what else the numbers depend on.
        """
        world, rank = self.trainer.world_size, self.trainer.global_rank
        state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)[0]
        generator = torch.Generator().manual_seed(int(state) >> 1)
        return make(count * world, generator)[rank::world].to(self.device)

    def _names(self) -> tuple[str, ...]:
        """How the names of the discriminator's parameters begin."""
        return tuple(f"{part}." for part in self.discriminator_parts)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:  # type: ignore[override]
        """The discriminator's turn, and, when it has had its steps, the generator's."""
        first, second = cast(list[Any], self.optimizers())
        # Lightning counts the steps of all optimisers as global steps, which shall be the generator's alone.
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
        """Lets Lightning log an evaluation at the generator's last step, where it would at the number of batches."""
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, self.global_step - 1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Sets the clock for what is logged after this batch."""
        self._set_clock()

    def on_validation_epoch_end(self) -> None:
        """Sets the clock also for a training that goes on in front of its validation."""
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._set_clock()

    def _pay(self, losses: dict[str, Tensor], names: tuple[str, ...], size: int, parts: int) -> None:
        """Adds the gradients of a batch, one of so many of a step, and logs its losses."""
        penalty = self.adversarial.penalty((key, p) for key, p in self.named_parameters() if key.startswith(names))
        self.manual_backward((torch.stack([*losses.values()]).sum() + penalty) / parts)
        for name, value in losses.items():
            self.means.update(f"train/{name}", value.detach(), size)
            self._terms.setdefault(name, []).append(value.detach())

    def _parts(self, batch_idx: int) -> int:
        """Batches in the discriminator's step that this one belongs to."""
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
        """Clips, and reads the generator's gradient norm: from here on gradients are not scaled."""
        if self.gradient_clip_val:
            self.clip_gradients(optimizer, self.gradient_clip_val, "norm")
        chosen = self.optimizers(use_pl_optimizer=False)
        if optimizer is cast(list[Any], chosen)[0]:
            gradients = [p.grad for p in self.generator.parameters() if p.grad is not None]
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def configure_optimizers(self) -> Any:
        """An optimiser and a schedule for each player, the generator's first."""
        total = total_steps(self.trainer)
        if total != self.trainer.max_steps:  # counted in batches
            each = self.accumulate_grad_batches * self.adversarial.discriminator_steps
            total = total and max(1, total // each)
        generator = parameter_groups(self, ("generator.",), "generator")
        discriminator = parameter_groups(self, self._names(), "discriminator")
        for group in discriminator:
            group["lr_scale"] *= self.adversarial.discriminator_lr_scale
        players, factor = (generator, discriminator), rate_factor(self)
        return [build_optimizer(self.adversarial, groups, total, self.lr, self.monitor, factor) for groups in players]

    def configure_callbacks(self) -> list[Callback]:
        """Without an average of all weights: the generator's is kept here."""
        return [callback for callback in super().configure_callbacks() if not isinstance(callback, WeightAverage)]

    def setup(self, stage: str) -> None:
        """Compiles; tells DDP that in one player's turn the other has no gradients."""
        if stage == "fit":
            if isinstance(self.trainer.strategy, DDPStrategy):
                self.trainer.strategy._ddp_kwargs.setdefault("find_unused_parameters", True)
            if self.compile_backbone:
                several = isinstance(self.generator, nn.ModuleDict)
                for part in self.generator.children() if several else [self.generator]:
                    part.compile()
        super().setup(stage)

    def train(self, mode: bool = True) -> "AdversarialModule":
        """Training mode, but not for the average."""
        super().train(mode)
        self.average.eval()
        return self

    def on_train_epoch_end(self) -> None:
        """Steps the schedules that go by epochs."""
        super().on_train_epoch_end()
        for config in self._schedules("epoch"):
            plateau = isinstance(config.scheduler, ReduceLROnPlateau)
            config.scheduler.step(*([self.trainer.callback_metrics[str(config.monitor)]] if plateau else []))

    def _schedules(self, interval: str) -> list[Any]:
        """The schedules that go by steps or by epochs, of the players that learn."""
        known = self.trainer.lr_scheduler_configs if self._discriminates else self.trainer.lr_scheduler_configs[:1]
        return [config for config in known if config.interval == interval]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what a training needs to go on exactly."""
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
    """uint8 to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def as_uint8(image: Tensor) -> Tensor:
    """What a generator makes, float in [-1, 1], as uint8."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).byte()


def _nothing() -> None:
    pass
