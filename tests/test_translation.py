"""Image translation does what CycleGAN and StarGAN say; its data have the answer that is claimed for them."""

import base64
import io
import json
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import built, start
from mlflow.tracking import MlflowClient
from PIL import Image
from torch import Tensor, nn

from datamodules import DigitAttributes, Digits, DigitTextures, DomainFolder
from datamodules.domains import DomainDataset, DomainSource, with_stroke
from modules import BackboneError, TranslationModule, create_backbone
from modules.adversarial import R1, AdversarialOptimization, EnergyBased, GradientPenalty, NonSaturating, Wasserstein
from modules.adversarial.base import as_uint8
from modules.spec import DataSpec
from modules.translation import ResidualTranslator
from modules.translation.translators import ImagePool, domain_of, values_of
from pipelines.engine.command import command
from pipelines.predict import predict
from pipelines.tracking.logger import run_id_of
from pipelines.translation import translation

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SMALL = ["--data.augmentation", "none", "--data.image_size", "12x16", "--data.batch_size", "16", "--model.judge_steps", "5",
         "--model.translator", "ResidualTranslator", "--model.translator.width", "4", "--model.translator.blocks", "1",
         "--model.backbone.options.width", "4", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "2",
         "--trainer.limit_test_batches", "2", "--trainer.max_epochs", "1", *QUIET]  # fmt: skip
ATTRIBUTES = {"colour": ["red", "green", "blue"], "stroke": ["thin", "thick"]}


def module(**options) -> TranslationModule:
    torch.manual_seed(0)
    small = {"translator": ResidualTranslator(4, 1), "backbone_options": {"width": 4}, "judge_steps": 5}
    return built(TranslationModule, label_names=["a", "b"], in_chans=3, image_size=12, **small | options)


def shared(**options) -> TranslationModule:
    torch.manual_seed(0)
    small = {"translator": ResidualTranslator(4, 1), "backbone_options": {"width": 4}, "judge_steps": 5}
    return built(TranslationModule, label_names=[f"{c} {s}" for c in ATTRIBUTES["colour"] for s in ATTRIBUTES["stroke"]], attributes=ATTRIBUTES, in_chans=3, image_size=12, shared=True, **small | options)  # fmt: skip


def train(made: TranslationModule, batches: int, data: DigitTextures | None = None, **options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
             "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False, "max_epochs": 1,
             "limit_train_batches": batches, "limit_val_batches": 0}  # fmt: skip
    trainer = L.Trainer(**quiet | options)
    trainer.fit(made, data or DigitTextures(augmentation="none", image_size=12, batch_size=8), weights_only=True)
    return trainer


def state(*parts: nn.Module) -> list[Tensor]:
    return [value.clone() for part in parts for value in part.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# The data


@pytest.fixture(scope="module")
def textures() -> DigitTextures:
    return DigitTextures(augmentation="none")


@pytest.fixture(scope="module")
def coloured() -> DigitAttributes:
    return DigitAttributes(augmentation="none")


def test_the_known_answer_is_the_same_each_time_and_no_digit_is_in_two_domains(
    textures: DigitTextures, coloured: DigitAttributes
) -> None:
    splits = Digits().sources
    assert all(DigitTextures(seed=3).sources[name].digest == textures.sources[name].digest for name in splits)
    for data in (textures, coloured):
        for name, digits in splits.items():
            source = data.sources[name]
            assert len(source) == len(digits)
            assert np.array_equal(source.contents, digits.labels)
            counts = np.bincount(source.labels * 10 + source.contents)
            assert counts.max() - counts.min() <= 0.5 * counts.mean()  # of each digit about as many in each domain
    digits, source = splits["val"], textures.sources["val"]
    grey, textured = source.labels == 0, source.labels == 1
    assert np.array_equal(source.images[grey], digits.images[grey].repeat(3, 3))
    luma = source.images[textured] @ np.array([0.299, 0.587, 0.114])
    ink = digits.images[textured][..., 0]
    assert all(one[i > 250].min() - one[i == 0].max() > 80 for one, i in zip(luma, ink, strict=True))


def test_attributes_are_those_of_the_picture(coloured: DigitAttributes) -> None:
    assert coloured.num_classes == 8
    source = coloured.sources["val"]
    colour, stroke = np.divmod(source.labels, 2)
    strongest = source.images.astype(float).sum((1, 2))
    named = {0: lambda r, g, b: r > 1.5 * max(g, b), 1: lambda r, g, b: g > 1.3 * max(r, b),
             2: lambda r, g, b: b > 1.3 * max(r, g), 3: lambda r, g, b: min(r, g) > 1.5 * b}  # fmt: skip
    assert all(named[k](*rgb) for k, rgb in zip(colour, strongest, strict=True))
    ink = (source.images.max(3) > 90).sum((1, 2))
    for digit in range(10):
        thin, thick = (ink[(source.contents == digit) & (stroke == k)] for k in (0, 1))
        assert thick.mean() > 1.7 * thin.mean()
    bar = np.zeros((28, 28), np.uint8)
    bar[4:24, 11:17] = 255
    for width in (1.6, 4.2, 9.0):
        drawn = with_stroke(bar, width)[14].astype(float).sum() / 255
        assert drawn == pytest.approx(width, abs=0.5)


def test_each_batch_holds_all_domains_alike_also_on_several_processes() -> None:
    labels = np.array([0] * 10 + [1] * 24 + [2] * 7)
    source = DomainSource(np.zeros((41, 4, 4, 3), np.uint8), labels, labels)
    dataset = DomainDataset(source, None, 0)
    order = dataset.order(np.random.default_rng(0))
    assert len(order) == dataset.epoch_size == 72
    assert sorted(order[labels[order] == 1]) == list(range(10, 34))  # of the largest, each once
    assert set(order) == set(range(41))
    assert all(np.bincount(labels[piece]).tolist() == [2, 2, 2] for piece in order.reshape(-1, 6))
    two = DomainSource(source.images[:20], labels[:20], labels[:20])
    order = DomainDataset(two, None, 0).order(np.random.default_rng(0))
    for world in (2, 4):
        for rank in range(world):
            for piece in order[: len(order) // (2 * world) * 2 * world].reshape(-1, 2 * world):
                assert sorted(two.labels[piece[rank::world]]) == [0, 1]


# The networks


@pytest.mark.parametrize("side", [8, 27, 28, 64, 130])
def test_translators_follow_the_size_of_images(side: int) -> None:
    network = ResidualTranslator(2, 1)
    network.build(5, 3)
    assert network(torch.rand(2, 5, side, side)).shape == (2, 3, side, side)


@pytest.mark.parametrize(("side", "patch"), [(28, 16), (64, 34), (128, 70)])
def test_a_patch_has_the_published_width(side: int, patch: int) -> None:
    options = {"backbone_options": {"width": 2, "norm": False}, "translator": ResidualTranslator(1, 0)}
    made = built(TranslationModule, label_names=["a", "b"], in_chans=1, image_size=side, **options)
    image = torch.rand(1, 1, side, side, requires_grad=True)
    score, _ = made.discriminate(image, torch.tensor([0]))
    count = int(score.score.shape[1] ** 0.5)
    score.score.view(count, count)[count // 2, count // 2].backward()
    assert image.grad is not None
    rows = image.grad[0, 0].abs().sum(1).nonzero()
    assert int(rows.max() - rows.min()) + 1 == patch


def test_patchgan_is_a_backbone_like_others() -> None:
    assert create_backbone("patchgan", in_chans=3, image_size=64, width=8)(torch.rand(2, 3, 64, 64)).shape == (2, 32)
    maps = create_backbone("patchgan", in_chans=3, image_size=128, features_only=True, width=8)
    assert [m.shape[1:] for m in maps(torch.rand(1, 3, 128, 128))] == [(8, 64, 64), (16, 32, 32), (64, 16, 16)]


def test_each_image_goes_through_the_networks_of_its_domain() -> None:
    made = module(channels_last=False)
    image, domain = torch.rand(5, 3, 12, 12) * 2 - 1, torch.tensor([1, 0, 0, 1, 0])
    first, second = made.generator.values()
    expected = torch.stack([(first, second)[d](x[None])[0].tanh() for x, d in zip(image, domain.tolist(), strict=True)])
    assert torch.allclose(made.generator(image, domain), expected, atol=1e-5)
    bodies = made.backbone, made.others[0]
    scores = [made.head["scores"][d](bodies[d].forward_features(x[None])).flatten()
              for x, d in zip(image, domain.tolist(), strict=True)]  # fmt: skip
    assert torch.allclose(made.discriminate(image, domain)[0].score, torch.stack(scores), atol=1e-5)


def test_a_shared_generator_is_told_the_values_by_planes() -> None:
    sizes = [3, 2]
    domain = torch.arange(6)
    assert values_of(domain, sizes).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 0], [2, 1]]
    assert torch.equal(domain_of(values_of(domain, sizes), sizes), domain)
    made = shared()
    seen: list[Tensor] = []
    made.generator.translator.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    image = torch.rand(2, 3, 12, 12)
    made.generator(image, torch.tensor([1, 4]))
    assert torch.equal(seen[0][:, :3], image)
    assert seen[0][:, 3:, 5, 7].tolist() == [[1, 0, 0, 0, 1], [0, 0, 1, 1, 0]]
    both = made.generator(image[:1].repeat(2, 1, 1, 1), torch.tensor([1, 4]))
    assert not torch.allclose(both[0], both[1], atol=1e-3)  # it is not normalised away
    assert torch.equal(made.asked(torch.tensor([1, 4]), ["green"]), torch.tensor([3, 2]))
    assert torch.equal(made.asked(torch.tensor([1, 4]), ["green", "thick"]), torch.tensor([3, 3]))


def test_the_pool_gives_back_what_it_was_given_before() -> None:
    image = lambda *values: torch.tensor(values, dtype=torch.uint8)[:, None, None, None]  # noqa: E731
    pool, zero = ImagePool(2), torch.zeros
    assert pool.exchange(image(1, 2, 9), torch.tensor([0, 0, 1]), zero(3, 2)).flatten().tolist() == [1, 2, 9]
    draws = torch.tensor([[0.7, 0.0], [0.2, 0.9], [0.2, 0.9]])
    given = pool.exchange(image(3, 4, 5), torch.tensor([0, 0, 0]), draws)
    assert given.flatten().tolist() == [3, 2, 4]  # 3 passes, 4 takes the place of 2, 5 that of 4
    again = ImagePool(2)
    again.restore(pool.state())
    for one in (pool, again):
        given = one.exchange(image(6, 7), torch.tensor([0, 1]), torch.tensor([[0.1, 0.6], [0.1, 0.0]]))
        assert given.flatten().tolist() == [5, 7]  # of the other domain there were not two yet
    assert ImagePool(0).exchange(image(3), torch.tensor([0]), zero(1, 2)).flatten().tolist() == [3]


# The losses


class Scaled(nn.Module):
    """A generator whose translations can be worked out by hand."""

    factors = torch.tensor([0.5, 0.8])

    def forward(self, image: Tensor, domain: Tensor) -> Tensor:
        return image * self.factors[domain][:, None, None, None]


def test_losses_of_cyclegan_equal_values_worked_out_by_hand() -> None:
    made = module()
    image, domain = torch.full((2, 3, 12, 12), 204, dtype=torch.uint8), torch.tensor([0, 1])  # 0.6 in [-1, 1]
    with torch.no_grad():
        terms, fake, back = made.costs(Scaled(), image, domain, 1 - domain)
    assert fake[:, 0, 0, 0].tolist() == pytest.approx([0.48, 0.3])
    assert back[:, 0, 0, 0].tolist() == pytest.approx([0.24, 0.24])
    assert float(terms["cycle_loss"]) == pytest.approx(10 * (0.6 - 0.24))
    assert float(terms["identity_loss"]) == pytest.approx(5 * (0.3 + 0.12) / 2)
    first = made.head["scores"][0](made.backbone.forward_features(made.as_input(fake[1:])))
    second = made.head["scores"][1](made.others[0].forward_features(made.as_input(fake[:1])))
    patches = torch.cat([first, second]).flatten().tolist()
    assert float(terms["generator_loss"]) == pytest.approx(sum(0.5 * (p - 1) ** 2 for p in patches) / len(patches))
    assert set(module(identity=0).costs(Scaled(), image, domain, 1 - domain)[0]) == {"generator_loss", "cycle_loss"}


def test_losses_of_stargan_equal_values_worked_out_by_hand() -> None:
    made = shared(identity=0, domain=2.0, objective=Wasserstein(), pool=0)
    image = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8)
    domain, wanted = torch.tensor([0, 5, 3, 2]), torch.tensor([4, 1, 3, 0])
    terms, fake, _ = made.costs(made.generator, image, domain, wanted)
    verdict, logits = made.discriminate(made.as_input(fake), wanted)
    assert logits is not None
    expected = F.cross_entropy(logits[:, :3], wanted // 2) + F.cross_entropy(logits[:, 3:], wanted % 2)
    assert float(terms["wanted_domain_loss"].detach()) == pytest.approx(2 * float(expected.detach()), rel=1e-5)
    assert float(terms["generator_loss"].detach()) == pytest.approx(-float(verdict.score.mean().detach()), rel=1e-5)

    made.draw = lambda make, count, *key: torch.full((count, 4), 0.99)  # type: ignore[method-assign]  # domain 5
    losses = made.discriminator_losses({"image": image, "label": domain}, 0)
    real, logits = made.discriminate(made.normalize(image), domain)
    assert logits is not None
    fives = torch.full_like(domain, 5)
    fake = made.normalize(as_uint8(made.generator(image.float() / 127.5 - 1, fives)))
    other, _ = made.discriminate(fake, fives)
    truth = F.cross_entropy(logits[:, :3], domain // 2) + F.cross_entropy(logits[:, 3:], domain % 2)
    assert float(losses["domain_loss"].detach()) == pytest.approx(float(truth.detach()), rel=1e-5)
    drift = 0.001 * real.score.square().mean()
    assert float(losses["loss"].detach()) == pytest.approx(
        float((other.score.mean() - real.score.mean() + drift).detach()), abs=1e-5
    )


def test_wanted_domains_are_others_or_any() -> None:
    domain, uniform = torch.arange(2).repeat(50), torch.rand(100, 1)
    assert torch.equal(module().wanted(domain, uniform), 1 - domain)
    three = TranslationModule(
        DataSpec(label_names=["a", "b", "c"], image_size=12, attributes=None), translator=ResidualTranslator(1, 0)
    )
    wanted = three.wanted(torch.arange(3).repeat(40), torch.rand(120, 1))
    assert not (wanted == torch.arange(3).repeat(40)).any()
    assert sorted(wanted.unique().tolist()) == [0, 1, 2]
    assert sorted(shared().wanted(torch.zeros(200, dtype=torch.long), torch.rand(200, 2)).unique().tolist()) == list(
        range(6)
    )


# Training


def test_a_turn_leaves_the_other_player_as_it_was() -> None:
    def one(steps: int) -> tuple[TranslationModule, list[Tensor], list[Tensor]]:
        made = module(optimization=AdversarialOptimization(discriminator_steps=steps))
        before = state(made.generator), state(made.backbone, made.others, made.head)
        train(made, 1)
        return made, *before

    alone, generator, discriminator = one(2)  # the discriminator's turn only
    assert same(generator, state(alone.generator))
    both, *_ = one(1)
    learned = state(alone.backbone, alone.others, alone.head)
    assert same(learned, state(both.backbone, both.others, both.head))
    assert not any(torch.equal(a, b) for a, b in zip(discriminator, learned, strict=True) if a.ndim > 1)
    assert not any(torch.equal(a, b) for a, b in zip(generator, state(both.generator), strict=True) if a.ndim > 1)


def test_a_training_goes_on_exactly_with_its_pool_and_its_judge(tmp_path: Path) -> None:
    fast = {"limit_val_batches": 1, "max_epochs": 2, "log_every_n_steps": 1}
    whole, cut, resumed = (module(pool=3) for _ in range(3))
    trainer = train(whole, 4, **fast)
    half = train(cut, 4, **fast | {"max_epochs": 1})
    half.save_checkpoint(tmp_path / "half.ckpt")
    torch.manual_seed(9)
    data = DigitTextures(augmentation="none", image_size=12, batch_size=8)
    rest = L.Trainer(**{"logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
                        "num_sanity_val_steps": 0, "enable_model_summary": False, "accelerator": "cpu",
                        "use_distributed_sampler": False, "limit_train_batches": 4} | fast)  # fmt: skip
    rest.fit(resumed, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert same(state(whole), state(resumed))
    assert not same(state(whole), state(cut))
    assert {key: torch.equal(value, whole.pool.state()[key]) for key, value in resumed.pool.state().items()} == {
        0: True,
        1: True,
    }
    for key in ("val/fd_convnet", "val/content_convnet", "val/cycle"):
        assert torch.equal(trainer.callback_metrics[key], rest.callback_metrics[key])


@pytest.mark.slow
def test_two_processes_go_on_each_with_its_own_pool() -> None:
    args = ["fit", *SMALL, "--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "0",
            "--model.pool", "3", "--trainer.max_epochs", "2"]  # fmt: skip
    assert start(translation, [*args, "--output", "whole"], 2) == [0, 0]
    cut = ["--trainer.callbacks+=faults.Crash", "--trainer.callbacks.step", "4"]
    assert start(translation, [*args, *cut, "--output", "cut"], 2) != [0, 0]
    assert start(translation, [*args, "--output", "cut"], 2) == [0, 0]
    whole, resumed = (torch.load(f"{folder}/last.ckpt", weights_only=True) for folder in ("whole", "cut"))
    pools = whole["gan"]["pools"]
    assert len(pools) == 2
    assert not torch.equal(pools[0][0], pools[1][0])
    for mine, other in zip(pools, resumed["gan"]["pools"], strict=True):
        assert all(torch.equal(kept, other[domain]) for domain, kept in mine.items())
    assert all(torch.equal(value, resumed["state_dict"][key]) for key, value in whole["state_dict"].items())


@pytest.mark.parametrize(("options", "words"), [
    ({"label_names": None}, "two or more domains"),
    ({"attributes": {"x": ["a"], "y": ["b", "c"]}}, "shared true"),
    ({"objective": EnergyBased()}, "autoencoder"),
    ({"backbone": "vit_tiny_patch16_224"}, "feature maps"),
    ({"cycle": -1.0}, "cycle"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        built(TranslationModule, **{"label_names": ["a", "b"], "in_chans": 3, "image_size": 16} | options)


def test_other_parts_train_both_players(coloured: DigitAttributes) -> None:
    small = {"translator": ResidualTranslator(4, 1), "backbone_options": {"width": 4, "norm": False}}
    for options in (
        {"objective": Wasserstein(), "regularizer": GradientPenalty(), "pool": 0, "identity": 0},
        {"objective": NonSaturating(), "regularizer": R1(every=1), "pool": 2},
        {"backbone": "resnet18", "backbone_options": {}},
    ):
        torch.manual_seed(0)
        made = built(
            TranslationModule,
            label_names=coloured.label_names,
            attributes=coloured.attributes,
            in_chans=3,
            image_size=16,
            shared=True,
            **small | options,
        )
        before = state(made.generator)
        train(made, 2, DigitAttributes(augmentation="none", image_size=16, batch_size=4), precision="bf16-mixed")
        assert not same(before, state(made.generator))
        assert all(value.isfinite().all() for value in made.state_dict().values())


def test_translations_that_are_all_alike_are_named_and_can_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.adversarial.health.PATIENCE", 2)
    monkeypatch.setattr("modules.adversarial.health.GRACE", 0)
    sound = module(health_every=2)
    train(sound, 4)
    assert "mode collapse" not in sound.health.found
    made = module(stop_on_failure=True, health_every=2, optimization=AdversarialOptimization(lr=1e-9))
    for parameter in made.generator.parameters():
        nn.init.zeros_(parameter)
    with pytest.warns(UserWarning, match="Mode collapse at the generator's step 4"):
        trainer = train(made, 20, max_epochs=2)
    assert trainer.global_step < 40
    again = module(health_every=2)
    saved: dict = {}
    made.on_save_checkpoint(saved)
    again.on_load_checkpoint(saved)
    assert again.health.found == {"mode collapse": 4}


@pytest.mark.slow
@pytest.mark.parametrize(("failure", "rates"), [("", {}), ("mode collapse", {"lr": 0.05})])
def test_a_translation_made_to_fail_is_named_and_a_healthy_one_is_not(failure: str, rates: dict) -> None:
    L.seed_everything(1)
    made = module(translator=ResidualTranslator(8, 2), backbone_options={"width": 8}, judge_steps=300,
                  optimization=AdversarialOptimization(**rates))  # fmt: skip
    train(
        made, 800, data=DigitTextures(augmentation="none", image_size=12, batch_size=16), max_epochs=-1, max_steps=800
    )
    assert made.health.found.keys() >= {failure} if failure else not made.health.found, made.health.found


class First(L.Callback):
    """Keeps the weights with which a training begins."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.weights = {key: value.clone() for key, value in pl_module.state_dict().items()}


@pytest.mark.slow  # the GANs' in test_contract.py share what makes it so
def test_two_processes_train_what_one_does() -> None:
    two = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--data.num_workers", "0", "--model.pool", "0",
           "--model.optimization.optimizer", "SGD", "--model.optimization.optimizer.lr", "0.002"]  # fmt: skip
    assert start(translation, ["fit", *SMALL, *two, "--output", "two"], 2) == [0, 0]
    first = First()
    one = translation(["fit", *SMALL, *two[6:], "--data.batch_size", "32", "--output", "one"], [first])
    weights = [torch.load(f"{folder}/last.ckpt", weights_only=True)["state_dict"] for folder in ("one", "two")]
    for key, value in weights[0].items():
        if not key.startswith("means."):
            moved, apart = (float((value - other[key]).norm()) for other in (first.weights, weights[1]))
            assert apart <= 0.05 * moved + 1e-6, key  # flat channels enlarge roundings; a wrong mean is half apart
    assert one.model.monitor == "val/fd_convnet"


# Use


def test_a_registered_one_translates_pictures(
    tmp_path: Path, coloured: DigitAttributes, capsys: pytest.CaptureFixture
) -> None:
    cli = translation(["fit", "--data", "DigitAttributes", *SMALL, "--model.shared", "true", "--register", "painter",
                       "--output", "out"])  # fmt: skip
    run = MlflowClient().get_run(run_id_of("out"))
    assert {f"test/{name}{kind}_convnet" for name in ("colour", "stroke", "content") for kind in ("", "_real")} | {
        "test/fd_convnet", "test/cycle"} <= set(run.data.metrics)  # fmt: skip
    picture = Image.open(next(Path("out/pictures").glob("val_translations-*.png")))
    assert picture.size[1] > 8 * 72  # input, four colours, two strokes, back

    Path("in/sub").mkdir(parents=True)
    source = coloured.sources["test"].images
    for k in (3, 4):
        Image.fromarray(source[k]).save(f"in/sub/{k}.png")
    with pytest.raises(SystemExit) as end:
        command(predict, ["models:/painter/1", "in", "--out", "told", "--json", "true"])
    assert end.value.code == 0
    answer = json.loads(Path("told/predictions.jsonl").read_text().splitlines()[0])
    assert answer["colour"] in ("red", "green", "blue", "yellow")
    assert list(answer["pictures"]) == ["red", "green", "blue", "yellow", "thin", "thick"]
    blue = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer["pictures"]["blue"].partition(",")[2]))))
    assert np.array_equal(np.asarray(Image.open("told/sub/3.blue.png")), blue)
    assert Image.open("told/sub/3.png").size[0] > 6 * 96

    translation.main(["translate", "models:/painter/1", "in", "blue, thick", "--out", "made"])
    made = np.stack([np.asarray(Image.open(f"made/sub/{k}.png")) for k in (3, 4)])
    translation.main(["translate", "models:/painter/1", "in/sub/3.png", "blue", "--out", "one"])
    assert np.array_equal(np.asarray(Image.open("one/3.png")), blue)
    model = cli.model.eval()
    image = torch.from_numpy(np.stack([cli.datamodule.transform(False)(image=source[k])["image"] for k in (3, 4)]))
    expected = model.translate(image.permute(0, 3, 1, 2), torch.tensor([5, 5]))
    assert np.abs(made.astype(int) - expected.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1
    for args, words in (
        (["models:/painter/1", "in", "violet"], "it knows red, green, blue, yellow, thin, thick"),
        (["models:/painter/1", "nothing", "blue"], "no picture at nothing"),
        (["models:/painter/1", "in", "blue", "--out", "in"], "would replace"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            translation.main(["translate", *args])
        assert end.value.code == 2
        assert words in capsys.readouterr().err


def test_folders_of_ones_own_train(textures: DigitTextures, capsys: pytest.CaptureFixture) -> None:
    source = textures.sources["val"]
    for name, label in (("summer", 0), ("winter", 1)):
        Path("mine", name).mkdir(parents=True)
        for k in np.flatnonzero(source.labels == label)[: 12 + 8 * label]:
            Image.fromarray(source.images[k]).save(f"mine/{name}/{k}.png")
    data = DomainFolder("mine", augmentation="none", image_size=12, batch_size=4)
    assert data.attributes == {"domain": ["summer", "winter"]}
    batches = [batch["label"].bincount().tolist() for batch in data.train_dataloader()]
    assert batches == [[2, 2]] * 7  # 14 of winter's 20 images are left for training
    cli = translation(["fit", "--data", "DomainFolder", "--data.root", "mine", *SMALL, "--data.batch_size", "4",
                       "--output", "out"])  # fmt: skip
    assert "test/domain_convnet" in cli.rows
    assert "test/content_convnet" not in cli.rows
    with pytest.raises(SystemExit) as end:
        translation(["fit", "--data", "UnlabelledFolder", "--data.root", "mine", *SMALL, "--output", "no"])
    assert end.value.code == 2
    assert "two or more domains" in capsys.readouterr().err
