"""Parts of a model are saved as data, and made again: Fovea's own, a user's, and those of models saved by earlier versions."""

import base64
import importlib
import re
import sys
from pathlib import Path

import cv2
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from torch import nn

from datamodules.options import Preprocessing
from modules import (
    AutoencodingModule,
    BackboneError,
    DetectionModule,
    GANModule,
    InstanceSegmentationModule,
    SegmentationModule,
    SuperResolutionModule,
    TranslationModule,
    VisionModule,
)
from modules.autoencoding import GaussianNoise, Plain
from modules.networks.backbones import create_backbone
from modules.networks.parts import build, describe, upgrade
from modules.spec import Backbone, DataSpec
from modules.super_resolution import SRResNet
from pipelines.classification import classification
from pipelines.engine.command import UsageError
from pipelines.engine.recipes import import_code
from pipelines.serving import registry
from pipelines.serving import store as storage

OWN = '''
import torch
from torch import nn
from modules import ClassificationModule
from modules.autoencoding import Noise
from modules.detection import FCOS
from modules.segmentation import UNet


class Detector(FCOS):
    """What only I need."""


class Decoder(UNet):
    """What only I need."""


class Salt(Noise):
    """What only I need."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, image, draws):
        return image


class Task(ClassificationModule):
    """What only I need."""


class Swish(nn.Module):
    """What only I need."""

    def __init__(self, beta: float = 1.0) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, x):
        return x * torch.sigmoid(self.beta * x)


class Forgetful(Salt):
    """Forgets what it was made with."""

    def __init__(self, much: float) -> None:
        super().__init__(much / 2)
'''


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch):
    """A module of the user's, in a folder that Python looks into."""
    Path("mine").mkdir()
    Path("mine", "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend("mine")
    yield importlib.import_module("own_parts")
    sys.modules.pop("own_parts", None)


def models(own) -> dict[str, VisionModule]:
    return {
        "detector": DetectionModule(DataSpec(num_classes=2, image_size=64), Backbone("test_resnet"), detector=lambda *given: own.Detector(*given, strides=[8, 16], width=32)),
        "decoder": SegmentationModule(DataSpec(num_classes=2, image_size=64), Backbone("test_resnet"), decoder=lambda *given: own.Decoder(*given, widths=[16, 16, 8, 8, 8])),
        "part": AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=12), bottleneck=Plain(4, activation=own.Swish(1.5)), noise=own.Salt(0.25)),
        "task": own.Task(DataSpec(1, 12, 3)),
    }  # fmt: skip


def test_parts_and_tasks_of_the_users_own_are_loaded_again(own) -> None:
    for name, module in models(own).items():
        storage.save_model(Path(name), module, Preprocessing(12, 1), "mine")
        twin, _ = storage.load_model(Path(name))
        assert type(twin) is type(module)
        assert twin.architecture == module.architecture
        batch = {
            "image": torch.randint(256, (1, module.in_chans, module.image_size, module.image_size), dtype=torch.uint8)
        }
        with torch.no_grad():
            assert twin.predict(batch) == module.eval().predict(batch)
    loaded, _ = storage.load_model(Path("part"))
    assert (loaded.noise.share, loaded.bottleneck.activation.beta) == (0.25, 1.5)


def test_a_class_that_is_not_there_is_named_with_the_way_out(own, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, module in models(own).items():
        storage.save_model(Path(name), module, Preprocessing(12, 1), "mine")
    monkeypatch.delitem(sys.modules, "own_parts")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != "mine"])
    for name in ("detector", "decoder", "part", "task"):
        with pytest.raises(ValueError, match=r"There is no own_parts\.\w+ here.*PYTHONPATH"):
            storage.load_model(Path(name))


def test_a_part_that_forgets_its_arguments_is_named_before_the_training(own) -> None:
    module = AutoencodingModule(DataSpec(label_names=None, in_chans=1, image_size=12), noise=own.Forgetful(0.5))
    with pytest.raises(
        BackboneError, match=r"own_parts\.Forgetful.*let its __init__ keep the argument 'much' as self\.much"
    ):
        module.setup("fit")


@pytest.mark.parametrize("path", ["subprocess.Popen", "builtins.eval", "os.system", "torch.nn.Nothing"])
def test_nothing_but_a_part_is_made(path: str) -> None:
    with pytest.raises(ValueError, match=r"is not a Part|There is no|is not a Module"):
        build({"class_path": path, "init_args": {}})


SAVED_EARLIER = {
    "DetectionModule": {
        "num_classes": 2, "label_names": ["a", "b"], "in_chans": 3, "image_size": 64, "backbone": "test_resnet",
        "backbone_options": {"small_stem": False}, "detector": "YOLO",
        "detector_options": {"strides": [8, 16], "width": 16, "depth": 1},
    },
    "InstanceSegmentationModule": {
        "num_classes": 2, "label_names": ["a", "b"], "in_chans": 3, "image_size": 64, "backbone": "test_resnet",
        "backbone_options": {"small_stem": False}, "detector": "MaskRCNN",
        "detector_options": {"strides": [4, 8], "width": 8, "hidden": 8, "mask_width": 8},
    },
    "SegmentationModule": {
        "num_classes": 2, "label_names": ["a", "b"], "in_chans": 3, "image_size": 64, "backbone": "test_resnet",
        "backbone_options": {"small_stem": False}, "decoder": "UNet", "decoder_options": {"widths": None, "norm": "batchnorm"},
    },
    "AutoencodingModule": {
        "in_chans": 1, "image_size": 12, "backbone": "convnet", "backbone_options": {"small_stem": False},
        "bottleneck": {"class": "Plain", "size": 4, "spatial": False, "activation": {"class": "LeakyReLU", "negative_slope": 0.3,
                                                                                  "inplace": False}},
        "decoder": {"class": "Dense", "hidden": [9]}, "loss": {"class": "MSE"}, "noise": None, "penalty": None,
    },
    "GANModule": {
        "label_names": None, "in_chans": 1, "image_size": 12, "backbone": "dcgan",
        "backbone_options": {"width": 4, "small_stem": False},
        "generator": {"class": "UpsampledConvolutions", "width": 4, "norm": "none"}, "objective": {"class": "Hinge"},
        "discriminator_decoder": None, "encoder": None, "latent_size": 8, "conditional": False, "spectral_norm": False,
        "growth": 0,
    },
    "SuperResolutionModule": {
        "in_chans": 1, "image_size": 16, "backbone": "dcgan", "backbone_options": {"width": 4, "small_stem": False},
        "generator": {"class": "SRResNet", "width": 4, "blocks": 1, "norm": "none", "factor": 4, "bicubic": True},
    },
    "TranslationModule": {
        "label_names": ["a", "b"], "attributes": {"domain": ["a", "b"]}, "in_chans": 3, "image_size": 12,
        "backbone": "patchgan", "backbone_options": {"width": 4, "small_stem": False},
        "translator": {"class": "ResidualTranslator", "width": 4, "blocks": 1}, "objective": {"class": "LeastSquares"},
        "shared": False,
    },
}  # fmt: skip
KINDS = (
    AutoencodingModule,
    DetectionModule,
    GANModule,
    InstanceSegmentationModule,
    SegmentationModule,
    SuperResolutionModule,
    TranslationModule,
)


@pytest.mark.parametrize("kind", KINDS)
def test_models_and_checkpoints_of_earlier_versions_are_read(kind: type[VisionModule], tmp_path: Path) -> None:
    saved = SAVED_EARLIER[kind.__name__]
    module = kind.from_architecture(upgrade(saved))
    for key in ("detector", "decoder"):
        if f"{key}_options" in saved:  # those that are not given were written down too
            saved = saved | {f"{key}_options": getattr(module, key).options}
    storage.save_model(tmp_path, module, Preprocessing(module.image_size, 1), "task")
    file = tmp_path / "architecture.yaml"
    description = yaml.safe_load(file.read_text())
    assert description["class_path"] == f"modules.{kind.__name__}"
    del description["class_path"]
    file.write_text(yaml.safe_dump(description | {"class": kind.__name__, "module": saved}))
    twin, _ = storage.load_model(tmp_path)
    assert twin.architecture == module.architecture
    state = {"architecture": saved, "state_dict": module.state_dict()}
    module.on_load_checkpoint(state)  # the same network
    key = next(key for key, value in saved.items() if isinstance(value, dict | str) and key in ("detector", "decoder", "objective", "generator", "translator"))  # fmt: skip
    with pytest.raises(
        BackboneError, match=f"another network: .*{key}.* is .*Give --model.{key} what it was trained with"
    ):
        module.on_load_checkpoint(state | {"architecture": saved | {key: {"class": "Hinge"}, f"{key}_options": {}}})


def test_a_description_names_the_shortest_path_and_nests() -> None:
    assert describe(GaussianNoise(0.1)) == {
        "class_path": "modules.autoencoding.GaussianNoise",
        "init_args": {"sigma": 0.1},
    }
    nested = describe(Plain(3, activation=nn.ReLU()))
    assert nested["init_args"]["activation"] == {"class_path": "torch.nn.ReLU", "init_args": {"inplace": False}}
    assert describe(build(describe(SRResNet(4, 1)))) == describe(SRResNet(4, 1))
    moved = describe(GaussianNoise(0.1)) | {"class_path": "modules.somewhere.GaussianNoise"}
    assert build(moved).sigma == 0.1


SHORT = ["fit", "--data", "Digits8x8", "--data.image_size", "12", "--data.train_per_class", "20", "--data.num_workers", "0",
         "--trainer.enable_progress_bar", "false", "--max_epochs", "1"]  # fmt: skip
OWN_NETWORK = """
import timm
from torch import nn

class Tiny(nn.Module):
    def __init__(self, in_chans=3, num_classes=0, **_):
        super().__init__()
        self.num_features = self.head_hidden_size = 4
        self.conv, self.head = nn.Conv2d(in_chans, 4, 3, 2, 1), nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def get_classifier(self):
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        self.head = nn.Linear(4, num_classes) if num_classes else nn.Identity()

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))

@timm.models.register_model
def tiny_own(pretrained=False, in_chans=3, num_classes=10, **options):  # not by timm's own builder
    return Tiny(in_chans=in_chans, num_classes=num_classes)
"""


def test_a_network_of_ones_own_trains_is_evaluated_and_tells_what_it_needs_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("code").mkdir()
    Path("code", "net_of_mine.py").write_text(OWN_NETWORK)
    command = [*SHORT, "--import", "code/net_of_mine.py", "--backbone", "tiny_own", "--output", "out"]
    classification([*command, "--register", "own"])
    classification([*command, "--register", "carried", "--register_code", "true"])
    for given, said in (
        (["--output", "other"], "none is registered"),
        (["--import", "code", "--register", "x"], "with their suffix"),
    ):
        with pytest.raises(SystemExit):
            classification(
                [*SHORT, "--import", "code/net_of_mine.py", "--backbone", "tiny_own", *given, "--register_code", "true"]
            )
        assert said in capsys.readouterr().err
    measured = classification(["test", "--output", "out"]).rows["test/accuracy"]  # config.yaml says what to import
    Path("moved.yaml").write_text("import: gone.py")
    import_code(["--config", "moved.yaml", "--import", "code/net_of_mine.py"])  # the last counts
    Path("time.py").touch()
    for wrong, said in (("time.py", "another module time"), ("[a, b", "valid YAML")):
        with pytest.raises(UsageError, match=said):
            import_code(["--import", wrong])
    with monkeypatch.context() as elsewhere:
        elsewhere.chdir("code")
        assert classification(["test", "--output", "../out"]).rows["test/accuracy"] == measured
    learned = registry.load("models:/own/1").module.backbone
    assert learned.recipe["backbone"] == "net_of_mine:tiny_own"
    taken = create_backbone("models:/own/1", in_chans=learned.conv.in_channels)
    assert torch.equal(taken.conv.weight, learned.conv.weight)
    again = classification([*SHORT, "--backbone", "models:/own/1", "--output", "again"])  # of which there is the code
    assert again.rows["test/accuracy"]
    assert measured
    monkeypatch.delitem(sys.modules, "net_of_mine")
    sys.path.remove(str(Path("code").absolute()))
    with pytest.raises(ValueError, match=r"tiny_own needs the code of net_of_mine, which is not here.*PYTHONPATH"):
        registry.load("models:/own/1")
    with pytest.raises(SystemExit):
        classification([*SHORT, "--backbone", "models:/own/1"])
    assert "tiny_own needs the code of net_of_mine" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"tiny_own needs the code of net_of_mine.*The model carries net_of_mine\.py"):
        registry.load("models:/carried/1")
    assert "net_of_mine" not in sys.modules, "what a model carries was run"
    registry.download("models:/carried/1", "copy")
    assert Path("copy/code/net_of_mine.py").read_text() == OWN_NETWORK
    monkeypatch.syspath_prepend("copy/code")
    assert registry.load("models:/carried/1").module.backbone.recipe["backbone"] == "net_of_mine:tiny_own"
    monkeypatch.delitem(sys.modules, "net_of_mine")
    sys.path.remove("copy/code")
    served = mlflow.pyfunc.load_model("models:/carried/1")  # which runs what a model carries
    picture = np.zeros((12, 12), np.uint8)
    assert served.predict(pd.DataFrame({"image": [base64.b64encode(cv2.imencode(".png", picture)[1]).decode()]}))[
        "label"
    ][0]


@pytest.mark.parametrize(
    ("name", "code", "told"),
    [
        ("gone.py", None, "--import gone.py: there is no such file"),
        ("my-code.py", "", "my-code is not a valid name"),
        ("json.py", "", "Python knows another module json"),
        ("torn_code.py", "x = 1\ny = nothing", "NameError: name 'nothing' is not defined .*torn_code.py, line 2"),
        ("half_code.py", "def (", "SyntaxError"),
        ("no_such_module", None, "ModuleNotFoundError: No module named 'no_such_module'"),
    ],
)
def test_code_that_cannot_be_imported_is_told(
    name: str, code: str | None, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    if code is not None:
        Path(name).write_text(code)
    with pytest.raises(SystemExit) as end:
        classification(["fit", "--import", name])
    assert end.value.code == 2
    assert re.search(told, " ".join(capsys.readouterr().err.split()))
