"""Registration of networks that timm does not have. `timm` is imported from here where networks are made, and nowhere earlier, since
PyTorch's compiler comes with it, which takes as long as PyTorch."""

from typing import Any

import timm as timm
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from modules.networks.airbench import Airbench
from modules.networks.base import Network, sides_of
from modules.networks.discriminators import DCGAN, PatchGAN, ProgressiveDiscriminator, halvings
from modules.networks.faces import DlibFaceResNet, InceptionResnetV1, facenet_weights
from modules.networks.imagenet import VGG, AlexNet, GoogLeNet
from modules.networks.lenet import DQN, MLP, ConvNet, Embedding, LeNet4, LeNet5, LeNet1989


def _cfg(
    side: int = 224, chans: int = 3, classes: int = 1000, first_conv: str = "conv1", **more: Any
) -> dict[str, Any]:
    mean, std = ((0.5,), (0.5,)) if chans == 1 else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    return {
        "input_size": (chans, side, side), "num_classes": classes, "mean": mean, "std": std, "interpolation": "bicubic",
        "crop_pct": 1.0 if chans == 1 else 0.875, "first_conv": first_conv, "classifier": "fc",
    } | more  # fmt: skip


CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DLIB_MEAN = (122.782 / 255, 117.001 / 255, 104.298 / 255)


def _facenet(file: str) -> dict[str, Any]:
    url = f"https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/{file}.pt"
    return _cfg(160, 3, 0, "conv2d_1a.conv", mean=(0.5,) * 3, std=(128 / 255,) * 3, url=url)


default_cfgs = generate_default_cfgs(  # must have this name for timm's registration
    {
        "mlp.untrained": _cfg(28, 1, 10, "neck.1", fixed_input_size=True),
        "embedding.untrained": _cfg(1, 1, 10, "neck", fixed_input_size=True, mean=(0.0,), std=(1.0,)),
        "lenet1989.untrained": _cfg(16, 1, 10, "h1.0"),
        "lenet4.untrained": _cfg(28, 1, 10, "conv1.0", fixed_input_size=True),
        "lenet5.untrained": _cfg(28, 1, 10, fixed_input_size=True),
        "convnet.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "airbench.untrained": _cfg(32, 3, 10, "stem.0", mean=CIFAR_MEAN, std=CIFAR_STD),
        "dqn.untrained": _cfg(84, 4, 10, "block1.0", fixed_input_size=True, mean=(0.0,), std=(1.0,)),
        "dcgan.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "patchgan.untrained": _cfg(28, 1, 10, "block1.0", fixed_input_size=True),
        "progressive.untrained": _cfg(28, 1, 10, "entries.0.0", fixed_input_size=True),
        "alexnet.untrained": _cfg(fixed_input_size=True),
        "vgg11_lrn.untrained": _cfg(first_conv="block1.0"),
        "vgg16_c.untrained": _cfg(first_conv="block1.0"),
        "googlenet.untrained": _cfg(first_conv="conv1.0"),
        "dlib_face_resnet.dlib": _cfg(150, 3, 0, "conv1.0", mean=DLIB_MEAN, std=(256 / 255,) * 3, license="cc0-1.0"),
        "inception_resnet_v1.vggface2": _facenet("20180402-114759-vggface2"),
        "inception_resnet_v1.casia_webface": _facenet("20180408-102900-casia-webface"),
    }
)


def _build(network: type[Network], name: str, pretrained: bool, levels: int, **kwargs: Any) -> Network:
    return build_model_with_cfg(network, name, pretrained, feature_cfg={"out_indices": tuple(range(levels))}, **kwargs)


@register_model
def mlp(pretrained: bool = False, **kwargs: Any) -> Network:
    """Multilayer perceptron on pixels, 784-300-100-10."""
    return _build(MLP, "mlp", pretrained, 0, **kwargs)


@register_model
def embedding(pretrained: bool = False, **kwargs: Any) -> Network:
    """Embedding of integers, for series of them."""
    return _build(Embedding, "embedding", pretrained, 0, **kwargs)


@register_model
def lenet1989(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet of 1989, for images of 16 pixels."""
    return _build(LeNet1989, "lenet1989", pretrained, 2, **kwargs)


@register_model
def lenet4(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet-4."""
    return _build(LeNet4, "lenet4", pretrained, 2, **kwargs)


@register_model
def lenet5(pretrained: bool = False, **kwargs: Any) -> Network:
    """LeNet-5; ``form="published"`` for tanh and average pooling."""
    return _build(LeNet5, "lenet5", pretrained, 2, **kwargs)


@register_model
def convnet(pretrained: bool = False, **kwargs: Any) -> Network:
    """A small convnet; ``channels=(32, 64)`` for two convolutions instead of three."""
    levels = len(kwargs.get("channels", (32, 64, 128)))
    return _build(ConvNet, "convnet", pretrained, levels, **kwargs)


@register_model
def airbench(pretrained: bool = False, **kwargs: Any) -> Network:
    """The network of airbench94; ``channels=(32, 128, 128)`` for half its width."""
    return _build(Airbench, "airbench", pretrained, len(kwargs.get("channels", (64, 256, 256))), **kwargs)


@register_model
def dqn(pretrained: bool = False, **kwargs: Any) -> Network:
    """The convolutions of the deep Q-network; ``convolutions=[[16, 3, 1]]`` for MinAtar's."""
    return _build(DQN, "dqn", pretrained, len(kwargs.get("convolutions", (1, 2, 3))), **kwargs)


@register_model
def dcgan(pretrained: bool = False, **kwargs: Any) -> Network:
    """DCGAN's discriminator; ``norm=True`` for its batch normalisation."""
    return _build(DCGAN, "dcgan", pretrained, 2, **kwargs)


@register_model
def patchgan(pretrained: bool = False, **kwargs: Any) -> Network:
    """PatchGAN, the discriminator of pix2pix and CycleGAN; ``norm=False`` for no instance normalisation."""
    return _build(PatchGAN, "patchgan", pretrained, halvings(min(sides_of(kwargs.get("img_size", 28)))), **kwargs)


@register_model
def progressive(pretrained: bool = False, **kwargs: Any) -> Network:
    """Progressive GAN's discriminator."""
    return _build(ProgressiveDiscriminator, "progressive", pretrained, 1, **kwargs)


@register_model
def alexnet(pretrained: bool = False, **kwargs: Any) -> Network:
    """AlexNet as published."""
    return _build(AlexNet, "alexnet", pretrained, 3, **kwargs)


@register_model
def vgg11_lrn(pretrained: bool = False, **kwargs: Any) -> Network:
    """VGG's configuration A-LRN."""
    layers = (64, None, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0)
    return _build(VGG, "vgg11_lrn", pretrained, 5, layers=layers, **kwargs)


@register_model
def vgg16_c(pretrained: bool = False, **kwargs: Any) -> Network:
    """VGG's configuration C."""
    layers = (64, 64, 0, 128, 128, 0, 256, 256, -256, 0, 512, 512, -512, 0, 512, 512, -512, 0)
    return _build(VGG, "vgg16_c", pretrained, 5, layers=layers, **kwargs)


@register_model
def googlenet(pretrained: bool = False, **kwargs: Any) -> Network:
    """GoogLeNet with its auxiliary classifiers; ``norm=True`` for batch normalisation."""
    return _build(GoogLeNet, "googlenet", pretrained, 5, **kwargs)


@register_model
def dlib_face_resnet(pretrained: bool = False, **kwargs: Any) -> Network:
    """dlib's face network; its weights come with the package face_recognition_models."""
    return _build(DlibFaceResNet, "dlib_face_resnet", pretrained, 5, **kwargs)


@register_model
def inception_resnet_v1(pretrained: bool = False, **kwargs: Any) -> Network:
    """FaceNet's Inception-ResNet v1, trained on VGGFace2 or CASIA-WebFace."""
    return _build(
        InceptionResnetV1, "inception_resnet_v1", pretrained, 5, pretrained_filter_fn=facenet_weights, **kwargs
    )
