"""GANs do what their parts say: losses, turns, averages, figures, health, and what a registered one is used for."""

import math
from collections import defaultdict
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import built
from loggers import Steps
from mlflow.tracking import MlflowClient
from PIL import Image
from scipy.linalg import sqrtm
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.distributions import Normal, kl_divergence

from datamodules import Digits, Digits8x8
from modules import BackboneError, GANModule, create_backbone
from modules.adversarial import (
    R1,
    AdversarialOptimization,
    BoundaryEquilibrium,
    Encoder,
    EnergyBased,
    GradientPenalty,
    Hinge,
    LeastSquares,
    NonSaturating,
    Wasserstein,
)
from modules.adversarial.health import Health
from modules.adversarial.objectives import Verdict, pulling_away, slope
from modules.adversarial.players import at_rest, follow
from modules.callbacks.publish import Report
from modules.gan.module import grown
from modules.inspection.dissection import agreement, dissect_layer, dissectible_layers, effect
from modules.measures.images import gaussian_kl
from modules.measures.sets import effective_classes, frechet_distance, kernel_distance, neighbourhoods
from modules.networks.decoders import Dense, Progressive, TransposedConvolutions, UpsampledConvolutions
from modules.networks.weights import read_weights
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.gan import gan
from pipelines.segmentation import segmentation
from pipelines.serving import evaluation, promotion, registry
from pipelines.tracking.logger import run_id_of

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--data.batch_size", "64", "--model.num_samples", "100",
         "--model.generator", "UpsampledConvolutions", "--model.generator.width", "8", "--model.backbone.options.width", "8",
         *QUIET]  # fmt: skip


def verdict(*scores: float, features: list[list[float]] | None = None) -> Verdict:
    return Verdict(torch.tensor(scores), torch.tensor(features or [[0.0]] * len(scores)))


def module(**options) -> GANModule:
    torch.manual_seed(0)
    small = {"generator": UpsampledConvolutions(8, "batch"), "backbone_options": {"width": 8}, "num_samples": 100}
    return built(GANModule, label_names=[str(k) for k in range(10)], in_chans=1, image_size=12, **small | options)


def train(gan_module: GANModule, batches: int = 4, data: Digits8x8 | None = None, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
             "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False, "max_epochs": 1,
             "limit_train_batches": batches, "limit_val_batches": 0}  # fmt: skip
    trainer = L.Trainer(**quiet | options)
    trainer.fit(gan_module, data or Digits8x8(augmentation="none", image_size=12, batch_size=16))
    return trainer


def state(part: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in part.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def test_losses_equal_values_worked_out_by_hand() -> None:
    real, fake = verdict(2.0, -0.5), verdict(0.5, -3.0)
    log = lambda x: math.log(1 / (1 + math.exp(-x)))  # noqa: E731
    expected = -(log(2.0) + log(-0.5)) / 2 - (log(-0.5) + log(3.0)) / 2
    assert float(NonSaturating().discriminator(real, fake)) == pytest.approx(expected)
    assert float(NonSaturating().generator(fake)) == pytest.approx(-(log(0.5) + log(-3.0)) / 2)
    assert float(NonSaturating(saturating=True).generator(fake)) == pytest.approx((log(-0.5) + log(3.0)) / 2)
    smooth = -(0.9 * log(2.0) + 0.1 * log(-2.0) + 0.9 * log(-0.5) + 0.1 * log(0.5)) / 2 - (log(-0.5) + log(3.0)) / 2
    assert float(NonSaturating(label_smoothing=0.1).discriminator(real, fake)) == pytest.approx(smooth)
    assert float(Hinge().discriminator(real, fake)) == pytest.approx((0 + 1.5) / 2 + (1.5 + 0) / 2)
    assert float(Hinge().generator(fake)) == pytest.approx(1.25)
    assert float(LeastSquares().discriminator(real, fake)) == pytest.approx((1 + 2.25) / 4 + (0.25 + 9) / 4)
    assert float(LeastSquares().generator(fake)) == pytest.approx((0.25 + 16) / 4)
    assert float(Wasserstein(drift=0.1).discriminator(real, fake)) == pytest.approx(-1.25 - 0.75 + 0.1 * 4.25 / 2)


def test_ebgan_pulls_features_apart() -> None:
    features = [[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]
    cosines = [0.5, 0.0, 0.5]  # squared, of the three pairs
    assert float(pulling_away(torch.tensor(features))) == pytest.approx(2 * sum(cosines) / 6)
    real, fake = verdict(0.2, 0.4, 0.3), verdict(0.5, 1.5, 0.9, features=features)
    objective = EnergyBased(margin=1.0, pull=0.3)
    assert float(objective.discriminator(real, fake)) == pytest.approx(0.3 + (0.5 + 0 + 0.1) / 3)
    assert float(objective.generator(fake)) == pytest.approx(2.9 / 3 + 0.3 * 1 / 3)


def test_began_balances_as_the_paper_says() -> None:
    objective = BoundaryEquilibrium(gamma=0.5, step=0.1)
    figures = objective.after_step(torch.tensor(2.0), torch.tensor(0.4))
    assert float(figures["balance"]) == pytest.approx(0.1 * (0.5 * 2.0 - 0.4))
    assert float(figures["convergence"]) == pytest.approx(2.0 + 0.6)
    assert float(objective.discriminator(verdict(1.0), verdict(3.0))) == pytest.approx(1.0 - 0.06 * 3.0)
    objective.after_step(torch.tensor(0.1), torch.tensor(9.0))
    assert float(objective.balance) == 0.0  # not below
    for _ in range(30):
        objective.after_step(torch.tensor(9.0), torch.tensor(0.0))
    assert float(objective.balance) == 1.0


def test_gradient_penalty_and_its_gradient_equal_those_of_a_linear_critic() -> None:
    weight = torch.tensor([3.0, 4.0, 0.0, 0.0], requires_grad=True)
    real, fake = torch.rand(5, 1, 2, 2), torch.rand(5, 1, 2, 2)
    penalty = GradientPenalty(10.0)(lambda x: x.flatten(1) @ weight, real, fake)
    assert float(penalty.detach()) == pytest.approx(10 * (5 - 1) ** 2)
    penalty.backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == pytest.approx([2 * 10 * 4 * 0.6, 2 * 10 * 4 * 0.8, 0, 0], abs=1e-4)


def test_r1_is_taken_at_real_images_and_in_full_precision() -> None:
    factor = torch.tensor(2.0, requires_grad=True)
    real = torch.rand(3, 1, 2, 2)
    score = lambda x: 0.5 * factor * x.square().flatten(1).sum(1)  # noqa: E731
    squares = real.square().flatten(1).sum(1).mean()
    penalty = R1(weight=3.0, every=4)(score, real, torch.rand(3, 1, 2, 2))
    assert float(penalty.detach()) == pytest.approx(0.5 * 3 * 4 * 4 * float(squares), rel=1e-5)
    critic = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    exact = slope(lambda x: critic(x)[:, 0], real)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = slope(lambda x: critic(x)[:, 0], real)
    assert mixed.dtype == torch.float32
    assert torch.equal(exact, mixed)


def test_a_player_at_rest_lets_gradients_through_and_changes_nothing() -> None:
    player = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Unflatten(1, (4, 1, 1)),
                           nn.BatchNorm2d(4))  # fmt: skip
    before = state(player)
    x = torch.rand(8, 4, requires_grad=True)
    with at_rest(player):
        rested = player(x)
        rested.square().sum().backward()
    assert same(before, state(player))
    assert x.grad is not None
    assert all(p.grad is None and p.requires_grad for p in player.parameters())
    active = player(x)
    assert torch.allclose(rested, active, atol=1e-2)  # by the batch's statistics
    assert not same(before, state(player))


@pytest.mark.parametrize("spectral", [False, True])
def test_a_turn_leaves_the_other_player_as_it_was(spectral: bool) -> None:
    def one(steps: int) -> tuple[GANModule, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        made = module(optimization=AdversarialOptimization(discriminator_steps=steps), spectral_norm=spectral,
                      backbone_options={"width": 8, "norm": True})  # fmt: skip
        first = state(made.generator), state(made.backbone) | state(made.head)
        train(made, 1)
        return made, *first

    alone, generator, discriminator = one(2)  # the discriminator's turn only
    assert same(generator, state(alone.generator))
    both, *_ = one(1)
    assert same(state(alone.backbone) | state(alone.head), state(both.backbone) | state(both.head))
    assert not same(generator, state(both.generator))
    assert not any(torch.equal(value, (state(alone.backbone) | state(alone.head))[key])
                   for key, value in discriminator.items() if key.endswith(("running_mean", "original1"))
                   or (key.endswith("weight") and not spectral))  # fmt: skip


class Recorder(L.Callback):
    """Keeps the generator after each batch."""

    def __init__(self) -> None:
        self.states: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.states.append(state(pl_module.generator))


def test_the_average_follows_every_step_of_the_generator_and_nothing_else() -> None:
    made = module(optimization=AdversarialOptimization(discriminator_steps=3, ema_decay=0.5))
    average, recorder = module().generator, Recorder()
    made.average.load_state_dict(average.state_dict())
    made.generator.load_state_dict(average.state_dict())
    trainer = train(made, 9, callbacks=[recorder])
    assert trainer.global_step == 3
    moved = [k for k in range(1, 9) if not same(recorder.states[k - 1], recorder.states[k])]
    assert moved == [2, 5, 8]
    player = module().generator
    for step, batch in enumerate((2, 5, 8)):
        player.load_state_dict(recorder.states[batch])
        follow(average, player, min(0.5, (1 + step) / (10 + step)))
    assert same(state(average), state(made.average))
    assert not made.average.training


def test_steps_are_the_generators() -> None:
    assert train(module(), 50, max_epochs=-1, max_steps=5).fit_loop.epoch_loop.batch_progress.total.completed == 5


def test_gradients_are_accumulated_and_clipped_for_each_player() -> None:
    made = module()
    made.accumulate_grad_batches, made.gradient_clip_val = 3, 0.01
    norms: list[float] = []

    before = made.on_before_optimizer_step

    def note(optimizer: torch.optim.Optimizer) -> None:
        before(optimizer)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(float(nn.utils.get_total_norm(gradients)))

    made.on_before_optimizer_step = note  # type: ignore[method-assign]
    trainer = train(made, 7)
    assert trainer.global_step == 3  # the last one with a single batch
    assert len(norms) == 6
    assert max(norms) <= 0.01 * 1.001
    assert float(made.gradient_norm) == pytest.approx(norms[-1])


@pytest.mark.parametrize(("accumulate", "turns"), [(1, 1), (3, 1), (1, 2), (2, 2)])
def test_figures_of_training_and_validation_stand_at_the_generators_steps(accumulate: int, turns: int) -> None:
    made = module(num_samples=16, optimization=AdversarialOptimization(discriminator_steps=turns))
    made.accumulate_grad_batches = accumulate
    logger, parts = Steps(), defaultdict(list)
    pay = made._pay

    def note(losses: dict[str, torch.Tensor], *rest: Any) -> None:
        parts[made.global_step].append({name: float(value) for name, value in losses.items()})
        pay(losses, *rest)

    made._pay = note  # type: ignore[method-assign]
    options = {"limit_val_batches": 1, "max_epochs": 2, "logger": logger, "log_every_n_steps": 1}
    steps = train(made, 8, **options).global_step
    last = [steps // 2 - 1, steps - 1]
    for key, points in logger.series.items():
        if key.startswith("val/") or key in ("train/loss", "train/generator_loss", "train/discriminator_accuracy"):
            assert [step for step, _ in points] == last, key
    assert len(logger.series["val/loss"]) == 2
    for name in ("loss", "generator_loss"):
        assert [step for step, _ in logger.series[f"train/{name}_step"]] == list(range(steps))
        for step, value in logger.series[f"train/{name}_step"]:
            of_player = [losses[name] for losses in parts[step] if name in losses][-accumulate:]
            if len(of_player) == accumulate:  # the last of an epoch may have fewer
                assert value == pytest.approx(sum(of_player) / accumulate, rel=1e-5)


def test_spectral_normalisation_bounds_the_discriminator_and_its_weights_start_another_task(tmp_path: Path) -> None:
    made = module(spectral_norm=True, objective=Hinge())
    train(made, 6)
    layers = [layer for layer in made.backbone.modules() if isinstance(layer, nn.Conv2d)]
    vectors = [layer.parametrizations.weight[0]._u.clone() for layer in layers]
    image = torch.rand(4, 1, 12, 12)
    made.eval().discriminate(image, None)
    assert all(torch.equal(u, x.parametrizations.weight[0]._u) for u, x in zip(vectors, layers, strict=True))
    made.train()
    for _ in range(30):
        made.discriminate(image, None)
    assert not torch.equal(vectors[0], layers[0].parametrizations.weight[0]._u)
    for layer in layers:
        assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=0.02)
    made.eval()
    file = tmp_path / "gan.ckpt"
    torch.save({"state_dict": made.state_dict()}, file)
    plain = create_backbone("dcgan", in_chans=1, image_size=12, num_classes=0, width=8)
    plain.load_state_dict(read_weights(file))
    assert torch.allclose(plain(image), made.backbone(image), atol=1e-5)


@pytest.mark.parametrize(("num_samples", "of_each"), [(40, 4), (1000, 50)])
def test_generated_images_are_compared_with_all_of_a_split_that_is_sorted_by_class(
    num_samples: int, of_each: int
) -> None:
    class Counting(GANModule):
        def report(self, stage):
            self.counts = torch.cat(self._image_labels).bincount(minlength=10).tolist()
            return Report()

    data = Digits(augmentation="none", image_size=12, batch_size=60)
    small = Backbone("dcgan", options={"width": 8})
    made = Counting(DataSpec(1, 12, label_names=data.label_names), small, num_samples=num_samples)
    train(made, 1, data, limit_val_batches=1.0)
    assert made.counts == [of_each] * 10


def test_figures_equal_independent_ones() -> None:
    generator = np.random.default_rng(0)
    real, fake = generator.normal(size=(60, 5)), generator.normal(0.3, 1.5, size=(50, 5))
    covariances = np.cov(real.T), np.cov(fake.T)
    root = sqrtm(covariances[0] @ covariances[1]).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    one, other = torch.from_numpy(real), torch.from_numpy(fake)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(torch.cat([one, one * 0], 1), torch.cat([other, other * 0], 1)) == pytest.approx(expected)

    mean, deviation = real.mean(0), np.sqrt(real.var(0, ddof=1).mean())
    a, b = (real - mean) / deviation, (fake - mean) / deviation
    k = lambda x, y: (x @ y / 5 + 1) ** 3  # noqa: E731
    within = [np.mean([k(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]) for x in (a, b)]
    assert kernel_distance(one, other) == pytest.approx(sum(within) - 2 * np.mean([k(x, y) for x in a for y in b]))
    still = (
        torch.zeros(60, 1, dtype=torch.float64),
        torch.ones(50, 1, dtype=torch.float64),
    )  # never seen among the real ones
    assert kernel_distance(torch.cat([one, still[0]], 1), torch.cat([other, still[1]], 1)) < 10

    def radius(x: np.ndarray, i: int) -> float:
        return float(np.sort(np.linalg.norm(x - x[i], axis=1))[3])

    figures = neighbourhoods(one, other, 3)
    balls = [[np.linalg.norm(x - y) <= radius(real, i) for y in fake] for i, x in enumerate(real)]
    around = [[np.linalg.norm(x - y) <= radius(fake, j) for j, y in enumerate(fake)] for x in real]
    assert figures["precision"] == pytest.approx(np.any(balls, 0).mean())
    assert figures["coverage"] == pytest.approx(np.any(balls, 1).mean())
    assert figures["density"] == pytest.approx(np.sum(balls, 0).mean() / 3)
    assert figures["recall"] == pytest.approx(np.any(around, 1).mean())
    assert effective_classes(torch.eye(4).repeat(3, 1)) == pytest.approx(4)
    assert effective_classes(torch.eye(4)[:1].repeat(9, 1)) == pytest.approx(1)


def test_coverage_sees_dropped_modes_that_precision_rewards() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.randn(10, 8, generator=generator)
    draw = lambda n: centres[torch.arange(n) % 10] + torch.randn(n, 8, generator=generator)  # noqa: E731
    real, whole, few = draw(500), draw(500), draw(500)
    few = few[torch.arange(500) % 10 < 2]
    assert neighbourhoods(real, few)["precision"] > 0.9
    assert neighbourhoods(real, whole)["coverage"] > 0.9
    assert neighbourhoods(real, few)["coverage"] < 0.25


def look(health: Health, step: int, accuracy: float, norm: float, moved: float, **figures: float) -> list[str]:
    for k in range(step - health.every + 1, step + 1):
        health.note(k, torch.tensor(accuracy), torch.tensor(norm))
    images = torch.zeros(2, 1, 2, 2)
    images[:] = moved * step
    health.check(step, {"diversity": 0.9, "coverage": 0.6, "classes": 0.9} | figures, images, spread=2.0)
    return health.failing()


def test_health_names_each_failure_after_the_grace_and_not_before() -> None:
    well = Health(100)
    assert [look(well, step, 0.8, 1.0, 0.001) for step in range(100, 1000, 100)] == [[]] * 9
    collapsed = Health(100)
    seen = [look(collapsed, step, 0.8, 1.0, 0.001, diversity=0.3) for step in range(100, 700, 100)]
    assert seen == [[], [], [], [], ["mode collapse"], ["mode collapse"]]
    assert look(collapsed, 700, 0.8, 1.0, 0.001) == []  # it recovered
    vanished = Health(100)
    norms = [1.0, 0.3, 0.01, 0.01]
    seen = [look(vanished, 100 * k, 1.0, norm, 0.0) for k, norm in enumerate(norms, 1)]
    assert seen == [[], [], ["diminished gradient"], ["diminished gradient"]]
    restless = Health(100)
    seen = [look(restless, step, 0.8, 1.0, 0.01) for step in range(100, 600, 100)]
    assert seen == [[], [], [], [], ["non-convergence"]]
    settling, place = Health(100), 0.0
    for k, moved in enumerate([0.0, 0.95, 0.7, 0.62, 0.55, 0.5, 0.45], 1):
        place += moved
        assert look(settling, 100 * k, 0.8, 1.0, place / (100 * k)) == []


def test_health_goes_on_where_it_was_saved() -> None:
    whole, cut = Health(100), Health(100)
    for step in (100, 200, 300):
        for health in (whole, cut):
            look(health, step, 0.8, 1.0, 0.01)
    other = Health(100)
    other.restore(cut.state())
    for step in (400, 500):
        assert look(whole, step, 0.8, 1.0, 0.01) == look(other, step, 0.8, 1.0, 0.01)
    assert whole.failing() == ["non-convergence"]


@pytest.mark.parametrize("side", [8, 28, 32, 64, 128])
def test_networks_grow_with_the_images(side: int) -> None:
    for decoder in (TransposedConvolutions(4, "batch"), UpsampledConvolutions(4, "pixel"), Dense([8])):
        made = GANModule(
            DataSpec(label_names=None, image_size=side),
            Backbone("dcgan", options={"width": 4}),
            generator=decoder,
            latent_size=8,
        )
        image = made.generator(torch.randn(2, 8))
        assert image.shape == (2, 3, side, side)
        assert made.discriminate(made.as_input(image), None).score.shape == (2,)


def watched(stop: bool = False, **options) -> tuple[GANModule, L.Trainer]:
    made = built(
        GANModule,
        label_names=[str(k) for k in range(10)],
        in_chans=1,
        image_size=12,
        num_samples=100,
        stop_on_failure=stop,
        **options,
    )
    data = Digits8x8(augmentation="none", image_size=12, batch_size=64)
    return made, train(made, 600, data=data, max_epochs=-1, max_steps=600)


def adam(lr: float, *betas: float, **options: float) -> AdversarialOptimization:
    return AdversarialOptimization(partial(torch.optim.Adam, lr=lr, betas=betas), **options)


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "options"), [
    ("diminished gradient", {"objective": NonSaturating(saturating=True), "generator": UpsampledConvolutions(16),
                             "optimization": adam(1e-5, 0.5, 0.999, discriminator_lr_scale=200)}),
    ("mode collapse", {"generator": UpsampledConvolutions(16), "optimization": adam(2e-3, 0.5, 0.999, discriminator_lr_scale=0.0)}),
    ("non-convergence", {"generator": UpsampledConvolutions(16, "batch"), "optimization": adam(0.01, 0.9, 0.9)}),
    ("", {"generator": UpsampledConvolutions(16, "batch"), "regularizer": R1()}),
    ("", {"generator": UpsampledConvolutions(16, "batch"), "objective": Hinge(), "spectral_norm": True,
          "optimization": adam(5e-4, 0.0, 0.9, discriminator_lr_scale=2)}),
])  # fmt: skip
def test_a_training_made_to_fail_is_named_and_a_healthy_one_is_not(failure: str, options: dict) -> None:
    L.seed_everything(1)
    made, _ = watched(**options, backbone_options={"width": 16})
    assert made.health.found.keys() >= {failure} if failure else not made.health.found, made.health.found


def test_a_failing_training_can_end_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.adversarial.health.PATIENCE", 1)
    monkeypatch.setattr("modules.adversarial.health.GRACE", 5)
    made = module(stop_on_failure=True, health_every=10)
    with pytest.warns(UserWarning, match="Mode collapse at the generator's step 10"):
        trainer = train(made, 40, max_epochs=2)
    assert trainer.should_stop
    assert trainer.global_step < 80


def test_trains_in_half_precision() -> None:
    made = module(regularizer=R1(every=1), conditional=True)
    before = state(made.generator)
    train(made, 2, precision="bf16-mixed")
    assert not same(before, state(made.generator))
    assert all(value.isfinite().all() for value in made.state_dict().values())


@pytest.mark.slow
def test_compiled_players_train_as_plain_ones() -> None:
    compiled, plain = (module(regularizer=R1(every=2), compile=wanted) for wanted in (True, False))
    for made in (compiled, plain):
        train(made, 3)
    for key, value in plain.state_dict().items():
        assert torch.allclose(value.float(), compiled.state_dict()[key].float(), atol=1e-3), key


def test_growing_networks_fade_in_without_a_jump() -> None:
    made = GANModule(DataSpec(label_names=None, in_chans=1, image_size="28x44"), Backbone("progressive", options={"width": 8}), generator=Progressive(8), growth=10, latent_size=16)  # fmt: skip
    phases = [grown(step, 10) for step in range(61)]
    assert phases[:12] == pytest.approx([0] * 11 + [0.1])
    assert phases[20] == 1
    assert max(b - a for a, b in pairwise(phases)) == pytest.approx(0.1)
    noise, image = torch.randn(3, 16), torch.randn(3, 1, 28, 44)

    def at(phase: float) -> tuple[torch.Tensor, torch.Tensor]:
        for part in (made.generator.decoder, made.backbone):
            part.phase.fill_(phase)
        return made.generator(noise), made.discriminate(image, None).score

    for seam in (1.0, 2.0):
        for below, on in zip(at(seam - 1e-5), at(seam), strict=True):
            assert torch.allclose(below, on, atol=1e-3)
    for below, above in zip(at(1.0), at(1 + 1e-5), strict=True):
        assert torch.allclose(below, above, atol=1e-3)
    real = made.normalize(torch.randint(0, 256, (2, 1, 28, 44), dtype=torch.uint8))
    coarse = made.generator.decoder.coarsened
    at(2.0)
    assert torch.equal(coarse(real), real)
    at(1.5)  # half of it as the discriminator reduces it, half in full
    half = torch.nn.functional.avg_pool2d(real, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert torch.allclose(coarse(real), (half + real) / 2, atol=1e-5)
    coarse = at(0.0)[0]
    assert torch.equal(coarse, coarse[..., ::4, ::4].repeat_interleave(4, 2).repeat_interleave(4, 3))
    assert not torch.allclose(at(0.0)[0], at(2.0)[0], atol=1e-2)


def test_a_progressive_pair_grows_with_the_generators_steps() -> None:
    made = module(backbone="progressive", generator=Progressive(8), growth=2)
    train(made, 4)
    parts = (made.generator.decoder, made.backbone, made.average.decoder)
    assert [float(part.phase) for part in parts] == pytest.approx([0.5] * 3)
    with pytest.raises(BackboneError, match="can grow"):
        module(backbone="progressive", growth=2)


def test_the_discriminator_sees_generated_images_as_it_sees_real_ones() -> None:
    made = GANModule(DataSpec(label_names=None, image_size=32), Backbone("resnet18"))
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(made.as_input(image.float() / 127.5 - 1), made.normalize(image), atol=1e-5)


def test_a_conditional_discriminator_projects_on_the_class() -> None:
    made = module(conditional=True)
    image, label = torch.rand(3, 1, 12, 12), torch.tensor([1, 4, 4])
    features = made.backbone(image)
    head = made.head
    expected = features @ head.linear.weight[0] + head.linear.bias + (head.embedding.weight[label] * features).sum(1)
    assert torch.allclose(made.discriminate(image, label).score, expected, atol=1e-5)
    assert not torch.equal(made(torch.zeros(1, 64), label[:1]), made(torch.zeros(1, 64), label[1:2]))


@pytest.mark.parametrize(("options", "words"), [
    ({"backbone_options": {"norm": True}, "regularizer": GradientPenalty()}, "without batch normalisation"),
    ({"label_names": ["only"], "conditional": True}, "needs images with classes"),
    ({"objective": EnergyBased(), "conditional": True}, "does not depend on their class"),
    ({"latent_size": 0}, "latent_size"),
    ({"encoder": Encoder(), "conditional": True}, "--model.encoder encodes the whole image"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        built(GANModule, **{"label_names": ["a", "b"], "in_chans": 1, "image_size": 12} | options)


def test_rebuilt_from_its_description_it_makes_the_same_images() -> None:
    made = module(objective=BoundaryEquilibrium(0.4), discriminator_decoder=Dense([8])).eval()
    again = GANModule.from_architecture(made.architecture).eval()
    again.load_state_dict(made.state_dict())
    assert torch.equal(made.sample(5, 3), again.sample(5, 3))
    assert not torch.equal(made.sample(5, 3), made.sample(5, 4))
    assert torch.equal(made.sample(5, 3)[:2], made.sample(2, 3))


def test_learns_sixteen_images_by_heart() -> None:
    made = module(regularizer=R1(1, 4), optimization=AdversarialOptimization(lr=2e-3, ema_decay=0.9), latent_size=16,
                  generator=UpsampledConvolutions(16, "batch"), backbone_options={"width": 16})  # fmt: skip
    data = Digits8x8(augmentation="none", image_size=12, batch_size=16)
    unseen = data.samples("val", 50)["image"]
    few = np.linspace(0, len(data.sources["train"]) - 1, 16).astype(int)
    data.sources["train"] = data.sources["train"].subset(np.tile(few, 300))
    known = data.samples("train", 4800)["image"][:16].flatten(1).float()
    reach = lambda x: torch.cdist(x.flatten(1).float(), known).min(1).values.mean()  # noqa: E731
    assert reach(made.eval().sample(32)) > 1.3 * reach(unseen)
    train(made, 300, data=data)
    assert reach(made.eval().sample(32)) < 0.9 * reach(unseen)


def test_every_objective_trains_both_players() -> None:
    for objective, options in (
        (Wasserstein(), {"regularizer": GradientPenalty()}), (LeastSquares(), {}), (EnergyBased(), {}),
        (BoundaryEquilibrium(), {"discriminator_decoder": TransposedConvolutions(8)}), (Hinge(), {"conditional": True}),
        (NonSaturating(), {"regularizer": GradientPenalty(), "encoder": Encoder("mlp", weight=0.1)}),
    ):  # fmt: skip
        made = module(objective=objective, **options)
        before = state(made.generator)
        train(made, 2)
        assert not same(before, state(made.generator)), type(objective)
        assert all(value.isfinite().all() for value in made.state_dict().values())


def test_a_vae_gan_gives_each_player_what_the_paper_says() -> None:
    mean, log_variance = torch.randn(3, 8), torch.randn(3, 8)
    distributions = Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros(8), torch.ones(8))
    assert torch.allclose(gaussian_kl(mean, log_variance), kl_divergence(*distributions), atol=1e-5)

    made = module(encoder=Encoder("mlp", weight=0.25), latent_size=8, generator=UpsampledConvolutions(8))
    image = Digits8x8(augmentation="none", image_size=12).samples("train", 6)["image"]
    noise, drawn = torch.randn(6, 8), torch.randn(6, 8)
    made._noise = lambda count, *key: drawn if key[-1] == 2 else noise  # type: ignore[method-assign]
    made.generator_losses({"image": image}, 0)
    encoder, decoder = made.generator.encoder, made.generator.decoder
    with at_rest(made.backbone, made.head):
        torch.stack([*made.generator_losses({"image": image}, 0).values()]).sum().backward()
    found = [{name: p.grad for name, p in part.named_parameters()} for part in (encoder, decoder)]

    mean, log_variance = encoder(image)
    code = mean + (0.5 * log_variance).exp() * drawn

    def likeness(of: torch.Tensor) -> torch.Tensor:
        real = made.discriminate(made.normalize(image), None).features.detach()
        variance = real.var(0, correction=0).mean()
        return (
            (made.discriminate(made.as_input(made.generator(of)), None).features - real).square().sum()
            / 2
            / 6
            / variance
        )

    def grad(loss: torch.Tensor, part: nn.Module) -> dict[str, torch.Tensor]:
        return dict(zip(dict(part.named_parameters()), torch.autograd.grad(loss, [*part.parameters()]), strict=True))

    fake = made.discriminate(made.as_input(made.generator(torch.cat([code.detach(), noise]))), None)
    expected = [
        grad(
            likeness(code) + kl_divergence(Normal(mean, (0.5 * log_variance).exp()), distributions[1]).sum() / 6,
            encoder,
        ),
        grad(0.25 * likeness(code.detach()) + NonSaturating().generator(fake), decoder),
    ]
    for mine, other in zip(found, expected, strict=True):
        for name, value in other.items():
            assert torch.allclose(mine[name], value, rtol=1e-3, atol=1e-5), name
    again = GANModule.from_architecture(made.architecture)
    again.load_state_dict(made.state_dict())
    assert torch.equal(made.eval().reconstruct(image), again.eval().reconstruct(image))


def test_a_registered_one_makes_samples_and_starts_a_classifier(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    few = ["--trainer.limit_train_batches", "5"]
    cli = gan(["fit", *SMALL, *few, "--model.conditional", "true", "--trainer.max_epochs", "2", "--register", "maker",
               "--output", "out"])  # fmt: skip
    assert cli.model.monitor == "val/fd_lenet5"
    run = MlflowClient().get_run(run_id_of("out"))
    assert {"test/fd_lenet5", "test/fd_floor_lenet5", "test/coverage_lenet5", "test/classes_lenet5",
            "test/novelty_lenet5"} <= set(run.data.metrics)  # fmt: skip
    assert run.data.tags["extractor"].startswith("lenet5 ")
    pictures = {file.path for file in MlflowClient().list_artifacts(run.info.run_id, "films")}
    assert pictures == {"films/val_samples.gif"}
    assert Image.open("out/val_samples.gif").n_frames == 2

    gan.main(["sample", "models:/maker/1", "--out", "one", "--count", "3", "--seed", "5", "--label", "7"])
    gan.main(["sample", "models:/maker/1", "--out", "two", "--count", "3", "--seed", "5", "--label", "7"])
    files = sorted(Path("one/7").glob("*.png"))
    assert len(files) == 3
    assert all(file.read_bytes() == Path("two/7", file.name).read_bytes() for file in files)
    with pytest.raises(SystemExit) as end:
        gan.main(["sample", "models:/maker/1", "--label", "x"])
    assert end.value.code == 2
    assert "knows no class 'x'; it knows 0, 1" in capsys.readouterr().err

    again = evaluation.evaluate(registry.model_folder("models:/maker/1"), accelerator="cpu")
    assert {"test/fd_lenet5", "test/coverage_lenet5"} <= set(again)  # by an extractor that is trained anew
    promotion.promote("maker")
    classification(["fit", "--data", "Digits8x8", "--data.image_size", "12", *QUIET, *few, "--trainer.max_epochs", "1",
                    "--model.backbone", "models:/maker@champion", "--output", "next", "--register", "judge"])  # fmt: skip
    with pytest.raises(SystemExit):
        gan.main(["sample", "models:/judge/1"])
    assert "is a ClassificationModule" in capsys.readouterr().err

    segmentation(["fit", "--data", "DigitMasks", "--data.scene_size", "32", "--data.in_chans", "1", "--data.train", "16",
                  "--data.val", "4", "--data.test", "4", "--model.backbone", "resnet10t", "--trainer.max_epochs", "1",
                  "--output", "seen", "--register", "seer", *QUIET])  # fmt: skip
    gan.main(["dissect", "models:/maker/1", "models:/seer/1", "--count", "16", "--units", "2"])
    effects = pd.read_csv("dissection/effects.csv", index_col="class")
    assert len(effects) == 11
    assert np.allclose(effects["causal"], effects["on"] - effects["off"], atol=2e-4)
    assert len(pd.read_csv("dissection/units.csv")) == 8
    assert Image.open("dissection/dissection.png").width > 8 * 84
    gan.main(["enrich", "models:/maker/1", "--real", "[2, 5000]", "--generated", "3",
             "--steps", "2", "--seeds", "2"])  # fmt: skip
    rows = pd.read_csv("enriched.csv").groupby(["real", "images"]).size()
    most = int(np.bincount(Digits8x8().sources["train"].labels).min())
    assert rows.to_dict() == {(0, "generated"): 2} | {(n, kind): 2 for n in (2, most) for kind in ("real", "both")}
    assert "2 seeds" in capsys.readouterr().out
    added = {
        file.path
        for folder in ("dissection", "enriched")
        for file in MlflowClient().list_artifacts(run.info.run_id, folder)
    }
    assert added >= {"dissection/effects.csv", "dissection/dissection.png", "enriched/enriched.csv"}
    with pytest.raises(SystemExit):
        gan.main(["enrich", "models:/maker/1", "--data", "FashionMNIST"])
    assert "must make images of the classes of the data, T-shirt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gan.main(["dissect", "models:/maker/1", "models:/judge/1"])
    assert "a segmentation model says what is in the images" in capsys.readouterr().err

    named = gan(["test", *SMALL, "--model.conditional", "true", "--output", "again", "--ckpt_path", "out/best.ckpt",
                 "--model.extractor", "models:/judge/1"])  # fmt: skip
    assert "test/fd_judge_1" in named.rows
    assert "test/classes_judge_1" in named.rows
    judge = registry.load("models:/judge/1").module
    image = torch.randint(0, 256, (3, 1, 12, 12), dtype=torch.uint8)
    seen = named.model.judge.extractor(image)
    assert seen.probabilities is not None
    assert torch.allclose(seen.probabilities, F.softmax(judge(image), 1), atol=1e-4)
    assert not any(key.startswith("_extractor") for key in named.model.state_dict())


class Painter(nn.Module):
    """Three units, of which the first paints a square where the noise is positive, and the others do nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.units = nn.Sequential(nn.Identity(), nn.ReLU())

    def forward(self, noise: torch.Tensor, label: torch.Tensor | None) -> torch.Tensor:
        maps = torch.zeros(len(noise), 3, 8, 8)
        maps[:, 0, 2:5, 3:6] = noise[:, :1, None].sign()
        maps[:, 1] = 0.1
        maps[:, 2] = noise[:, 1:2, None] + torch.arange(8.0)
        return 2 * self.units(maps)[:, :1] - 1


def test_dissection_finds_the_unit_that_makes_a_class_and_only_that_one_matters() -> None:
    torch.manual_seed(0)
    painter, segment = Painter(), lambda image: (image[:, 0] > 0).long()
    batches = [(torch.randn(64, 2), None) for _ in range(2)]
    assert dissectible_layers(painter, batches[0][0], None) == ["units.1"]
    layer = dissect_layer(painter, "units.1", batches, segment, 2)
    assert layer.best(1, 1) == [0]
    assert layer.iou[0, 1] == pytest.approx(1)
    assert 0 <= layer.threshold[0, 1] < 1
    assert layer.on[0] == pytest.approx(torch.tensor([0.0, 1.0]))
    assert layer.iou[2, 1] < 0.3
    painted = torch.cat([noise[:, 0] > 0 for noise, _ in batches]).double().mean() * 9 / 64
    found = effect(painter, layer, 1, [0], batches, segment)
    assert (found.plain, found.off, found.on) == (pytest.approx(float(painted)), 0, 1)
    assert found.control == found.plain
    assert found.causal == 1


def test_agreement_of_units_and_classes_equals_an_independent_one() -> None:
    generator = np.random.default_rng(0)
    one, other = generator.random(1000) < 0.3, generator.random(1000) < 0.2
    other |= one & (generator.random(1000) < 0.5)
    counts = [torch.tensor([int(n)]) for n in ((one & other).sum(), one.sum(), other.sum())]
    quality, iou = agreement(*counts, 1000)
    joint = np.bincount(2 * one + other, minlength=4) / 1000
    assert float(quality) == pytest.approx(mutual_info_score(one, other) / -(joint * np.log(joint)).sum())
    assert float(iou) == pytest.approx((one & other).sum() / (one | other).sum())
    nothing = torch.zeros(1, dtype=torch.int64)
    assert [float(value) for value in agreement(nothing, nothing, nothing, 1000)] == [0, 0]
