"""Super-resolution: what it is given, how it is measured, who learns when, and what a registered one makes of a picture."""

import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from conftest import built
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import nn

from datamodules import DataError, Digits8x8, PhotographFolder, Photographs
from modules import BackboneError, SuperResolutionModule
from modules.measures.images import BCE, Perceptual, perceptual_distance
from modules.networks.parts import build, describe
from modules.super_resolution import SRResNet, quality, resized
from pipelines.predict import predict
from pipelines.super_resolution import super_resolution

QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
SMALL = ["--model.generator.width", "4", "--model.generator.blocks", "1", "--model.backbone.options.width", "4"]


def module(**options) -> SuperResolutionModule:
    torch.manual_seed(0)
    small = {"in_chans": 1, "image_size": 16, "generator": SRResNet(4, 1), "backbone_options": {"width": 4}}
    return built(SuperResolutionModule, **small | options)


def photograph(height: int = 90, width: int = 121) -> np.ndarray:
    return np.ascontiguousarray(load_sample_images().images[0][:height, :width])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for k in range(4):
        for name, image in zip(("china", "flower"), load_sample_images().images, strict=True):
            place = tmp_path / "photos" / f"{name}{k}.png"
            place.parent.mkdir(exist_ok=True)
            Image.fromarray(image[40 * k : 40 * k + 40, 100 * k : 100 * k + 90]).save(place)
    return tmp_path / "photos"


def test_images_are_resized_as_pillow_does() -> None:
    image = photograph(88, 120)
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None]
    for factor, size in ((1 / 4, (30, 22)), (4, (480, 352))):
        expected = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)).astype(int)
        assert np.abs(resized(tensor, factor)[0].permute(1, 2, 0).numpy() - expected).max() <= 1


def test_quality_is_that_of_the_luma_without_the_rim() -> None:
    truth = torch.zeros(1, 3, 24, 24, dtype=torch.uint8)
    image = truth.clone()
    image[:, 0, 4:-4, 4:-4] = 51  # a fifth of red: luma rises by 65.481 / 5
    image[..., :4, :] = 255  # on the rim
    figures = quality(image, truth, 4)
    assert float(figures["psnr_y"]) == pytest.approx(20 * math.log10(255 / (65.481 / 5)), abs=1e-3)
    assert float(quality(truth, truth, 4)["ssim_y"]) == pytest.approx(1)
    assert "ssim_y" not in quality(image[..., :16, :16], truth[..., :16, :16], 4)
    grey = torch.full((1, 1, 24, 24), 10, dtype=torch.uint8)
    assert float(quality(grey, grey + 5, 4)["psnr_y"]) == pytest.approx(20 * math.log10(255 / 5), abs=1e-3)


def test_the_perceptual_distance_goes_by_directions() -> None:
    one = [torch.tensor([[3.0, 0.0], [4.0, 2.0]]).view(1, 2, 1, 2), torch.tensor([1.0, 0.0]).view(1, 2, 1, 1)]
    other = [torch.tensor([[6.0, 5.0], [8.0, 0.0]]).view(1, 2, 1, 2), torch.tensor([0.6, 0.8]).view(1, 2, 1, 1)]
    # First level: (.6, .8) twice, and (0, 1) against (1, 0). Second: (1, 0) against (.6, .8).
    assert float(perceptual_distance(one, other)) == pytest.approx((0 + 2) / 2 + 0.16 + 0.64)


def test_the_generator_begins_as_a_bicubic_enlargement_and_takes_any_size() -> None:
    made = module(in_chans=3).eval()
    image = torch.from_numpy(photograph(23, 31)).permute(2, 0, 1)[None]
    assert (made.enlarge(image).int() - resized(image, 4).int()).abs().max() <= 1
    published = SRResNet(4, 2, "batch", factor=2, bicubic=False)
    published.build(3)
    assert published(torch.rand(2, 3, 5, 7)).shape == (2, 3, 10, 14)


def test_losses_with_options_of_their_network_are_rebuilt() -> None:
    loss = build(describe(Perceptual("convnet", backbone_options={"out_indices": [0]})))
    assert loss.backbone_options == {"out_indices": [0]}


def test_features_of_unit_length_are_compared_as_the_figure_does() -> None:
    torch.manual_seed(0)
    loss = Perceptual("convnet", weight=0.5, unit=True)
    one, other = torch.rand(2, 2, 3, 32, 32)
    expected = (one - other).square().flatten(1).sum(1)
    far = perceptual_distance(loss._features(one), loss._features(other))
    assert far.min() > 0
    assert torch.allclose(loss(one, other), expected + 0.5 * 3 * 32**2 * far)


@pytest.mark.parametrize(("blocks", "factor"), [(16, 4), (1, 2), (0, 8)])
def test_pieces_of_a_large_image_equal_the_whole(blocks: int, factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    net = SRResNet(2, blocks, factor=factor, bicubic=False)
    made = module(generator=net, image_size=16 * factor).eval()
    generator = torch.Generator().manual_seed(0)
    size = 2 * net.reach + 20
    image = torch.randint(256, (1, 1, size + 3, size), dtype=torch.uint8, generator=generator)
    for corner in (0, -1):  # every layer looks only at the farthest place that it sees, and nothing fades on the way
        for layer in made.average.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.weight.data[: 4 if layer.out_channels == 8 else 1, 0, corner, corner] = 1
            if isinstance(layer, nn.PReLU):
                nn.init.ones_(layer.weight)
        for block in made.average.body:  # without what it adds to
            block[0].weight.data[1, 0, 1, 1] = 1
            block[3].weight.data[0, 1, 1, 1] = -1
        made.average.last.weight.data /= 2
        with monkeypatch.context() as patch:
            patch.setattr("modules.super_resolution.TILE", 4 * size)
            whole = made.enlarge(image)
            patch.setattr("modules.super_resolution.TILE", 16)
            assert torch.equal(made.enlarge(image), whole)
            patch.setattr(SRResNet, "reach", net.reach - 1)
            assert not torch.equal(made.enlarge(image), whole)


@pytest.mark.parametrize("adversarial", [0.0, 0.1])
def test_the_discriminator_learns_only_where_it_is_asked(adversarial: float) -> None:
    made = module(adversarial=adversarial, content=Perceptual("convnet"))
    before = {key: value.clone() for key, value in made.state_dict().items()}
    trainer = L.Trainer(max_epochs=1, limit_train_batches=3, limit_val_batches=0, logger=False, accelerator="cpu",
                        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False)  # fmt: skip
    trainer.fit(made, Digits8x8(augmentation="none", image_size=16, batch_size=8))
    changed = {key.partition(".")[0] for key, value in made.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"generator", "average"} | ({"backbone", "head"} if adversarial else set())


@pytest.mark.parametrize(("options", "words"), [
    ({"image_size": 18}, "multiples of 4"), ({"content": BCE()}, "compares probabilities"), ({"adversarial": -1.0}, "at least 0"),
])  # fmt: skip
def test_parts_that_do_not_fit_are_refused(options: dict, words: str) -> None:
    with pytest.raises(BackboneError, match=words):
        module(**options)


def test_photographs_are_cut_at_their_own_resolution(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = PhotographFolder(str(folder), image_size=16, evaluation_size=64, crops=5, batch_size=4)
    crops, pictures = data.dataset("train", True), data.sources["train"]
    assert len(data.loader("train")) == len(pictures) * 5 // 4
    whole = pictures[1]["image"]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (16, 16), (0, 1)).transpose(0, 1, 3, 4, 2)
    known = {np.rot90(w, k).tobytes() for w in windows.reshape(-1, 16, 16, 3) for k in range(4)}
    known |= {np.rot90(w[:, ::-1], k).tobytes() for w in windows.reshape(-1, 16, 16, 3) for k in range(4)}
    drawn = [crops[1 + n * len(pictures), 0]["image"].tobytes() for n in range(5)]
    assert set(drawn) <= known
    assert len(set(drawn)) > 3
    assert crops[1, 0]["image"].tobytes() == drawn[0] != crops[1, 1]["image"].tobytes()
    square = data.dataset("test", False)[0, 0]["image"]
    assert square.shape == (64, 64, 3)
    picture = data.sources["test"][0]["image"]  # 40 pixels high: mirrored at its edges
    assert np.array_equal(square[12:52], picture[:, 13:77])
    assert np.array_equal(square[11], picture[1, 13:77])
    monkeypatch.setattr("datamodules.photographs.find_spec", lambda package: None)
    with pytest.raises(DataError, match="pip install --no-deps foolbox scikit-image"):
        Photographs().sources  # noqa: B018


def test_an_srgan_goes_on_from_a_registered_srresnet_and_enlarges_pictures(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ["--data", "PhotographFolder", "--data.root", str(folder), "--data.image_size", "16", "--data.crops", "2",
            "--data.evaluation_size", "40", "--data.batch_size", "4", "--trainer.max_epochs", "1"]  # fmt: skip
    first = super_resolution(["fit", *data, *SMALL, *QUIET, "--output", "a", "--register", "larger"])
    assert first.model.monitor == "val/psnr_y"
    assert {"test/psnr_y", "test/psnr_y_bicubic", "test/ssim_y", "test/ssim_y_bicubic"} <= first.rows.keys()
    gan = ["--model.start", "models:/larger/1", "--model.adversarial", "0.01", "--model.similarity", "models:/larger/1"]
    second = super_resolution(["fit", *data, *SMALL, *gan, *QUIET, "--output", "b"])
    assert second.model.monitor == "val/perceptual_larger_1"
    assert second.model.mode == "min"
    with pytest.raises(SystemExit):
        super_resolution(["fit", *data, *QUIET, *gan])
    assert "needs a super-resolution model with the same generator" in capsys.readouterr().err

    Image.fromarray(photograph(21, 34)).save(tmp_path / "small.jpg")
    assert predict("models:/larger/1", [str(tmp_path / "small.jpg")], out="out", device="cpu") == 0
    for name in ("small.jpg", "small.enlarged.png"):
        assert Image.open(Path("out", name)).size == (136, 84)
