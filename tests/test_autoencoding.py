"""Autoencoders do what their parts say: losses, noise, codes, figures, and what a registered one is used for."""

import copy
import math
import shutil
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from conftest import built
from mlflow.tracking import MlflowClient
from PIL import Image
from sklearn.decomposition import PCA
from torch import nn
from torch.distributions import Bernoulli, Normal, kl_divergence

from datamodules import DataError, Digits, Digits8x8, PointCloud, UnlabelledFolder
from modules import AutoencodingModule, BackboneError, MaskedAutoencodingModule, Optimization
from modules.autoencoding import (
    BCE,
    L1,
    MSE,
    SSIM,
    Contractive,
    Dense,
    DiscretizedLogistic,
    GaussianNoise,
    KLSparsity,
    L1Sparsity,
    Masking,
    Perceptual,
    Plain,
    PointAutoencoder,
    SaltAndPepper,
    TopK,
    TransposedConvolutions,
    UpsampledConvolutions,
    Variational,
    VectorQuantized,
)
from modules.autoencoding.module import UnitStatistics
from modules.base import VisionModule
from modules.callbacks.publish import Report
from modules.measures.images import psnr, ssim
from modules.networks.parts import Draws, build, describe
from modules.spec import Backbone, DataSpec
from pipelines.autoencoding import autoencoding
from pipelines.classification import classification
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--data.batch_size", "64", *QUIET]


def images(count: int = 4, channels: int = 1, side: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), dtype=torch.uint8, generator=generator)


def trainer(**options) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0,
             "enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}  # fmt: skip
    return L.Trainer(**quiet | options)


def test_losses_are_summed_over_the_image_and_equal_values_worked_out_by_hand() -> None:
    target = torch.tensor([[[[0.0, 1.0], [0.5, 0.25]]]])
    output = torch.tensor([[[[0.5, 0.5], [0.5, 1.25]]]])
    assert MSE()(output, target).tolist() == pytest.approx([0.25 + 0.25 + 0 + 1])
    assert L1()(output, target).tolist() == pytest.approx([0.5 + 0.5 + 0 + 1])
    p = [1 / (1 + math.exp(-v)) for v in (0.5, 0.5, 0.5, 1.25)]
    pairs = zip((0.0, 1.0, 0.5, 0.25), p, strict=True)
    expected = -sum(x * math.log(q) + (1 - x) * math.log(1 - q) for x, q in pairs)
    assert BCE()(output, target).tolist() == pytest.approx([expected])
    assert BCE().image(output).flatten().tolist() == pytest.approx(p)


def test_discretized_logistic_is_a_distribution_over_the_256_levels() -> None:
    loss = DiscretizedLogistic()
    levels = torch.arange(256).view(256, 1, 1, 1) / 255
    for mean in (-0.1, 0.0, 0.3, 1.0):
        total = (-loss(torch.full_like(levels, mean), levels)).exp().sum()
        assert float(total.detach()) == pytest.approx(1, abs=1e-3)
    scale = math.exp(float(loss.log_scale))
    cdf = lambda x: 1 / (1 + math.exp(-(x - 0.3) / scale))  # noqa: E731
    expected = -math.log(cdf(100.5 / 255) - cdf(99.5 / 255))
    assert float(loss(torch.full((1, 1, 1, 1), 0.3), levels[100:101])) == pytest.approx(expected, rel=1e-4)
    with torch.no_grad():
        loss.log_scale.fill_(-9.0)
    far = torch.full((1, 1, 1, 1), 5.0, requires_grad=True)
    loss(far, levels[100:101]).sum().backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()


def test_psnr_is_that_of_each_image_and_finite() -> None:
    one, other = (images(4, seed=seed).float() / 255 for seed in (0, 1))
    other[3] = one[3]
    expected = [
        -10 * math.log10(float((a - b).double().square().mean())) for a, b in zip(one[:3], other[:3], strict=True)
    ]
    assert psnr(one, other).tolist() == pytest.approx([*expected, 100], abs=1e-4)


def test_ssim_equals_a_loop_over_windows() -> None:
    torch.manual_seed(0)
    one, other = torch.rand(2, 2, 1, 15, 15).double()
    offsets = torch.arange(11).double() - 5
    window = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = (window[:, None] * window[None]) / window.sum() ** 2
    for image in range(2):
        values = []
        for y in range(5):
            for x in range(5):
                a, b = (v[image, 0, y : y + 11, x : x + 11] for v in (one, other))
                mu, nu = (a * window).sum(), (b * window).sum()
                var_a, var_b = (a**2 * window).sum() - mu**2, (b**2 * window).sum() - nu**2
                covariance = (a * b * window).sum() - mu * nu
                top = (2 * mu * nu + 0.01**2) * (2 * covariance + 0.03**2)
                values.append(top / ((mu**2 + nu**2 + 0.01**2) * (var_a + var_b + 0.03**2)))
        expected = torch.stack(values).mean()
        assert float(ssim(one, other)[image]) == pytest.approx(float(expected), abs=1e-6)
        distance = (one - other).abs().flatten(1).sum(1)[image]
        loss = SSIM(share=0.75)(one, other)[image]
        assert float(loss) == pytest.approx(float(0.75 * 225 * (1 - expected) + 0.25 * distance), rel=1e-6)
    assert SSIM()(one, one).abs().max() < 1e-9


def test_perceptual_loss_is_zero_for_the_same_image_and_its_network_does_not_learn() -> None:
    loss = Perceptual("convnet")
    target = images(2).float() / 255
    output = (target + 0.1).requires_grad_()
    assert float(loss(target, target).abs().max()) == 0
    value = loss(output, target)
    assert (value > MSE()(output, target)).all()
    value.sum().backward()
    assert output.grad is not None
    assert not list(loss.parameters())
    assert not loss.state_dict()


def test_divergence_of_a_variational_code_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    bottleneck = Variational(5, beta=3.0, warmup=0.5)
    bottleneck.build((7,))
    features, draws = torch.randn(6, 7), Draws(images(6), True)
    code = bottleneck(features, draws, 1.0)
    mean, log_variance = bottleneck.project(features).chunk(2, 1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0))
    torch.testing.assert_close(code.kl, expected)
    torch.testing.assert_close(code.loss, 3 * expected.sum(1))
    torch.testing.assert_close(bottleneck(features, draws, 0.25).loss, 1.5 * expected.sum(1))
    assert torch.equal(code.saved, mean)


def test_variational_codes_are_draws_from_their_distribution() -> None:
    torch.manual_seed(0)
    bottleneck = Variational(3)
    bottleneck.build((7,))
    features = torch.randn(1, 7).repeat(20000, 1)
    value = bottleneck(features, Draws(torch.zeros(20000, 1, 1, 1, dtype=torch.uint8), True), 1.0).value
    mean, log_variance = bottleneck.project(features[:1]).chunk(2, 1)
    torch.testing.assert_close(value.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(value.std(0), (0.5 * log_variance[0]).exp(), atol=0.03, rtol=0)


def test_sparsity_penalties_equal_their_formulas() -> None:
    code = torch.tensor([[0.2, -0.4], [0.6, 0.0]])
    assert float(L1Sparsity(0.5)(code, code)) == pytest.approx(0.5 * (0.6 + 0.6) / 2)
    activity = torch.tensor([[0.2, 0.4], [0.6, 0.1]])
    expected = kl_divergence(Bernoulli(0.05), Bernoulli(torch.tensor([0.4, 0.25]))).sum()
    assert float(KLSparsity(0.05, 2.0)(activity, activity)) == pytest.approx(2 * float(expected))


def test_top_k_keeps_the_largest_positive_activations() -> None:
    value = torch.tensor([[3.0, -1.0, 2.0, 5.0], [-1.0, -2.0, 0.5, -3.0]], requires_grad=True)
    kept = TopK(2)(value)
    assert kept.tolist() == [[3, 0, 0, 5], [0, 0, 0.5, 0]]
    kept.sum().backward()
    assert value.grad is not None
    assert value.grad.tolist() == [[1, 0, 0, 1], [0, 0, 1, 0]]


def test_contractive_penalty_is_the_jacobian_of_a_linear_encoder() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 16)
    image = torch.randn(5000, 1, 4, 4, requires_grad=True)
    penalty = Contractive(0.1)(image.flatten(1) @ weight.mT, image)
    assert float(penalty) == pytest.approx(0.1 * float(weight.square().sum()), rel=0.05)


def test_codebook_takes_the_nearest_entry_and_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    bottleneck = VectorQuantized(entries=6, size=2, commitment=0.25)
    bottleneck.build((3, 2, 2))
    features = torch.randn(4, 3, 2, 2)
    code = bottleneck(features, Draws(images(), False), 1.0)
    value = bottleneck.project(features).detach()
    for image, y, x in np.ndindex(4, 2, 2):
        distances = (bottleneck.codebook - value[image, :, y, x]).square().sum(1)
        assert int(code.saved[image, y, x]) == int(distances.argmin())
        torch.testing.assert_close(code.value[image, :, y, x], bottleneck.codebook[distances.argmin()])
    torch.testing.assert_close(bottleneck.load(code.saved), code.value)
    expected = 1.25 * (bottleneck.load(code.saved) - value).square().flatten(1).sum(1)
    torch.testing.assert_close(code.loss, expected)

    upstream = torch.randn_like(code.value)
    (through,) = torch.autograd.grad(code.value, bottleneck.project.bias, upstream, retain_graph=True)
    torch.testing.assert_close(through, upstream.sum((0, 2, 3)))  # as if the entry were the value itself
    assert torch.autograd.grad(code.value.sum(), bottleneck.codebook, allow_unused=True, retain_graph=True)[0] is None
    (pull,) = torch.autograd.grad(code.loss.sum(), bottleneck.codebook)
    used = code.saved.unique()
    assert (pull[used] != 0).any(1).all()
    assert pull.count_nonzero() == pull[used].count_nonzero()


def test_noise_has_the_strength_that_it_is_given() -> None:
    image = torch.full((50, 2, 30, 30), 0.5)
    draws = Draws(torch.zeros(50, 2, 30, 30, dtype=torch.uint8), True)
    noisy = GaussianNoise(0.3)(image, draws)
    assert float((noisy - image).std()) == pytest.approx(0.3, rel=0.02)
    peppered = SaltAndPepper(0.2)(image, draws)
    assert float((peppered == 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float((peppered == 1).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(peppered[:, 0], peppered[:, 1])
    masked = Masking(0.25, 7)(image, draws) == 0
    assert float(masked.float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.equal(masked[..., 0, 0], masked[..., 6, 6])


def test_noise_in_evaluation_depends_on_nothing_but_the_image() -> None:
    batch = images(6)
    whole, part = Draws(batch, False).normal(3), Draws(batch[2:4], False).normal(3)
    assert torch.equal(whole[2:4], part)
    assert len(whole.unique()) == 18
    assert not torch.equal(Draws(batch, True).normal(3), Draws(batch, True).normal(3))


@pytest.mark.parametrize("decoder", [TransposedConvolutions(8), UpsampledConvolutions(8), Dense((20,)), Dense()])
@pytest.mark.parametrize("code", [(5,), (5, 4, 4), (3, 7, 7), (5, 3, 5)])
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (45, 45), (24, 40), (41, 7)])
def test_decoders_fit_any_code_and_size(decoder, code, size) -> None:
    decoder.build(code, 3, size)
    assert decoder(torch.randn(2, *code)).shape == (2, 3, *size)


@pytest.mark.parametrize(
    ("backbone", "side", "options", "shape"),
    [
        ("convnet", 28, {}, (128, 4, 4)),
        ("resnet18", 32, {"channels": (8, 8, 8, 8)}, (8, 4, 4)),
        ("vit_tiny_patch16_224", 32, {"depth": 1, "embed_dim": 24}, (24, 16, 16)),
        ("swin_tiny_patch4_window7_224", 224, {"depths": (1, 1, 1, 1), "embed_dim": 24}, (192, 7, 7)),
        ("mlp", 28, {}, (100,)),
    ],
)
def test_any_backbone_is_an_encoder(backbone, side, options, shape) -> None:
    module = AutoencodingModule(
        DataSpec(label_names=None, in_chans=1, image_size=side), Backbone(backbone, options=options), pca=False
    )
    image = images(2, 1, side)
    assert module.features(module.normalize(image)).shape[1:] == shape
    assert module(image).shape == (2, 1, side, side)


def test_layers_behind_the_features_do_not_learn() -> None:
    module = AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=28), Backbone("lenet5"))
    module.losses({"image": images(2, 1, 28)}).total.backward()
    for name, parameter in module.named_parameters():
        assert parameter.requires_grad == (not name.startswith("backbone.neck")), name
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_an_autoencoder_is_rebuilt_from_plain_data() -> None:
    module = AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=12), bottleneck=Plain(7, activation=nn.LeakyReLU(0.3)), decoder=Dense((9,)), loss=SSIM(0.5), noise=SaltAndPepper(0.1), penalty=KLSparsity(0.1, 2.0))  # fmt: skip
    architecture = yaml.safe_load(yaml.safe_dump(module.architecture))
    twin = AutoencodingModule.from_architecture(architecture)
    assert twin.architecture == module.architecture
    assert twin.bottleneck.activation.negative_slope == 0.3
    twin.load_state_dict(module.state_dict())
    torch.testing.assert_close(twin.eval()(images()), module.eval()(images()))
    others = (
        VectorQuantized(9, 3),
        TopK(3),
        Variational(4, True, 2.0, 0.2),
        GaussianNoise(),
        Masking(),
        Perceptual("lenet5"),
    )
    for part in others:
        assert describe(build(describe(part))) == describe(part)
    with pytest.raises(ValueError, match="no part 'Linear'"):
        build({"class": "Linear", "in_features": 1, "out_features": 1})


def test_principal_components_beside_it_are_those_of_scikit_learn() -> None:
    data = Digits8x8(image_size=8, augmentation="standard", batch_size=100, num_workers=0)
    module = AutoencodingModule(DataSpec(label_names=data.label_names, in_chans=1, image_size=8), bottleneck=Plain(6))
    (figures,) = trainer().validate(module, datamodule=data, verbose=False)
    train, val = (data.sources[name].images.reshape(-1, 64) / 255 for name in ("train", "val"))
    fitted = PCA(6).fit(train)
    made = fitted.inverse_transform(fitted.transform(val)).clip(0, 1)
    error = ((made - val) ** 2).mean(1)
    assert figures["val/mse_pca"] == pytest.approx(error.mean(), rel=1e-4)
    assert figures["val/psnr_pca"] == pytest.approx((-10 * np.log10(error)).mean(), rel=1e-4)
    assert figures["val/bits_per_pixel"] == 6 * 16 / 64
    batch = torch.from_numpy(data.sources["val"].images).permute(0, 3, 1, 2)
    expected = (module.eval()(batch) - batch / 255).square().mean()
    assert figures["val/mse"] == pytest.approx(float(expected), rel=1e-4)


def test_figures_of_a_variational_autoencoder_agree_with_each_other() -> None:
    torch.manual_seed(0)
    data = Digits8x8(image_size=12, batch_size=100, num_workers=0)
    module = AutoencodingModule(
        DataSpec(label_names=None, in_chans=1, image_size=12),
        bottleneck=Variational(6, beta=4.0),
        loss=DiscretizedLogistic(),
    )
    (figures,) = trainer().validate(module, datamodule=data, verbose=False)
    elbo = -figures["val/reconstruction"] - figures["val/kl"]
    assert figures["val/elbo"] == pytest.approx(elbo, rel=1e-5)
    assert figures["val/loss"] == pytest.approx(figures["val/reconstruction"] + 4 * figures["val/kl"], rel=1e-5)
    assert figures["val/bits_per_dim"] == pytest.approx(-elbo / 144 / math.log(2), rel=1e-5)


def test_unit_statistics_are_exact_over_batches() -> None:
    torch.manual_seed(0)
    bottleneck = Variational(5)
    bottleneck.build((7,))
    codes = [bottleneck(torch.randn(n, 7), Draws(images(n), False), 1.0) for n in (3, 8)]
    statistics = UnitStatistics(5, 0)
    for code in codes:
        statistics.update(code)
    values, means = statistics.compute(), torch.cat([code.mean for code in codes]).double()
    torch.testing.assert_close(values["variance"], means.var(0, unbiased=False))
    torch.testing.assert_close(values["kl"], torch.cat([code.kl for code in codes]).double().mean(0))
    quantized = VectorQuantized(4, 2)
    quantized.build((3, 2, 2))
    code = quantized(torch.randn(8, 3, 2, 2), Draws(images(8), False), 1.0)
    usage = UnitStatistics(8, 4)
    usage.update(code)
    share = torch.bincount(code.saved.flatten(), minlength=4).double() / 32
    assert float(usage.compute()["perplexity"]) == pytest.approx(float(torch.special.entr(share).sum().exp()))


def masked(**options) -> MaskedAutoencodingModule:
    torch.manual_seed(0)
    small = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    return built(
        MaskedAutoencodingModule,
        in_chans=1,
        image_size=16,
        backbone_options=small,
        decoder_dim=16,
        decoder_depth=1,
        decoder_heads=2,
        **options,
    )


def test_masked_autoencoder_sees_only_what_is_not_masked() -> None:
    module = masked(share=0.75).eval()
    image = images(3, 1, 16)
    assert torch.equal(module.unpatchify(module.patchify(image.float())), image.float())
    assert torch.equal(module.patchify(image.float())[0, 1], image[0, 0, :4, 4:8].flatten().float())
    output, hidden = module.reconstruct(image, Draws(image, False))
    assert hidden.sum(1).tolist() == [12, 12, 12]
    spoilt = module.unpatchify(module.patchify(image.float()).masked_fill(hidden[:, :, None], 7)).byte()
    again, _ = module.reconstruct(spoilt, Draws(image, False))  # the same mask
    torch.testing.assert_close(again, output)
    seen = module.unpatchify(module.patchify(image.float()).masked_fill(~hidden[:, :, None], 7)).byte()
    assert (module.reconstruct(seen, Draws(image, False))[0] - output).abs().max() > 1e-3


def test_masked_autoencoder_counts_masked_patches_only() -> None:
    module = masked(normalize_patches=False).eval()
    image = images(3, 1, 16)
    torch.manual_seed(5)
    loss = module.losses({"image": image}).total
    torch.manual_seed(5)
    output, hidden = module.reconstruct(image, Draws(image, True))
    error = (output - module.patchify(image.float() / 255)).square()
    expected = torch.stack([error[i, k].mean() for i, k in hidden.nonzero().tolist()]).mean()
    torch.testing.assert_close(loss, expected)


def test_pictures_of_a_masked_autoencoder_are_of_the_whole_split(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, np.ndarray]] = []
    monkeypatch.setattr("modules.autoencoding.masked.rows_of", rows.append)
    module, data = masked(), Digits(augmentation="none", image_size=16, batch_size=50)
    report = module.report
    monkeypatch.setattr(module, "report", lambda stage: report(stage).pictures["reconstructions"]() or Report())
    trainer().validate(module, data, verbose=False)
    last = data.samples("val", 500)["image"][-1, 0].numpy()
    assert len(rows[0]["image"]) == 12
    assert np.array_equal(rows[0]["image"][-1].reshape(16, 16), last)


def test_masked_autoencoder_trains_and_starts_a_classification(tmp_path: Path) -> None:
    from pipelines.masked_autoencoding import masked_autoencoding

    options = ["patch_size=4", "embed_dim=24", "depth=2", "num_heads=2"]
    given = [f"--model.backbone.options.{option}" for option in options]
    masked_autoencoding(["fit", *SMALL, *given, "--trainer.max_epochs", "3", "--output", "mae", "--register", "mae"])
    client = MlflowClient()
    losses = [m.value for m in client.get_metric_history(run_id_of("mae"), "val/loss")]
    assert losses[-1] < losses[0]
    cli = classification(["fit", *SMALL, "--model.backbone", "models:/mae/1", "--trainer.max_epochs", "1"])
    assert cli.model.backbone.recipe["backbone_options"]["embed_dim"] == 24
    with pytest.raises(BackboneError, match="not a plain vision transformer"):
        MaskedAutoencodingModule(DataSpec(in_chans=1, image_size=16), Backbone("convnet"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registered autoencoder of digits, and a folder with some of them."""
    folder = tmp_path_factory.mktemp("trained")
    autoencoding(
        ["fit", *SMALL, "--trainer.max_epochs", "6", "--model.optimization.lr", "0.003", "--output", str(folder / "out"),
         "--model.backbone.options.channels", "[32,64]", "--register", "codes"]
    )  # fmt: skip
    digits = Digits8x8().sources["test"].images[:20, :, :, 0]
    for k, digit in enumerate(digits):
        place = folder / "digits" / ("odd" if k % 2 else "even") / f"{k}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digit).resize((12, 12)).save(place)
    return folder


def test_encoded_images_decode_to_the_reconstructions(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (trained / "digits" / "bad.png").write_text("no image")
    autoencoding.main(["encode", "models:/codes/1", str(trained / "digits"), "--out", "all.npz"])
    said = capsys.readouterr().out
    assert "bad.png is not an image" in said
    assert "20 images" in said
    autoencoding.main(["decode", "all.npz", "made"])
    loaded = registry.load("models:/codes/1")
    paths = sorted((trained / "digits").rglob("[0-9]*.png"))
    batch = torch.from_numpy(np.stack([loaded.prepare(path) for path in paths])).permute(0, 3, 1, 2)
    with torch.inference_mode():
        expected = loaded.module(batch)[:, 0] * 255
    for path, image in zip(paths, expected, strict=True):
        made = np.asarray(Image.open(Path("made", path.relative_to(trained / "digits"))))
        assert np.abs(made - image.numpy()).max() < 1.5  # 16 bits a number, and 8 a pixel
    with np.load("all.npz", allow_pickle=False) as saved:
        assert saved["codes"].dtype == np.float16
        assert str(saved["model"]) == "models:/codes/1"


def test_nearest_finds_the_image_itself_first(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    autoencoding.main(["encode", "models:/codes/1", str(trained / "digits" / "odd"), "--out", "odd.npz"])
    autoencoding.main(["nearest", "odd.npz", str(trained / "digits" / "odd" / "7.png"), "--count", "3"])
    rows = [line for line in capsys.readouterr().out.splitlines() if "odd/" in line]
    assert len(rows) == 3
    assert "odd/7.png" in rows[0]
    assert Image.open("nearest.png").size[0] > 100


def test_a_registered_encoder_starts_a_classification(trained: Path) -> None:
    cli = classification(["fit", *SMALL, "--model.backbone", "models:/codes/1", "--trainer.max_epochs", "1",
                          "--model.optimization.frozen_epochs", "-1"])  # fmt: skip
    encoder = registry.load("models:/codes/1").module.backbone.state_dict()
    weights = cli.model.backbone.state_dict()
    assert encoder
    assert all(torch.equal(weights[key], encoder[key]) for key in encoder)
    assert MlflowClient().get_run(cli.trainer.logger.run_id).data.tags["source_model"] == "models:/codes/1"


def test_commands_say_what_is_wrong(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("none.npz").write_text("?")
    Path("empty").mkdir()
    for args, wanted in [
        (["encode", "models:/nothing/1", "."], "No model 'nothing' is registered"),
        (["encode", "models:/codes/1", "empty"], "No images were found in empty"),
        (["decode", "none.npz", "made"], "none.npz cannot be read: it is not one that encode wrote"),
        (["nearest", "gone.npz", "x.png"], "No such file"),
        (["points", "--shape", "cube"], "neither a file nor one of the shapes"),
    ]:
        with pytest.raises(SystemExit) as end:
            autoencoding.main(args)
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert wanted in " ".join(message.split())
        assert "Traceback" not in message


def test_the_answer_shows_the_reconstruction_beside_the_image(trained: Path) -> None:
    loaded = registry.load("models:/codes/1")
    path = trained / "digits" / "even" / "4.png"
    (answer,) = loaded.predict(None, [path]).to_dict("records")
    assert set(answer) == {"mse", "psnr", "code"}
    assert answer["psnr"] == pytest.approx(-10 * math.log10(answer["mse"]), abs=0.01)
    drawing = loaded.module.answers.draw(np.asarray(Image.open(path))[..., None], answer)
    shown, made = (
        drawing[-118:-6, left : left + 112].astype(int) for left in (6, 124)
    )  # below the heading, side by side
    assert shown.min() < 50 < 200 < shown.max()
    assert np.square((shown - made) / 255).mean() == pytest.approx(answer["mse"], rel=0.3)  # enlarged, and rounded


def test_pictures_of_a_variational_autoencoder_are_logged_at_fixed_keys() -> None:
    autoencoding(["fit", *SMALL, "--trainer.max_epochs", "1", "--output", "vae", "--model.bottleneck", "Variational",
                  "--model.noise", "SaltAndPepper", "--model.loss", "BCE"])  # fmt: skip
    names = {file.name.rsplit("-", 1)[0] for file in Path("vae/pictures").iterdir()}
    codes = np.asarray(Image.open(next(Path("vae/pictures").glob("val_codes-*"))).convert("RGB"))
    blue, orange, green = (31, 119, 180), (255, 127, 14), (44, 160, 44)
    assert {blue, orange, green} <= {*map(tuple, codes.reshape(-1, 3).tolist())}  # of classes, as the data name them
    wanted = ["reconstructions", "interpolation", "codes", "filters", "units", "samples", "traversals"]
    assert {f"{stage}_{name}" for stage in ("val", "test") for name in wanted} <= names


def test_points_come_to_lie_on_the_curve() -> None:
    data = PointCloud("wave", samples=300, noise=0.0, batch_size=50)
    torch.manual_seed(0)
    module = PointAutoencoder(2, 1, (32,), lr=0.01)
    trainer(max_epochs=60).fit(module, data)
    errors = [frame[4] for frame in module.frames]
    assert [frame[0] for frame in module.frames] == [0, 1, 2, 5, 10, 20, 50, 60]
    assert errors[-1] < 0.1 * errors[0]


def test_points_of_a_file_are_read_or_refused(tmp_path: Path) -> None:
    Path("points.csv").write_text("x,y,z\n1,2,3\n4,5,6\n7,8,12\n")
    assert PointCloud("points.csv").points.shape == (3, 3)
    np.save("flat.npy", np.zeros(5))
    with pytest.raises(DataError, match=r"flat.npy holds 5 values"):
        PointCloud("flat.npy")


def test_a_folder_needs_no_labels(trained: Path) -> None:
    (trained / "digits" / "bad.png").unlink(missing_ok=True)
    data = UnlabelledFolder(str(trained / "digits"), in_chans=1, image_size=12, num_workers=0)
    assert {name: len(source) for name, source in data.sources.items()} == {"train": 14, "val": 3, "test": 3}


def test_values_out_of_range_are_refused_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    for args, wanted in [
        (
            ["--model.noise", "Masking", "--model.noise.patch", "0"],
            "--model.noise.patch must be at least 1, not 0",
        ),
        (["--data.image_size", "8", "--model.loss", "SSIM"], "needs images of at least 11 pixels"),
        (["--model.bottleneck", "VectorQuantized", "--model.bottleneck.entries", "70000"], "from 2 to 65536"),
    ]:
        with pytest.raises(SystemExit) as end:
            autoencoding(["fit", *SMALL, *args, "--output", "bad"])
        assert end.value.code == 2
        message = capsys.readouterr().err
        assert wanted in " ".join(message.split())
        assert "Traceback" not in message


def test_parts_of_the_same_kind_do_not_share_weights_when_copied() -> None:
    module = AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=12), optimization=Optimization())
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.bottleneck.project[1].bias.add_(1)
    assert not torch.equal(twin.bottleneck.project[1].bias, module.bottleneck.project[1].bias)


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")
@pytest.mark.parametrize("kind", ["plain", "contractive", "masked"])
def test_a_compiled_encoder_learns_the_same(kind: str) -> None:
    def trained(compiled: bool) -> tuple[VisionModule, list[float]]:
        torch.manual_seed(0)
        if kind == "masked":
            options = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
            module: VisionModule = MaskedAutoencodingModule(
                DataSpec(in_chans=1, image_size=16),
                Backbone("vit_tiny_patch16_224", options=options, compile=compiled),
                decoder_dim=16,
            )
        else:
            penalty = Contractive(0.1) if kind == "contractive" else None
            module = AutoencodingModule(
                DataSpec(label_names=None, in_chans=1, image_size=16),
                Backbone("convnet", compile=compiled),
                penalty=penalty,
                pca=False,
            )
        data = Digits8x8(image_size=16, augmentation="none", batch_size=64, num_workers=0)
        run = trainer(max_epochs=1, limit_train_batches=6)
        run.fit(module, data)
        return module, [float(run.callback_metrics[key]) for key in ("train/loss", "val/loss")]

    (module, compiled), (_, plain) = trained(True), trained(False)
    assert compiled == pytest.approx(plain, rel=1e-2)
    if kind != "contractive":  # what is compiled cannot be differentiated twice
        assert module._compiled is not None
        seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert seen > 0
