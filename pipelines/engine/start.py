"""Starting a training from a whole trained network, with its architecture and weights."""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import BackboneError, VisionModule
from modules.checkpoints import read_checkpoint
from modules.networks.parts import upgrade
from modules.networks.weights import read_weights
from pipelines.engine.recipes import contents, last_of
from pipelines.engine.settings import upgraded

if TYPE_CHECKING:
    from modules.published import Published


@dataclass(frozen=True)
class Start:
    """A network to start from.

    Args:
        address: its version in the registry, its folder or its file.
        place: the folder that `save_model` wrote, or a checkpoint.
        kind: what it is.
        architecture: see `VisionModule.architecture`.
        published: the network of another library; None where ``place`` has one of ours.
    """

    address: str
    place: Path
    kind: type[VisionModule]
    architecture: dict[str, Any]
    published: "Published | None" = None

    def load(self) -> VisionModule:
        """Loads the network with its weights.

        Raises:
            BackboneError: they are not what they were.
        """
        from pipelines.serving.store import load_model

        if self.published is not None:
            module = self.kind.from_architecture(self.architecture)
            module.load_state_dict(self.published.weights, strict=False)  # the threshold is not among them
            module.licence = self.published.licence
            return module
        if self.place.is_file():
            return self.kind.load_from_checkpoint(self.place)
        try:
            return load_model(self.place)[0]
        except ValueError as error:
            raise BackboneError(str(error)) from error


def with_start(args: Sequence[str], kind: type[VisionModule]) -> tuple[list[str], Start | None]:
    """Prepends the architecture of the network given with ``--start`` to a training's arguments.

    Returns:
        The arguments, and the network; None where there is none, or where a training goes on, which has its own weights.

    Raises:
        BackboneError: it is no network of this kind.
    """
    verb, *rest = args
    if verb != "fit":
        return [*args], None
    settings: dict[str, Any] = {}
    for own in contents(rest).values():
        settings |= own
    names = ("start", "output", "ckpt_path")
    given = last_of(rest, *(f"--{name}" for name in names))
    address, output, checkpoint = (settings.get(name) if given[name] is None else given[name] for name in names)
    if address in (None, "", "null"):
        return [*args], None
    last = Path(output, "last.ckpt") if output else None
    goes_on = checkpoint if checkpoint not in (None, "", "null") else last if last and last.exists() else None
    start = None
    if goes_on:
        architecture = upgrade(read_checkpoint(goes_on)["architecture"])
    else:
        start = _read(str(address), kind)
        architecture = start.architecture
    taken = {"backbone", "backbone_options", *inspect.signature(kind).parameters}
    taken.discard("threshold")  # which validation finds
    own = upgraded({"model": {key: value for key, value in architecture.items() if key in taken}})
    # No published weights are to be had: all are taken over.
    return [verb, "--config", json.dumps(own), *rest, "--model.backbone.pretrained=false"], start


def _read(address: str, kind: type[VisionModule]) -> Start:
    """Reads the network that the user names.

    Args:
        address: a registered model; a folder with ``architecture.yaml`` and ``model.safetensors``, or one of these; a
            checkpoint, or the folder of a training, whose best one is taken; one of `modules.published.torchvision.MODELS`, or a
            file of such; an RT-DETR of the library transformers, by its folder or its name on the hub.
        kind: what it has to be.

    Raises:
        BackboneError: it is none.
    """
    from mlflow.exceptions import MlflowException

    from modules.published import torchvision, transformers
    from pipelines.serving import registry
    from pipelines.serving.store import read_description

    try:
        if address.startswith("models:/"):
            address = registry.pinned(address)
            place = registry.model_folder(address)
        else:
            place = Path(address)
            if (place / "best.ckpt").is_file():
                place = place / "best.ckpt"
            elif place.suffix == ".safetensors" or place.name == "architecture.yaml":
                place = place.parent
        published = _published(address, place)
        if published is not None:
            name, architecture = published.kind, published.architecture
        elif place.is_file():
            saved = read_checkpoint(place)
            name, architecture = saved.get("module", kind.__name__), upgrade(saved["architecture"])
        elif (place / "architecture.yaml").is_file():
            saved = read_description(place)
            name, architecture = saved["class_path"].rpartition(".")[2], saved["module"]
        else:
            hint = f" Registered is models:/{address}." if registry.versions_of(address) else ""
            raise BackboneError(
                f"--start {address} is not a trained network: give a registered model (models:/NAME@ALIAS), the "
                "folder that `registry load` wrote, with architecture.yaml and model.safetensors, a best.ckpt, a detector or DeepLabV3 of "
                f"torchvision's ({torchvision.PREFIX}NAME), or an RT-DETR of the library transformers ({transformers.PREFIX}OWNER/NAME)."
                f"{hint}"
            )
    except BackboneError:
        raise
    except (ValueError, MlflowException) as error:
        raise BackboneError(f"--start {address}: {error}") from error
    if name != kind.__name__:
        raise BackboneError(
            f"--start {address} is a whole {name}, and this task trains a {kind.__name__}: start from its backbone alone, "
            f"with --model.backbone {address}, or choose a model of the same task."
        )
    named = address if address.startswith(("models:/", torchvision.PREFIX, transformers.PREFIX)) else str(place)
    return Start(named, place, kind, architecture, published)


def _published(address: str, place: Path) -> "Published | None":
    """The network of another library that a user names; None where it is none."""
    from modules.published import torchvision, transformers

    if address.startswith(torchvision.PREFIX):
        return torchvision.converted(torchvision.download(address.removeprefix(torchvision.PREFIX)))
    if place.suffix in (".pth", ".pt") and torchvision.is_published(found := read_weights(place, whole=True)):
        return torchvision.converted(found)
    if address.startswith(transformers.PREFIX):
        return transformers.read(address.removeprefix(transformers.PREFIX))
    return transformers.read(str(place)) if transformers.is_published(place) else None
