"""Reinforcement learning with deep Q-networks."""

from copy import deepcopy
from functools import partial
from typing import Any, ClassVar, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchmetrics import CatMetric
from typing_extensions import override

from modules.answers import Answer, HeadedAnswers
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.optimization import Optimization
from modules.pictures.sheets import enlarged, resized, written
from modules.ranges import PositiveInt, ShareBelowOne
from modules.spec import Backbone, DataSpec
from modules.training_data import Batch, training_data

FILM = 240  # side of video frames, in pixels


class ActionValues(nn.Module):
    """Q(s, a) from a backbone's features, with a hidden ReLU layer.

    Args:
        features: number of features.
        hidden_size: units of the hidden layer.
        actions: number of actions.
        dueling: separate streams for the state value V(s) and the advantages A(s, a): Q = V + A − mean of A over the
            actions (Wang et al. 2016, arXiv:1511.06581, equation 9).
    """

    def __init__(self, features: int, hidden_size: int, actions: int, dueling: bool = False) -> None:
        super().__init__()
        self.advantage = self._stream(features, hidden_size, actions)
        self.state = self._stream(features, hidden_size, 1) if dueling else None

    @staticmethod
    def _stream(features: int, hidden_size: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(features, hidden_size), nn.ReLU(), nn.Linear(hidden_size, outputs))

    def forward(self, features: Tensor) -> Tensor:
        """Computes float B×A from float B×F."""
        advantage = self.advantage(features)
        if self.state is None:
            return cast(Tensor, advantage)
        return cast(Tensor, self.state(features) + advantage - advantage.mean(1, keepdim=True))


class QLearningModule(VisionModule):
    """DQN: a backbone with a head that estimates the value of each action, Q(s, a), trained by Q-learning with a replay
    memory and a target network (Mnih et al. 2015, doi:10.1038/nature14236). The data module acts on its values, see
    `datamodules.games`.

    ``train/loss`` is the loss of the temporal-difference errors, and ``train/return`` the return of the training
    episodes, which include random actions. Validation and test play episodes without random actions, and log the means
    of ``return`` and ``length``; over the episodes also ``return_std``, ``return_min`` and ``return_max``; ``value``,
    the predicted value of the first observation, and ``discounted_return``, the actual one, which is lower if values
    are overestimated; and as ``loss`` the loss of the temporal-difference errors.

    Args:
        data: description of the data.
        backbone: the network that the head is built on; ``mlp`` for numbers, ``dqn`` or any other for images.
        optimization: optimiser, schedule and regularisation.
        gamma: discount factor γ.
        double: Double DQN (van Hasselt et al. 2016, arXiv:1509.06461): the network selects the next action, and the
            target network evaluates it.
        dueling: separate streams for state value and advantages, see `ActionValues`.
        hidden_size: units of the hidden layer before the values.
        loss: loss of the temporal-difference errors; by default the Huber loss, equivalent to the published clipping of
            errors to [-1, 1].
        target_update: steps between updates of the target network.
    """

    any_bands = True
    monitor, mode = "val/return", "max"
    takes = ("num_classes", "in_chans", "image_size", "observation_mean", "observation_std")
    needs = ("episode",)
    training_only: ClassVar[tuple[str, ...]] = ("target.",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("mlp"),
        optimization: Optimization | None = None,
        gamma: ShareBelowOne = 0.99,
        double: bool = False,
        dueling: bool = False,
        hidden_size: PositiveInt = 128,
        target_update: PositiveInt = 500,
        loss: nn.Module | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization)
        self.gamma, self.chooses, self.dueling = gamma, double, dueling  # `double` is a method of torch modules
        self.hidden_size, self.target_update = hidden_size, target_update
        self.loss = loss or nn.HuberLoss()
        self.observation_mean, self.observation_std = data.observation_mean, data.observation_std
        if data.observation_mean and data.observation_std:
            mean, std = torch.tensor([data.observation_mean, data.observation_std])[:, :, None, None]
            self.scale, self.shift = 1 / std, -mean / std
        self.head = ActionValues(self.backbone.head_hidden_size, hidden_size, data.num_classes, dueling)
        self.target = deepcopy(nn.Sequential(self.backbone, self.head)).requires_grad_(False).eval()
        self.answers = HeadedAnswers("action {action}")
        self.returns = PerStage(lambda _: CatMetric())
        # Random layers, and those that use batch statistics
        self._random = [
            layer
            for layer in self.backbone.modules()
            if isinstance(layer, nn.modules.batchnorm._NormBase) or "drop" in type(layer).__name__.lower()
        ]
        self._shown: tuple[int, list[int]] | None = None  # seed and actions of an episode

    @override
    def parts(self) -> dict[str, Any]:
        return {"dueling": self.dueling, "hidden_size": self.hidden_size}

    def normalize(self, image: Tensor) -> Tensor:
        """See `VisionModule`; observations of numbers, which are float, are normalised by their own mean and standard
        deviation."""
        if not image.is_floating_point():
            return super().normalize(image)
        return image * self.scale + self.shift if self.observation_mean else image

    def forward(self, image: Tensor) -> Tensor:
        """Computes the values of the actions, float B×A, from observations B×C×H×W, uint8 images or float numbers."""
        return cast(Tensor, self.head(self.backbone(self.normalize(image))))

    def targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Computes the targets of a batch, float B: r + γ·max Q⁻(s′, a), or for Double DQN r + γ·Q⁻(s′, argmax Q(s′,
        a)); only r at the end of an episode."""
        following = self.target(self.normalize(batch["next_image"]))
        chosen = (self(batch["next_image"]) if self.chooses else following).argmax(1, keepdim=True)
        value = following.gather(1, chosen)[:, 0]
        return batch["reward"] + self.gamma * value * ~batch["terminated"]

    @override
    def losses(self, batch: dict[str, Tensor]) -> Losses:
        if len(batch["returns"]):
            self.means.update("train/return", batch["returns"].mean(), len(batch["returns"]))
        with torch.no_grad():
            targets = self.targets(batch)
        values = self(batch["image"]).gather(1, batch["action"][:, None])[:, 0]
        return Losses({"loss": self.loss(values, targets)}, {"value": values.mean()})

    @override
    def train(self, mode: bool = True) -> Self:
        """See `nn.Module.train`; the target network stays in evaluation mode."""
        super().train(mode)
        self.target.eval()
        return self

    def follow(self) -> None:
        """Copies the network's weights to the target network."""
        self.target.load_state_dict(nn.Sequential(self.backbone, self.head).state_dict())

    @override
    def on_train_start(self) -> None:
        if self.global_step == 0:  # it may be initialised from another network
            self.follow()

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.holds_gradients(batch_idx) and self.global_step % self.target_update == 0:
            self.follow()

    @torch.inference_mode()
    def values(self, observations: NDArray[Any]) -> NDArray[np.float32]:
        """Computes the values of the actions, float32 N×A, for observations N×H×W×C, with random layers in evaluation
        mode."""
        random = [layer for layer in self._random if layer.training]
        for layer in random:
            layer.eval()
        told = self(torch.from_numpy(observations).movedim(-1, -3).to(self.device)).float().cpu().numpy()
        for layer in random:
            layer.train()
        return cast(NDArray[np.float32], told)

    @override
    def measure(self, batch: Batch, stage: Stage) -> Losses:
        data: Any = training_data(self.trainer)
        episodes = data.play(batch["episode"].tolist(), self.values)
        self._shown = self._shown or (episodes[0].seed, episodes[0].actions)
        rows = []
        for episode in episodes:
            values = np.array([*episode.values, 0.0])  # the value of a terminal state is 0
            rewards = np.array([data.learned(reward) for reward in episode.rewards])
            known = len(rewards) - (not episode.terminated)  # steps whose next observation is known
            errors = torch.from_numpy(values[:known] - rewards[:known] - self.gamma * values[1 : known + 1])
            loss = self.loss(errors, torch.zeros_like(errors)) if known else 0.0
            discounted = rewards @ self.gamma ** np.arange(len(rewards))
            rows.append([float(loss), sum(episode.rewards), len(rewards), values[0], discounted])
        table = torch.tensor(rows, dtype=torch.float32, device=self.device)
        self.returns[stage].update(table[:, 1])
        loss, *means = table.mean(0)
        names = ("return", "length", "value", "discounted_return")
        return Losses({"loss": loss}, dict(zip(names, means, strict=True)))

    @override
    def report(self, stage: Stage) -> Report:
        returns = torch.atleast_1d(torch.as_tensor(self.returns[stage].compute()))
        self.returns[stage].reset()
        shown, self._shown = self._shown, None
        figures = {"std": returns.std(correction=0), "min": returns.min(), "max": returns.max()}
        report = Report({f"return_{name}": float(value) for name, value in figures.items()})
        if stage == "test" and shown:
            report.films["episode"] = partial(self._film, *shown)
        return report

    def _film(self, seed: int, actions: list[int]) -> list[NDArray[np.uint8]]:
        data: Any = training_data(self.trainer)
        return [framed(frame) for frame in data.film(seed, actions)]

    @torch.inference_mode()
    @override
    def predict(self, batch: Batch) -> list[Answer]:
        """Returns for each observation the best ``action``, an index, and ``q_values``, the values of all actions."""
        values = self(batch["image"])
        rows = zip(values.argmax(1).tolist(), values.float().tolist(), strict=True)
        return [{"action": action, "q_values": [round(value, 6) for value in row]} for action, row in rows]

    @override
    def draw_samples(self, batch: dict[str, Tensor], columns: int = 8) -> NDArray[np.uint8]:
        images = batch["image"]
        if not images.is_floating_point():
            return super().draw_samples(batch, columns)
        return written("\n".join("  ".join(f"{value:+.3f}" for value in row) for row in images.flatten(1).tolist()))


def framed(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Resizes a rendered frame, uint8 H×W×3, to a longer side of about `FILM` pixels."""
    frame = enlarged(frame, FILM) if max(frame.shape[:2]) < FILM else frame
    scale = FILM / max(frame.shape[:2])
    return resized(frame, *(round(side * scale) for side in frame.shape[:2]))
