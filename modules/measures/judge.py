"""Feature extractor for the metrics of adversarial training, the same in all processes and after a resume."""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modules.measures.extractors import OWN, Extractor, Seen, named_extractor, own_extractor, state_of
from modules.training_data import training_data

if TYPE_CHECKING:
    from modules.adversarial.base import AdversarialModule

IMAGES = 10_000  # maximum number of images that train the extractor and are compared with generated ones
VALUES = 200_000_000  # maximum number of values in them


class Judge:
    """Creates a feature extractor when it is first needed. If it has to be trained, process zero does so and broadcasts
    it.

    Args:
        module: the module whose images are evaluated; its trainer has the training set.
        questions: returns the targets of a batch of training images for each classification head of the extractor,
            int64 N×Q or None if there are none, and the number of classes of each head.
        address: address of a `named_extractor`, or None to train one on the training set.
        name: network to train, see `own_extractor`.
        steps: training steps of the extractor.
        shift: maximum random shift of the training images, in pixels.
    """

    def __init__(
        self,
        module: "AdversarialModule",
        questions: Callable[[dict[str, Tensor]], tuple[Tensor | None, Sequence[int]]],
        address: str | None = None,
        name: str = OWN,
        steps: int = 400,
        shift: int = 0,
    ) -> None:
        self.module, self.questions, self.address = module, questions, address
        self.name, self.steps, self.shift = name, steps, shift
        self._extractor: Extractor | None = None
        self._state: dict[str, Any] | None = None
        self._training: dict[str, Tensor] = {}
        self._seen: dict[str, tuple[str, Seen]] = {}

    @property
    def extractor(self) -> Extractor:
        """The extractor; its name and digest are logged as a tag of the run."""
        if self._extractor is None:
            self._extractor = self._made()
            self.module.publisher.tags(
                self.module.trainer, {"extractor": f"{self._extractor.name} {self._extractor.digest}"}
            )
        return self._extractor

    def _made(self) -> Extractor:
        module, trainer = self.module, self.module.trainer
        if self.address is not None:
            return named_extractor(self.address, module.in_chans, module.image_size)
        if self._state is None:
            if trainer.is_global_zero:
                truth, sizes = self.questions(self.training)
                truth = truth if truth is None else truth.to(module.device)
                trained = self._own(self.training["image"].to(module.device), truth, sizes, None)
                self._state = {"sizes": list(sizes), "weights": state_of(trained)}
            if trainer.world_size > 1:
                self._state = trainer.strategy.broadcast(self._state)
        assert self._state is not None
        sizes, weights = self._state["sizes"], self._state["weights"]
        blank = torch.zeros(1, module.in_chans, *module.size, device=module.device)
        return self._own(blank, blank[:, 0, 0, 0].long() if sizes else None, sizes, weights)

    def _own(
        self, image: Tensor, truth: Tensor | None, sizes: Sequence[int], weights: dict[str, Tensor] | None
    ) -> Extractor:
        return own_extractor(image, truth, sizes, weights, self.name, self.steps, self.shift)

    @property
    def training(self) -> dict[str, Tensor]:
        """Training images, evenly spread and without augmentation, as a batch with all its keys.

        Raises:
            BackboneError: the trainer has no data module.
        """
        if not self._training:
            data = training_data(self.module.trainer)
            count = VALUES // (self.module.in_chans * math.prod(self.module.size))
            self._training = data.samples("train", min(IMAGES, count))
        return self._training

    def seen(self, name: str, image: Tensor) -> Seen:
        """Extracts features of images that rarely change, uint8 N×C×S×S; cached by name and content."""
        digest = hashlib.blake2b(image.cpu().numpy().tobytes(), digest_size=16).hexdigest()
        if name not in self._seen or self._seen[name][0] != digest:
            self._seen[name] = (digest, self.extractor(image))
        return self._seen[name][1]

    def state_dict(self) -> dict[str, Any] | None:
        """Returns the extractor's weights for a checkpoint, so that a resumed training is evaluated by the same
        extractor."""
        return self._state

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Restores the extractor of `state_dict`."""
        known = (
            state if state is not None and state.keys() == {"sizes", "weights"} else None
        )  # otherwise of an earlier version
        self._state, self._extractor, self._seen = known, None, {}
