"""Published face embedding networks: dlib's ResNet and FaceNet's Inception-ResNet v1."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from modules.networks.base import BackboneError, Network

DLIB_FILE = "dlib_face_recognition_resnet_model_v1.dat"


class Affine(nn.Module):
    """Batch normalisation with fixed statistics: a scale and a shift per channel of float B×C×H×W."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, image: Tensor) -> Tensor:
        """Scales and shifts float B×C×H×W."""
        return image * self.weight[:, None, None] + self.bias[:, None, None]


class _Residual(nn.Module):
    """A residual block of two 3×3 convolutions; with ``down``, the shortcut is average pooling, and the smaller tensor
    is padded with zeros."""

    def __init__(self, before: int, channels: int, down: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, channels, 3, 2 if down else 1, 0 if down else 1)
        self.affine1 = Affine(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.affine2 = Affine(channels)
        self.down = down

    def forward(self, image: Tensor) -> Tensor:
        result = self.affine2(self.conv2(self.affine1(self.conv1(image)).relu()))
        if self.down:
            image = F.avg_pool2d(image, 2)
            rows, columns, more = (
                a - b
                for a, b in zip(image.shape[2:] + result.shape[1:2], result.shape[2:] + image.shape[1:2], strict=True)
            )
            result = F.pad(result, (0, columns, 0, rows))
            image = F.pad(image, (0, 0, 0, 0, 0, more))
        return (image + result).relu()


class DlibFaceResNet(Network):
    """dlib's ResNet of 29 convolutions (King 2017, "High quality face recognition with deep metric learning").

    Computes embeddings of 128 numbers, which dlib does not normalise. Images are 150 pixels wide, aligned as by ``align
    --form dlib``.
    """

    form = "dlib"  # alignment of the faces

    def __init__(self, num_classes: int = 0, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        body: dict[str, nn.Module] = {
            "conv1": nn.Sequential(nn.Conv2d(in_chans, 32, 7, 2), Affine(32), nn.ReLU(), nn.MaxPool2d(3, 2))
        }
        before, stages = 32, []
        for n, (channels, plain) in enumerate([(32, 3), (64, 3), (128, 2), (256, 2), (256, 0)], 1):
            blocks = [_Residual(before, channels, True)] if n > 1 else []
            body[f"stage{n}"] = nn.Sequential(*blocks, *(_Residual(channels, channels, False) for _ in range(plain)))
            stages.append((f"stage{n}", channels, 2 ** (n + 1)))
            before = channels
        neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 128, bias=False))
        super().__init__(body, neck, 128, stages, num_classes, drop_rate)


def dlib_weights(file: bytes) -> dict[str, Tensor]:
    """Reads the weights of `DlibFaceResNet` from dlib's own file, `DLIB_FILE`.

    Args:
        file: its content, as written by dlib 19: integers of variable length, layers from the input on.

    Raises:
        BackboneError: it contains another network.
    """

    def number(at: int) -> tuple[int, int]:
        end = at + 1 + (file[at] & 15)
        return int.from_bytes(file[at + 1 : end], "little"), end

    def tensor(at: int) -> tuple[NDArray[np.float32], int]:
        version, at = number(at)
        count = 1
        for _ in range(4):
            dimension, at = number(at)
            count *= dimension
        if version != 2 or at + 4 * count > len(file):
            raise ValueError
        return np.frombuffer(file, "<f4", count, at).copy(), at + 4 * count

    state, at = {}, 0
    try:
        for name, layer in DlibFaceResNet().named_modules():
            if isinstance(layer, nn.Conv2d):  # the kernels, followed by the bias
                values, at = tensor(file.index(b"\x01\x05con_4", at) + 7)
                state[f"{name}.weight"] = torch.from_numpy(values[: -layer.out_channels]).view_as(layer.weight)
                state[f"{name}.bias"] = torch.from_numpy(values[-layer.out_channels :])
            elif isinstance(layer, Affine):
                values, at = tensor(file.index(b"\x01\x07affine_", at) + 9)
                state[f"{name}.weight"], state[f"{name}.bias"] = torch.from_numpy(values).view(2, -1)
            elif isinstance(layer, nn.Linear):  # its name is followed by the numbers of outputs and inputs
                values, at = tensor(number(number(file.index(b"\x01\x04fc_2", at) + 6)[1])[1])
                state[f"{name}.weight"] = torch.from_numpy(values).view(256, 128).T.contiguous()
    except (ValueError, RuntimeError, IndexError):
        raise BackboneError(f"It is not dlib's network of faces, whose file is {DLIB_FILE}.") from None  # fmt: skip
    return state


class _Conv(nn.Sequential):
    """Convolution without bias, batch normalisation, ReLU."""

    def __init__(
        self, before: int, channels: int, kernel: int | tuple[int, int], stride: int = 1, padding: Any = 0
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, channels, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(channels, eps=1e-3)
        self.relu = nn.ReLU()


Chains = list[list[tuple[Any, ...]]]  # channels, kernel, stride and padding of each branch's convolutions


class _Branches(nn.Module):
    """Parallel branches.

    Without a scale, their outputs are concatenated with the pooled input; with one, they are scaled and added to the
    input.
    """

    def __init__(self, before: int, branches: Chains, scale: float | None, relu: bool = True) -> None:
        super().__init__()
        self.count, self.scale, self.relu, total = len(branches), scale, relu, 0
        for n, chain in enumerate(branches):
            layers, channels = [], before
            for given in chain:
                layers.append(_Conv(channels, *given))
                channels = given[0]
            self.add_module(f"branch{n}", layers[0] if len(layers) == 1 else nn.Sequential(*layers))
            total += channels
        if scale is not None:
            self.conv2d = nn.Conv2d(total, before, 1)

    def forward(self, image: Tensor) -> Tensor:
        found = [getattr(self, f"branch{n}")(image) for n in range(self.count)]
        if self.scale is None:
            return torch.cat([*found, F.max_pool2d(image, 3, 2)], 1)
        result = image + self.scale * self.conv2d(torch.cat(found, 1))
        return result.relu() if self.relu else result


class InceptionResnetV1(Network):
    """Inception-ResNet v1 (Szegedy et al. 2017, arXiv:1602.07261) with an embedding of 512 numbers, as in FaceNet.

    Names of parameters are those of facenet-pytorch. Images are 160 pixels wide, cropped as by ``align --form
    facenet``.

    Args:
        drop_rate: dropout before the embedding.
    """

    form = "facenet"  # alignment of the faces

    def __init__(self, num_classes: int = 0, in_chans: int = 3, drop_rate: float = 0.6) -> None:
        block35: Chains = [[(32, 1)], [(32, 1), (32, 3, 1, 1)], [(32, 1), (32, 3, 1, 1), (32, 3, 1, 1)]]
        block17: Chains = [[(128, 1)], [(128, 1), (128, (1, 7), 1, (0, 3)), (128, (7, 1), 1, (3, 0))]]
        block8: Chains = [[(192, 1)], [(192, 1), (192, (1, 3), 1, (0, 1)), (192, (3, 1), 1, (1, 0))]]
        mixed6: Chains = [[(384, 3, 2)], [(192, 1), (192, 3, 1, 1), (256, 3, 2)]]
        mixed7: Chains = [[(256, 1), (384, 3, 2)], [(256, 1), (256, 3, 2)], [(256, 1), (256, 3, 1, 1), (256, 3, 2)]]
        body: dict[str, nn.Module] = {
            "conv2d_1a": _Conv(in_chans, 32, 3, 2),
            "conv2d_2a": _Conv(32, 32, 3),
            "conv2d_2b": _Conv(32, 64, 3, 1, 1),
            "maxpool_3a": nn.MaxPool2d(3, 2),
            "conv2d_3b": _Conv(64, 80, 1),
            "conv2d_4a": _Conv(80, 192, 3),
            "conv2d_4b": _Conv(192, 256, 3, 2),
            "repeat_1": nn.Sequential(*(_Branches(256, block35, 0.17) for _ in range(5))),
            "mixed_6a": _Branches(256, mixed6, None),
            "repeat_2": nn.Sequential(*(_Branches(896, block17, 0.1) for _ in range(10))),
            "mixed_7a": _Branches(896, mixed7, None),
            "repeat_3": nn.Sequential(*(_Branches(1792, block8, 0.2) for _ in range(5))),
            "block8": _Branches(1792, block8, 1.0, relu=False),
        }
        neck = nn.Sequential()
        neck.add_module("pool", nn.AdaptiveAvgPool2d(1))
        neck.add_module("flatten", nn.Flatten())
        neck.add_module("drop", nn.Dropout(drop_rate))
        neck.add_module("last_linear", nn.Linear(1792, 512, bias=False))
        neck.add_module("last_bn", nn.BatchNorm1d(512, eps=1e-3))
        stages = [
            ("conv2d_2b", 64, 2),
            ("conv2d_4a", 192, 4),
            ("repeat_1", 256, 8),
            ("repeat_2", 896, 16),
            ("block8", 1792, 32),
        ]
        super().__init__(body, neck, 512, stages, num_classes)


def facenet_weights(state: dict[str, Tensor], _: nn.Module) -> dict[str, Tensor]:
    """Renames weights of facenet-pytorch for `InceptionResnetV1`; others are returned unchanged.

    The classifier of the training identities is dropped.
    """
    if "last_linear.weight" not in state:
        return state
    return {
        f"neck.{key}" if key.startswith("last_") else key: value
        for key, value in state.items()
        if not key.startswith("logits.")
    }
