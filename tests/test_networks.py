"""The lectures' networks have the published sizes, and the lectures' worked examples hold."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import start
from safetensors.torch import save_file
from torch import nn

from datamodules.options import Preprocessing
from modules import (
    ClassificationModule,
    FaceNetModule,
    MaskedAutoencodingModule,
    MultiLabelModule,
    RegressionModule,
    SegmentationModule,
    create_backbone,
)
from modules.callbacks.freezing import freeze_unlearned
from modules.networks import BackboneError
from modules.networks.airbench import Whitening
from modules.networks.dense_decoders import DeepLabV3
from modules.networks.faces import Affine, DlibFaceResNet, InceptionResnetV1, _Residual
from modules.networks.registered import timm
from modules.spec import Backbone, DataSpec
from pipelines.classification import classification
from pipelines.serving.store import load_model, save_model

# Parameters: LeCun et al. 1989 and 1998, Krizhevsky et al. 2012 (60 million), Simonyan & Zisserman 2015 table 2 (133,
# 133, 134, 138 and 144 million), Szegedy et al. 2015, He et al. 2016, Huang et al. 2017, Chollet 2017, Howard et al. 2017,
# Dosovitskiy et al. 2021, Liu et al. 2021 and 2022.
PUBLISHED = {
    "mlp": 266_610, "lenet1989": 9_760, "lenet4": 16_698, "lenet5": 61_706, "alexnet": 60_965_224, "vgg11": 132_863_336,
    "vgg11_lrn": 132_863_336, "vgg13": 133_047_848, "vgg16_c": 133_638_952, "vgg16": 138_357_544, "vgg19": 143_667_240,
    "googlenet": 13_378_280, "inception_v3": 23_834_568, "resnet18": 11_689_512, "resnet34": 21_797_672,
    "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808, "densenet121": 7_978_856,
    "densenet169": 14_149_480, "densenet201": 20_013_928, "xception": 22_855_952, "mobilenetv1_100": 4_231_976,
    "mobilenetv2_100": 3_504_872, "mobilenetv3_large_100": 5_483_032,
    "mobilenetv4_conv_small": 3_774_024, "vit_base_patch16_224": 86_567_656,
    "swin_tiny_patch4_window7_224": 28_288_354, "swin_small_patch4_window7_224": 49_606_258,
    "swin_base_patch4_window7_224": 87_768_224, "convnext_tiny": 28_589_128, "convnext_small": 50_223_688,
    "convnext_base": 88_591_464, "inception_resnet_v1": 23_482_624,
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("name", "parameters"), PUBLISHED.items(), ids=PUBLISHED)
def test_a_network_has_the_published_number_of_parameters(name: str, parameters: int) -> None:
    with torch.device("meta"):
        network = timm.create_model(name)
    assert sum(p.numel() for p in network.parameters()) == parameters


def test_googlenet_without_its_auxiliary_classifiers_has_seven_million() -> None:
    with torch.device("meta"):
        network = timm.create_model("googlenet")
    assert sum(p.numel() for name, p in network.named_parameters() if not name.startswith("aux")) == 6_998_552


def size(n: int, kernel: int, stride: int, padding: int) -> int:
    return math.floor((n + 2 * padding - kernel) / stride) + 1


@pytest.mark.parametrize(
    ("name", "side", "expected"),
    [
        ("lenet1989", 16, [size(16, 5, 2, 2), size(size(16, 5, 2, 2), 5, 2, 2)]),
        ("lenet5", 28, [size(size(28, 5, 1, 2), 2, 2, 0), size(size(14, 5, 1, 0), 2, 2, 0)]),
        ("lenet4", 28, [size(size(28, 5, 1, 2), 2, 2, 0), size(size(14, 5, 1, 0), 2, 2, 0)]),
        ("alexnet", 224, [size(size(224, 11, 4, 2), 3, 2, 0), size(27, 3, 2, 0), size(13, 3, 2, 0)]),
        ("vgg16_c", 64, [32, 16, 8, 4, 2]),
        ("googlenet", 224, [112, 56, 28, 14, 7]),
    ],
)
def test_each_stage_has_the_size_of_the_formula(name: str, side: int, expected: list[int]) -> None:
    small = {} if side > 64 or name.startswith("lenet") else {"small_stem": False}
    chans = 1 if name.startswith("lenet") else 3
    network = create_backbone(name, image_size=side, in_chans=chans, features_only=True, **small)
    levels = network(torch.zeros(1, chans, side, side))
    assert [level.shape[-1] for level in levels] == expected
    assert [level.shape[1] for level in levels] == network.feature_info.channels()


def test_each_map_of_lenet_1989_sees_eight_of_twelve() -> None:
    network = timm.create_model("lenet1989").eval()
    x = torch.zeros(1, 12, 8, 8, requires_grad=True)
    for k in range(12):
        (gradient,) = torch.autograd.grad(network.h2(x)[0, k].sum(), x)
        assert int((gradient.abs().sum((0, 2, 3)) > 0).sum()) == 8


def test_the_auxiliary_classifiers_are_trained_and_then_dropped() -> None:
    module = ClassificationModule(
        DataSpec(num_classes=10, in_chans=1, image_size=28), Backbone("googlenet", channels_last=False)
    )
    batch = {"image": torch.randint(256, (4, 1, 28, 28), dtype=torch.uint8), "label": torch.tensor([1, 2, 3, 4])}
    module.train()
    torch.manual_seed(0)
    loss = module.losses(batch).total
    torch.manual_seed(0)
    logits = module.head(module.backbone(module.normalize(batch["image"])))
    losses = [F.cross_entropy(given, batch["label"]) for given in (logits, *module.backbone.aux_logits)]
    assert len(losses) == 3
    assert loss.item() == pytest.approx((losses[0] + 0.3 * (losses[1] + losses[2])).item())
    loss.backward()
    assert all(p.grad is not None for p in module.backbone.aux.parameters())
    module.eval()(batch["image"])
    assert module.backbone.aux_logits == []


def test_a_trained_googlenet_starts_another_task(tmp_path: Path) -> None:
    """Its file has auxiliary classifiers, but no main one."""
    data = DataSpec(num_classes=3, in_chans=1, image_size=28)
    trained = ClassificationModule(data, Backbone("googlenet", options={"width": 0.1}, channels_last=False)).backbone
    save_file(trained.state_dict(), tmp_path / "weights.safetensors")
    again = Backbone(str(tmp_path / "weights.safetensors"), options={"architecture": "googlenet", "width": 0.1})
    module = RegressionModule(data, again)
    found = module.backbone.state_dict()
    assert found
    save_model(tmp_path / "model", module, Preprocessing(28, 1, "crop"), "regression")
    kept = load_model(tmp_path / "model")[0].backbone.state_dict()
    assert kept.keys() == found.keys()
    old = trained.state_dict()
    assert all(torch.equal(value, old[key]) for key, value in found.items() if not key.startswith("aux."))


def test_what_a_loss_does_not_depend_on_is_frozen_for_several_processes() -> None:
    """DDP ends a training in which a weight that learns has no gradient."""
    small, large = DataSpec(num_classes=3, in_chans=1, image_size=28), DataSpec(num_classes=3, image_size=64)
    image = torch.randint(256, (2, 3, 96, 96), dtype=torch.uint8)
    aux, side = Backbone("googlenet", channels_last=False), Backbone("hrnet_w18_small")
    for module, frozen, batch in (
        (ClassificationModule(small, aux), False, {"label": torch.tensor([0, 1])}),
        (
            ClassificationModule(DataSpec(num_classes=3, image_size=96), Backbone("inception_v3")),
            False,
            {"label": torch.tensor([0, 1])},
        ),
        (MultiLabelModule(small, aux), True, {"labels": torch.tensor([[0, 1, 1], [1, 0, 0]])}),
        (RegressionModule(small, aux), True, {"target": torch.randn(2, 3)}),
        (SegmentationModule(large, side, decoder=DeepLabV3), True, {"mask": torch.zeros(2, 64, 64, dtype=torch.long)}),
        (MaskedAutoencodingModule(large, Backbone("vit_tiny_patch16_224", options={"global_pool": "avg"})), True, {}),
        (FaceNetModule(large, side, levels=1), True, {"identity": torch.tensor([0, 1])}),
    ):
        shown = {"image": image[:, : module.in_chans, : module.size[0], : module.size[1]], **batch}
        assert module.reads_parts
        freeze_unlearned(module, shown)
        assert frozen != all(value.requires_grad for value in module.backbone.parameters())
        module.train().losses(shown).total.backward()
        assert [
            key for key, value in module.named_parameters() if value.requires_grad != (value.grad is not None)
        ] == []


@pytest.mark.parametrize("name", ["mlp", "lenet1989", "alexnet", "googlenet", "airbench"])
def test_a_lecture_network_is_trained_by_name(name: str) -> None:
    options = {"alexnet": ["--model.backbone.options.width", "0.1"], "googlenet": ["--data.batch_size", "8"]}
    side = {"lenet1989": "16", "mlp": "8"}.get(name, "28")
    cli = classification(["fit", "--data", "Digits8x8", "--data.image_size", side, "--model.backbone", name,
                          "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "4", "--trainer.limit_val_batches", "4", "--trainer.limit_test_batches", "4", "--trainer.logger", "false",
                          "--trainer.enable_progress_bar", "false", *options.get(name, [])])  # fmt: skip
    assert math.isfinite(float(cli.trainer.callback_metrics["test/loss"]))


def patchy(count: int = 32, seed: int = 0) -> torch.Tensor:
    """Pictures whose neighbouring pixels and channels are alike, as those of photographs are."""
    generator = torch.Generator().manual_seed(seed)
    coarse, fine = (torch.randn(count, 1, n, n, generator=generator) for n in (8, 32))
    colour = torch.randn(count, 3, 32, 32, generator=generator)
    return F.interpolate(coarse, 32, mode="bicubic") + 0.3 * fine + 0.1 * colour


def test_the_first_batch_of_a_training_makes_the_patches_of_images_white() -> None:
    network, image = create_backbone("airbench", image_size=32), patchy()
    first = network.stem[0]
    with torch.no_grad():
        network.eval()(image)
        assert not first.ready
        network.train()(image)
        maps = F.conv2d(image, first.weight).transpose(0, 1).flatten(1)
    half = len(maps) // 2
    assert torch.equal(maps[:half], -maps[half:])
    assert torch.allclose(maps[:half] @ maps[:half].T / maps.shape[1], torch.eye(half), atol=0.1)
    assert maps[:half].var(1).mean() > 0.9
    # They stay as they are, also where a network is trained on that was saved.
    save_file(network.state_dict(), "white.safetensors")
    again = create_backbone("white.safetensors", architecture="airbench", image_size=32)
    assert not again.stem[0].weight.requires_grad
    with torch.no_grad():
        for trained in (network, again):
            trained.train()(3 * patchy(seed=1))
            assert torch.equal(trained.stem[0].weight, first.weight)
        # One that begins anew is whitened anew.
        network.load_state_dict(create_backbone("airbench", image_size=32).state_dict())
        network(3 * patchy(seed=1))
        assert not torch.allclose(first.weight, again.stem[0].weight)
        assert torch.equal(first.weight, first.whitening(3 * patchy(seed=1)))


def _whiten_a_share(args: list[str]) -> None:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    torch.save(Whitening(3).whitening(patchy()[rank::2]), f"{rank}.pth")


def test_two_processes_whiten_as_one_does() -> None:
    alone = Whitening(3).whitening(patchy())[:12].flatten(1)
    assert start(_whiten_a_share, [], world_size=2) == [0, 0]
    for rank in range(2):
        shared = torch.load(f"{rank}.pth")[:12].flatten(1)
        inverse = (
            alone.T @ alone
        )  # of the covariance; signs of the components are open, and their order where they are alike
        assert (shared.T @ shared - inverse).norm() < 0.01 * inverse.norm()


@pytest.mark.parametrize(("in_chans", "image_size"), [(1, 28), (5, 40)])
def test_airbench_takes_any_channels_and_sizes(in_chans: int, image_size: int) -> None:
    options = {"in_chans": in_chans, "image_size": image_size, "channels": [8, 16, 24]}
    image = torch.rand(2, in_chans, image_size, image_size)
    assert create_backbone("airbench", **options).eval()(image).shape == (2, 24)
    pyramid = create_backbone("airbench", features_only=True, **options)
    sides = [(image_size - 1) // 2**n for n in (1, 2, 3)]
    expected = [(2, width, side, side) for width, side in zip((8, 16, 24), sides, strict=True)]
    assert [level.shape for level in pyramid.eval()(image)] == expected
    assert pyramid.feature_info.reduction() == [2, 4, 8]


# The lectures' worked examples


def test_a_convolution_with_a_2x2_kernel_and_relu() -> None:
    image = torch.tensor([[1.0, 2, 0], [0, 1, 3], [2, 0, 1]])[None, None]
    kernel = torch.tensor([[1.0, -1], [0, 1]])[None, None]
    # (1-2+1, 2-0+3; 0-1+0, 1-3+1), by hand
    assert F.relu(F.conv2d(image, kernel)).tolist() == [[[[0, 5], [0, 0]]]]


def test_a_3x3_kernel_on_a_binary_image_of_5x5() -> None:
    image = torch.tensor([[1.0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 0, 1, 1, 1], [0, 0, 1, 1, 0], [0, 1, 1, 0, 0]])
    kernel = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1]])
    assert F.conv2d(image[None, None], kernel[None, None]).tolist() == [[[[4, 3, 4], [2, 4, 3], [2, 3, 4]]]]


def test_three_channels_are_summed_and_the_bias_added() -> None:
    conv = nn.Conv2d(3, 1, 2)
    conv.weight.data = torch.tensor([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]], [[1, 1], [1, 1]]])[None]
    conv.bias.data.fill_(1.0)
    image = torch.tensor([[[1.0, 2], [3, 4]], [[5, 6], [7, 8]], [[1, 0], [0, 1]]])[None]
    assert conv(image).item() == (1 + 4) + (6 + 7) + 2 + 1


def test_max_pooling_keeps_the_greatest_of_each_window() -> None:
    image = torch.tensor([[1.0, 1, 2, 4], [5, 6, 7, 8], [3, 2, 1, 0], [1, 2, 3, 4]])[None, None]
    assert F.max_pool2d(image, 2).tolist() == [[[[6, 8], [3, 4]]]]


def test_where_dlib_halves_an_image_what_is_smaller_is_filled_with_zeros() -> None:
    block = _Residual(2, 3, down=True)
    for layer in (block.conv1, block.conv2):
        nn.init.zeros_(layer.weight)
        nn.init.constant_(layer.bias, 1.0)
    image = torch.arange(128.0).view(1, 2, 8, 8)
    result = block(image)[0]  # of 8 pixels the convolution leaves 3, the mean 4
    mean = image[0].unflatten(1, (4, 2)).unflatten(3, (4, 2)).mean((2, 4))
    assert torch.equal(result[:2, :3, :3], mean[:, :3, :3] + 1)
    assert torch.equal(result[:2, 3], mean[:, 3])
    assert torch.equal(result[2], F.pad(torch.ones(3, 3), (0, 1, 0, 1)))


def dlib_file(network: DlibFaceResNet) -> bytes:
    """A file in dlib's form: numbers are a byte that counts their bytes, and these."""

    def number(value: int) -> bytes:
        size = max(1, (value.bit_length() + 7) // 8)
        return bytes([size]) + value.to_bytes(size, "little")

    def tensor(*values: torch.Tensor) -> bytes:
        flat = torch.cat([value.flatten() for value in values])
        return b"".join(map(number, (2, len(flat), 1, 1, 1))) + flat.numpy().astype("<f4").tobytes()

    def name(text: str) -> bytes:
        return number(len(text)) + text.encode()

    content = number(1) + name("loss_metric_2") + name("input_rgb_image_sized")
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            content += name("con_4") + tensor(layer.weight.data, layer.bias.data) + number(1)
        elif isinstance(layer, Affine):
            content += name("affine_") + tensor(layer.weight.data, layer.bias.data) + number(0)
        elif isinstance(layer, nn.Linear):
            content += name("fc_2") + number(128) + number(256)
            content += b"".join(map(number, (2, 256, 128, 1, 1))) + layer.weight.data.T.contiguous().numpy().tobytes()
    return content


def test_published_networks_of_faces_are_read_from_their_own_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 150, 150)
    source = DlibFaceResNet().eval()
    for affine in filter(lambda m: isinstance(m, Affine), source.modules()):
        nn.init.normal_(affine.weight, 0.7, 0.1)
    file = tmp_path / "network.dat"
    file.write_bytes(content := dlib_file(source))
    network = create_backbone(str(file), image_size=150).eval()
    assert network.head_hidden_size == 128
    assert torch.equal(network(image), source(image))
    assert [level.shape[1] for level in create_backbone(str(file), image_size=150, features_only=True)(image)] == [
        32,
        64,
        128,
        256,
        256,
    ]
    for wrong in (content[:-9], content.replace(b"con_4", b"con_5"), b""):
        file.write_bytes(wrong)
        with pytest.raises(BackboneError, match=r"network\.dat cannot be read: It is not dlib's network of faces"):
            create_backbone(str(file), image_size=150)
    inception = InceptionResnetV1().eval()
    state = {key.removeprefix("neck."): value for key, value in inception.state_dict().items()}
    torch.save(
        state | {"logits.weight": torch.zeros(8631, 512), "logits.bias": torch.zeros(8631)}, tmp_path / "faces.pt"
    )
    given = {"architecture": "inception_resnet_v1", "image_size": 160}
    assert torch.equal(create_backbone(str(tmp_path / "faces.pt"), **given).eval()(image), inception(image))
