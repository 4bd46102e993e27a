"""What is shown of a network's inside is true: checked on networks whose answer is known beforehand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image
from torch import nn

from modules import ClassificationModule, GANModule, MultiLabelModule, RegressionModule
from modules import inspection as see
from modules.inspection import pictures
from modules.inspection.taps import Tap
from modules.pictures.charts import project
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.engine import command as engine
from pipelines.inspect import inspect
from pipelines.tracking.logger import run_id_of

VIT = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "small_stem": False}
SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4}
NETWORKS = {
    "conv": ("resnet18", {"layers": [1, 1, 1, 1], "channels": [8, 16, 16, 16]}),
    "vit": ("vit_tiny_patch16_224", VIT),
    "vit-avg": ("vit_tiny_patch16_224", VIT | {"global_pool": "avg", "class_token": False, "reg_tokens": 4}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}


def network(name: str, image_size: int = 32, in_chans: int = 3, **options: Any) -> ClassificationModule:
    torch.manual_seed(0)
    return ClassificationModule(
        DataSpec(num_classes=2, label_names=["left", "right"], in_chans=in_chans, image_size=image_size),
        Backbone(name, options=options),
    ).eval()


def sequential(layers: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Receptive field and stride after layers of (kernel, stride, …): r ← r + (k − 1)·j, j ← j·s."""
    size, stride = 1, 1
    for kernel, step, _ in layers:
        size, stride = size + (kernel - 1) * stride, stride * step
    return size, stride


def test_receptive_fields_are_those_of_the_arithmetic() -> None:
    lenet = network("lenet5", 28, 1)
    fields = see.receptive_fields(lenet, ["conv1", "pool1", "conv2", "pool2"])
    by_hand = {"conv1": (5, 1), "pool1": (6, 2), "conv2": (14, 2), "pool2": (16, 4)}
    assert {name: field[:2] for name, field in fields.items()} == by_hand
    assert fields["conv1"].start == -2
    assert fields["conv2"].box(0, 1, 28, 28) == (0, 0, 14, 12), "two pixels of the padding, and then two to the right"

    block = [(3, 1, 1), (2, 2, 0)]
    vgg = see.receptive_fields(network("vgg11_lrn", 224), ["block1", "block2", "block3", "block5"])
    two = [(3, 1, 1), (3, 1, 1), (2, 2, 0)]
    assert vgg["block1"][:2] == sequential(block)
    assert vgg["block2"][:2] == sequential(block * 2)
    assert vgg["block3"][:2] == sequential(block * 2 + two)
    assert vgg["block5"][:2] == sequential(block * 2 + two * 3) == (150, 32)

    resnet = see.receptive_fields(network("resnet18", 224), ["act1", "layer1", "layer2", "layer3", "layer4"])
    assert [field.size for field in resnet.values()] == [7, 43, 99, 211, 435], "also beyond the image"
    assert [field.stride for field in resnet.values()] == [2, 4, 8, 16, 32]

    assert see.receptive_fields(network(NETWORKS["vit"][0], **VIT), ["blocks.0"])["blocks.0"].size is None
    swin = see.receptive_fields(network(NETWORKS["swin"][0], **SWIN), ["layers.0", "layers.1"])
    assert (swin["layers.0"].size, swin["layers.1"].size) == (16, None), "two windows of 4 patches of 2 pixels, shifted"


def test_receptive_field_holds_every_pixel_with_a_slope_and_no_other() -> None:
    module = network("resnet18", 64, 3, small_stem=False).double()
    for part in module.backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.constant_(part.weight, 1)  # timm begins with residual branches of zero
    fields = see.receptive_fields(module, ["act1", "layer1"])
    for name in ("act1", "layer1"):
        image = torch.randn(4, 3, 64, 64, dtype=torch.double, requires_grad=True)
        with see.tapped(module, [name]) as taps:
            module.backbone(image)
            maps = taps[name].maps
        y = x = maps.shape[2] // 2
        (slope,) = torch.autograd.grad(maps[:, :, y, x].sum(), image)
        rows, columns = (slope.abs().sum((0, 1, axis)).nonzero()[:, 0] for axis in (3, 2))
        left, top, right, bottom = fields[name].box(y, x, 64, 64)
        assert (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) == (left, top, right, bottom)


@pytest.mark.parametrize(("name", "options"), NETWORKS.values(), ids=NETWORKS)
def test_maps_of_every_layout_lie_where_the_image_lies(name: str, options: dict[str, Any]) -> None:
    module = network(name, **options)
    image = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    changed = image.clone()
    changed[..., :8, 24:] = 255  # above, to the right
    first = see.stages(module)[0]
    with torch.no_grad():
        plain = module(image)
        maps, others = (see.feature_maps(module, i, [first])[first][0] for i in (image, changed))
        assert torch.equal(module(image), plain), "nothing is left behind"
    change = (maps - others).abs().sum(0)
    side = len(change)
    assert change.argmax() // side < side / 2
    assert change.argmax() % side >= side / 2


def squares(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, list[tuple[int, int]]]:
    """Noise, every second one with a red square of 8 pixels; whether it has one; where it begins (row, column)."""
    random = np.random.default_rng(seed)
    images = random.integers(60, 120, (count, 3, 32, 32), dtype=np.uint8)
    places = [(int(y), int(x)) for y, x in random.integers(0, 25, (count, 2))]
    for i, (y, x) in enumerate(places):
        if i % 2:
            images[i, :, y : y + 8, x : x + 8] = np.array([255, 0, 0], np.uint8)[:, None, None]
    return torch.from_numpy(images), torch.arange(count) % 2, places


def test_grad_cam_and_occlusion_find_what_the_class_rests_on() -> None:
    module = network(NETWORKS["conv"][0], **NETWORKS["conv"][1]).train()
    optimizer = torch.optim.AdamW(module.parameters(), 2e-3)
    for step in range(50):
        images, labels, _ = squares(32, step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(images), labels).backward()
        optimizer.step()
    images, labels, places = squares(40, 1000)
    assert see.chosen_class(module, images).eq(labels).float().mean() > 0.9
    images, labels, places = images[1::2], labels[1::2], places[1::2]
    layer = see.speaking_layer(module, images, labels)
    assert layer == "layer4"
    assert module.training, "it is left as it was"
    cam = see.grad_cam(module, images, labels, layer)
    for found in (nn.functional.interpolate(cam, (32, 32), mode="bilinear"), see.occlusion(module, images, labels)):
        best = [divmod(int(one.argmax()), 32) for one in found[:, 0]]
        hits = sum(abs(y - r + 3.5) < 8 and abs(x - c + 3.5) < 8 for (y, x), (r, c) in zip(places, best, strict=True))
        assert hits >= 15, f"{hits} of 20, where chance is 5"


class LeftModule(ClassificationModule):
    """Its answer depends on the left half of the image only."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return super().forward(torch.cat([image[..., :16], torch.zeros_like(image[..., 16:])], 3))


@pytest.mark.parametrize(("name", "options"), NETWORKS.values(), ids=NETWORKS)
def test_covering_what_does_not_count_changes_nothing(name: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module = LeftModule(DataSpec(3, 32, 2), Backbone(name, options=options)).eval()
    found = see.occlusion(module, squares(2, 0)[0], torch.tensor([0, 1]))
    assert found.shape == (2, 1, 32, 32)
    assert found[..., 22:].abs().max() < 1e-5, "a window is six pixels wide"
    assert (found[..., :10].abs().amax((1, 2, 3)) > 1e-4).all()


@pytest.mark.parametrize(("name", "options", "layer", "prefix"), [
    (*NETWORKS["conv"], "layer4", 0), (*NETWORKS["vit"], "blocks.1.norm1", 1),
    (*NETWORKS["vit-avg"], "blocks.1.norm1", 4), (*NETWORKS["swin"], "layers.1.blocks.1.norm1", 0),
])  # fmt: skip
def test_grad_cam_is_that_of_the_formula(name: str, options: dict[str, Any], layer: str, prefix: int) -> None:
    module = network(name, **options)
    image, kept = squares(2, 0)[0], list[torch.Tensor]()
    target = torch.tensor([1, 0])
    assert see.speaking_layer(module, image, target) == layer
    hook = see.find_layer(module, layer).register_forward_hook(lambda layer, given, result: kept.append(result))
    score = module(image)[[0, 1], target].sum()
    hook.remove()
    slope, maps = torch.autograd.grad(score, kept[0])[0], kept[0]
    if maps.ndim == 3:
        slope, maps = (t[:, prefix:].reshape(2, 8, 8, -1).movedim(3, 1) for t in (slope, maps))
    elif name.startswith("swin"):
        slope, maps = (t.movedim(3, 1) for t in (slope, maps))
    by_hand = (slope.mean((2, 3), keepdim=True) * maps).sum(1, keepdim=True)
    assert by_hand.abs().max() > 0
    assert torch.allclose(see.grad_cam(module, image, target, layer), by_hand.relu(), atol=1e-6)
    shares = see.grad_cam(module, image, target, layer, whole=False)
    assert torch.allclose(shares.sum(1, keepdim=True), by_hand, atol=1e-6)


def edge_detector() -> ClassificationModule:
    """LeNet-5 whose first filter answers to an upright edge, dark on the left."""
    module = network("lenet5", 28, 1)
    with torch.no_grad():
        module.backbone.conv1.weight[0] = torch.tensor([-1.0, -1.0, 0.0, 1.0, 1.0]).expand(5, 5)
        module.backbone.conv1.bias[0] = 0
    return module


def test_filters_are_drawn_with_zero_as_grey() -> None:
    module = edge_detector()
    name, kernels = see.filters(module)
    assert (name, kernels.shape) == ("conv1", (6, 1, 5, 5))
    sheet = pictures.draw_filters(module)
    tile = sheet[-70:-6, 6:70]
    assert tile.shape == (64, 64, 3)
    assert tile[32, [4, 16, 32, 48, 60], 0].tolist() == [0, 0, 128, 255, 255]
    assert see.filters(network("resnet10t"), "layer1.0.conv1")[1].ndim == 4
    assert see.filters(network("mlp", 8, 1, hidden=[5]))[1].shape == (5, 1, 8, 8), "an MLP's weights as pictures"
    deep = pictures.draw_filters(network("resnet10t", in_chans=5))
    assert deep.shape[1] >= 5 * 70, "each of five channels for itself"
    with pytest.raises(see.NotApplicableError, match="not to the pixels"):
        see.filters(module, "neck.1")


def test_patches_are_cut_where_the_unit_is_excited_most() -> None:
    images = torch.full((6, 1, 28, 28), 60, dtype=torch.uint8)
    images[3, :, :, 15:] = 255  # the best edge
    images[5, :, :, 10:] = 220
    images[1, :, :, :10] = 255  # dark on the right
    module = edge_detector()
    patches = see.top_patches(module, images, "conv1", 0, count=2, batch_size=4)
    assert [patch.image for patch in patches] == [3, 5]
    assert patches[0].x in (14, 15)
    left, _, right, _ = see.receptive_fields(module, ["conv1"])["conv1"].box(patches[0].y, patches[0].x, 28, 28)
    assert left < 15 < right == left + 5
    assert pictures.default_unit(module, images[3:4], None, "head") == ("head", int(module(images[3:4]).argmax()))


@pytest.mark.parametrize(("name", "options", "layer", "factor"), [
    (*NETWORKS["conv"], "layer2", 2), (*NETWORKS["vit"], "blocks.1", 1.3), (*NETWORKS["swin"], "layers.0", 1.3),
    ("mlp", {}, "head", 2),
])  # fmt: skip
def test_gradient_ascent_raises_the_unit(name: str, options: dict[str, Any], layer: str, factor: float) -> None:
    module = network(name, **options)
    state = torch.get_rng_state()
    image, before, after = see.gradient_ascent(module, layer, 1, steps=30)
    assert torch.equal(torch.get_rng_state(), state), "a training that it is part of draws the same"
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    maps = see.feature_maps(module, torch.from_numpy(image).permute(2, 0, 1)[None], [layer])[layer]
    assert float(maps[0, 1].mean()) == pytest.approx(after, abs=0.05 * abs(after) + 0.01)
    assert after > factor * abs(before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_unit_at_rest_is_excited_all_the_same() -> None:
    module = edge_detector()
    with torch.no_grad():
        module.backbone.conv1.bias[0] = -1  # noise is not enough for it
    _, before, after = see.gradient_ascent(module, "pool1", 0, steps=60)
    assert before == 0
    assert after > 0.5


SMALL = ["--data", "Digits8x8", "--data.image_size", "12", "--trainer.enable_progress_bar", "false"]


@pytest.fixture(scope="module")
def run_id(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        classification(["fit", *SMALL, "--trainer.max_epochs", "2", "--register", "seen", "--output", "out",
                        "--trainer.callbacks+=pipelines.inspect.InspectionCallback",
                        "--trainer.callbacks.every_n_epochs", "2", "--trainer.callbacks.points", "50"])  # fmt: skip
        classification(["fit", *SMALL, "--trainer.max_epochs", "2", "--output", "plain"])
        plain, watched = (
            torch.load(f"{folder}/last.ckpt", weights_only=True)["state_dict"] for folder in ("plain", "out")
        )
        assert all(torch.equal(plain[key], watched[key]) for key in plain), "looking changes nothing"
        return run_id_of("out")


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as end:
        engine.command(inspect, [*args])
    return int(end.value.code or 0)


def artifacts(run_id: str, folder: str) -> list[str]:
    return [Path(file.path).name for file in MlflowClient().list_artifacts(run_id, folder)]


def test_training_shows_its_inside_every_n_epochs(run_id: str) -> None:
    keys = {name.split("+")[0] for name in artifacts(run_id, "images") if name.startswith("inspect~")}
    shown = ("filters", "feature_maps", "embedding", "explanation_0", "explanation_1")
    assert keys == {f"inspect~{key}" for key in shown}
    assert len([name for name in artifacts(run_id, "images") if name.startswith("inspect~filters+step")]) == 2, "once"


def test_the_command_writes_every_picture_and_logs_it(run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    for file in ("a/1.png", "a/2.png"):
        Path(file).parent.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 30), dtype=np.uint8)).save(file)
    Path("a/bad.png").write_bytes(b"no")
    assert command("models:/seen/1", "a", "none.png", "--out", "a/out", "--samples", "60", "--embedding", "pca") == 1
    files = ["filters", "receptive_fields", "unit", "embedding", "01-1-maps", "01-1-why", "02-2-maps", "02-2-why"]
    assert sorted(path.name for path in Path("a/out").iterdir()) == sorted(f"{name}.png" for name in files)
    assert sorted(artifacts(run_id, "inspect")) == sorted(f"{name}.png" for name in files)
    for name in files:
        assert np.asarray(Image.open(f"a/out/{name}.png")).std() > 5, name
    out = capsys.readouterr()
    assert all(f"{name}.png" in out.out for name in files)
    assert "pool2" in out.out
    assert "16 px" in out.out
    assert "a/bad.png" in out.err
    assert "none.png" in out.err

    assert command("models:/seen/1", "--data", "Digits8x8", "--samples", "40", "--layer", "conv1", "--channel", "3",
                   "--label", "7", "--log", "false") == 0  # fmt: skip
    assert Path("outputs/inspect/seen-1/04-why.png").exists(), "four images of the data"
    assert "channel 3 of conv1" in capsys.readouterr().out
    assert len(artifacts(run_id, "inspect")) == len(files)


@pytest.mark.parametrize(("args", "message"), [
    (["models:/seen/1", "--layer", "pool3"], "no layer 'pool3'; its stages are pool1, pool2"),
    (["models:/seen/1", "--layer", "pool2", "--channel", "16"], "pool2 has the channels 0 to 15, and no channel 16"),
    (["models:/seen/1", "--label", "eleven"], "no class 'eleven' among the 10"),
    (["models:/unseen/1"], "unseen"),
    (["models:/seen/1", "nothing.png"], "No images were found"),
    (["models:/seen/1", "text.png"], "None of them could be read"),
])  # fmt: skip
def test_a_mistake_is_one_paragraph_and_exit_code_2(
    run_id: str, args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("text.png").write_text("text")
    assert command(*args, "--samples", "20") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not Path("outputs").exists(), "nothing is written"


def test_a_score_is_what_the_task_means_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "overlays", lambda image, title, maps: title)
    spec = DataSpec(1, 28, label_names=["count", "sum"], target_mean=[100.0, 300.0], target_std=[1.0, 1.0])
    image = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)
    for kind, meant in ((RegressionModule, float), (MultiLabelModule, torch.sigmoid)):
        made = kind(spec, Backbone("lenet5")).eval()
        with torch.no_grad():
            score = made(image)[0, 1]
        name, value = str(pictures.draw_explanation(made, image, "sum")).split()
        assert name == "sum"
        assert float(value) == pytest.approx(float(meant(score)), abs=0.06)
    conditional = GANModule(DataSpec(1, 28, label_names=["a", "b"]), conditional=True)
    with pytest.raises(see.NotApplicableError, match="GANModule does not score classes"):
        pictures.draw_explanation(conditional, image)
    assert pictures.default_unit(conditional, image)[0] == see.stages(conditional)[-1]


def test_what_has_no_meaning_is_said(run_id: str) -> None:
    module = network("mlp", 8, 1)
    image = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(see.NotApplicableError, match="has no feature maps"):
        pictures.draw_feature_maps(module, image)
    with pytest.raises(see.NotApplicableError, match="sees the whole image"):
        pictures.draw_fields(image[0], see.receptive_fields(module, see.stages(module)))
    assert pictures.draw_explanation(module, image).shape[2] == 3, "occlusion alone"
    assert pictures.default_unit(module, image)[0] == "neck.3"
    swin = network(NETWORKS["swin"][0], **SWIN)
    with pytest.raises(ValueError, match="divided into windows"):
        see.feature_maps(swin, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), ["layers.0.blocks.0.attn"])
    with pytest.raises(ValueError, match=r"\(1×7×3\) cannot be shown as maps"):
        Tap("odd", False, 0, True).hook(swin, None, torch.zeros(1, 7, 3))


def test_classes_that_are_apart_stay_apart_in_the_plane() -> None:
    random = np.random.default_rng(0)
    points = np.concatenate([random.normal(0, 1, (40, 20)), random.normal(8, 1, (40, 20))]).astype(np.float32)
    for method in ("pca", "tsne"):
        flat = project(points, method)  # type: ignore[arg-type]
        assert flat.shape == (80, 2)
        centres = flat[:40].mean(0), flat[40:].mean(0)
        near = np.linalg.norm(flat - centres[0], axis=1) < np.linalg.norm(flat - centres[1], axis=1)
        assert (near == (np.arange(80) < 40)).all()


def test_attention_of_a_transformer_is_a_share_for_each_patch_and_others_have_none() -> None:
    module, image = network(NETWORKS["vit"][0], **VIT), torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    before = module.backbone(module.normalize(image))
    shares = see.attention(module, image)
    assert shares.shape[0] == 2
    assert shares.shape[2:] == module.backbone.patch_embed.grid_size
    assert (shares > 0).all()
    assert (shares.sum((2, 3)) < 1).all(), "the class token has a share, too"
    assert torch.equal(module.backbone(module.normalize(image)), before), "it is as it was"
    for other in ("vit-avg", "swin", "conv"):
        with pytest.raises(see.NotApplicableError, match="no class token"):
            see.attention(network(NETWORKS[other][0], **NETWORKS[other][1]), image)
