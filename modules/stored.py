"""A module as plain data: the description that its network is rebuilt from, and its checkpoints."""

from collections.abc import Mapping
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import lightning as L
from lightning.pytorch.trainer.states import TrainerFn
from typing_extensions import override

from modules.checkpoints import at_size, check_network, read_checkpoint, shapes_of
from modules.networks import BackboneError
from modules.networks.parts import build, is_description, upgrade
from modules.spec import VALUES, Backbone, DataSpec


class StoredModule(L.LightningModule):
    """Base class of `VisionModule`: a subclass is built by ``cls(data, backbone, **arguments)``, and keeps as attributes
    what describes it."""

    takes: ClassVar[tuple[str, ...]] = ("in_chans", "image_size")  # stored fields of `DataSpec`
    late_parts: ClassVar[Mapping[str, type]] = {}  # arguments built after the backbone -> base class of the part
    training_only: ClassVar[tuple[str, ...]] = ()  # prefixes of weights that are not needed after training
    without_training_only: bool = False  # whether these are random, as a registered model does not have them
    backbone: Any
    licence: str | None  # of the weights that the network started from

    def parts(self) -> dict[str, Any]:
        """Returns the task's own arguments that rebuild this network, as plain data; exchangeable parts in the format
        of `describe`."""
        return {}

    @property
    def architecture(self) -> dict[str, Any]:
        """Plain data that rebuilds this network without its training state: the fields in `takes`, the backbone as
        ``backbone`` and ``backbone_options``, and `parts`."""
        data = {name: deepcopy(getattr(self, name)) or None for name in self.takes}
        plain = {"bit_depth": 8, "channel_mean": None, "channel_std": None, "tabular_names": None}
        data |= {name: deepcopy(getattr(self, name)) for name in VALUES if getattr(self, name) != plain[name]}
        return {**data, **self.backbone.recipe, **self.parts()}

    @classmethod
    def from_architecture(cls, architecture: dict[str, Any]) -> Self:
        """Builds the network that `architecture` describes, including descriptions written by earlier versions."""
        rest = upgrade(architecture)
        rest.pop("pretrained", None)  # a training setting
        data = DataSpec(**{key: rest.pop(key) for key in [*rest] if key in DataSpec.__dataclass_fields__})
        backbone = Backbone(rest.pop("backbone"), options=rest.pop("backbone_options", None))
        late: dict[str, Any] = {
            key: partial(build, rest.pop(key), base=base) for key, base in cls.late_parts.items() if key in rest
        }
        parts: dict[str, Any] = {key: build(value) if is_description(value) else value for key, value in rest.items()}
        return cls(data, backbone, **parts, **late)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["architecture"], checkpoint["module"] = self.architecture, type(self).__name__
        checkpoint["licence"] = self.licence

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("architecture", {})
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:  # a training keeps its size
            saved = at_size(saved, shapes_of(checkpoint.get("state_dict", {})), self)
        check_network(saved, self.architecture)
        self.licence = checkpoint.get("licence", self.licence)

    @classmethod
    @override
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = "cpu") -> Self:  # type: ignore[override]
        """Loads the network of a checkpoint with its weights, or with their moving average where weights are averaged.

        Args:
            checkpoint_path: ``best.ckpt`` or ``last.ckpt`` of a training.
            map_location: device of the weights.

        Returns:
            The module in evaluation mode. Training settings are not stored with it: pass a new ``optimization`` to
            train it further.

        Raises:
            BackboneError: the file is not a checkpoint of this class.
        """
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        name = checkpoint.get("module", cls.__name__)
        if name != cls.__name__:
            raise BackboneError(
                f"{checkpoint_path} is the checkpoint of a {name}: load it with {name}.load_from_checkpoint, not with "
                f"{cls.__name__}'s."
            )
        module = cls.from_architecture(checkpoint["architecture"])
        own, saved = module.state_dict(), checkpoint["state_dict"]
        training = {key for key in {*own, *saved} if key.startswith(cls.training_only)}  # e.g. of a miner or a loss
        state = {key: value for key, value in own.items() if key in training}
        module.load_state_dict(
            state | {key: value for key, value in saved.items() if key in own or key not in training}
        )
        module.licence = checkpoint.get("licence")
        return module.to(map_location).eval()
