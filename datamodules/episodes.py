"""Episodes of an environment, and the replay memory."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Observation = NDArray[Any]  # H×W×C, uint8 of pictures or float32 of numbers


class Episode:
    """An episode, determined by its seed and its actions. It has its own environment, so that repeating the actions
    restores its state.

    Args:
        environment: a new environment of Gymnasium.
        seed: seed of the environment.
        stack: number of last observations that are stacked as channels.
        actions: actions that are performed at once.
    """

    def __init__(self, environment: Any, seed: int, stack: int = 1, actions: Sequence[int] = ()) -> None:
        self.environment, self.seed = environment, seed
        self.actions: list[int] = []
        self.rewards: list[float] = []
        self.values: list[float] = []  # value of the best action at each step, if computed
        self.terminated = self.truncated = False
        self._seen = [as_image(environment.reset(seed=seed)[0])] * stack
        for action in actions:
            self.step(action)

    @property
    def over(self) -> bool:
        """Whether it has ended, by the rules (``terminated``) or by a limit (``truncated``)."""
        return self.terminated or self.truncated

    @property
    def observation(self) -> Observation:
        """The current observation, H×W×C."""
        return self._seen[0] if len(self._seen) == 1 else np.concatenate(self._seen, -1)

    def step(self, action: int) -> float:
        """Performs an action and returns its reward."""
        start = int(self.environment.action_space.start)
        seen, reward, terminated, truncated, _ = self.environment.step(start + action)
        self.terminated, self.truncated = bool(terminated), bool(truncated)
        self._seen = [*self._seen[1:], as_image(seen)]
        self.actions.append(action)
        self.rewards.append(float(reward))
        return float(reward)

    def frame(self) -> NDArray[np.uint8]:
        """Rendered frame, uint8 H×W×3, if the environment was made with rendering."""
        drawn = np.asarray(self.environment.render())
        return drawn if drawn.dtype == np.uint8 else (drawn * 255).round().astype(np.uint8)


def as_image(observation: Any) -> Observation:
    """Converts an observation to H×W×C: numbers to float32 1×1×C, pictures to uint8 with true as 255.

    >>> as_image(np.ones(4)).shape, as_image(np.ones((5, 5), bool)).max().item()
    ((1, 1, 4), 255)
    """
    seen = np.asarray(observation)
    seen = seen.reshape({1: (1, 1, -1), 2: (*seen.shape, 1)}.get(seen.ndim, seen.shape))
    if seen.dtype == bool:
        return seen * np.uint8(255)
    return seen if seen.dtype == np.uint8 else seen.astype(np.float32)


class ReplayMemory:
    """Replay memory of the latest transitions, sampled uniformly (Lin 1992, doi:10.1007/BF00992699; Mnih et al. 2015).
    Each observation is stored once: the next observation of a transition is that of the next entry.

    Args:
        size: number of observations; each new one replaces the oldest.
    """

    def __init__(self, size: int) -> None:
        self.size, self.filled, self.head = size, 0, -1  # index of the last observation
        self.images: Observation = np.empty(0)
        self.actions, self.rewards = np.zeros(size, np.int64), np.zeros(size, np.float32)
        self.terminated = np.zeros(size, bool)
        self.whole = np.zeros(size, bool)  # whether the action and the next observation are known

    def see(self, observation: Observation) -> None:
        """Adds an observation, H×W×C: the first of an episode, or the result of the last action."""
        if not len(self.images):
            self.images = np.zeros((self.size, *observation.shape), observation.dtype)
        self.head = (self.head + 1) % self.size
        self.filled = max(self.filled, self.head + 1)
        self.images[self.head], self.whole[self.head] = observation, False

    def add(self, action: int, reward: float, terminated: bool, following: Observation) -> None:
        """Adds the action taken on the last observation, with its reward and whether the episode ended."""
        at = self.head
        self.actions[at], self.rewards[at], self.terminated[at] = action, reward, terminated
        self.see(following)
        self.whole[at] = True

    def sample(self, count: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """Samples transitions uniformly.

        Returns:
            ``image`` and ``next_image`` B×C×H×W, ``action`` int64 B, ``reward`` float32 B, ``terminated`` bool B.
        """
        at = generator.integers(self.filled, size=count)
        while not (good := self.whole[at]).all():
            at[~good] = generator.integers(self.filled, size=int((~good).sum()))
        return {
            "image": torch.from_numpy(self.images[at]).movedim(-1, -3),
            "next_image": torch.from_numpy(self.images[(at + 1) % self.size]).movedim(-1, -3),
            "action": torch.from_numpy(self.actions[at]),
            "reward": torch.from_numpy(self.rewards[at]),
            "terminated": torch.from_numpy(self.terminated[at]),
        }

    def state_dict(self) -> dict[str, Any]:
        """Returns the content as tensors and numbers."""
        arrays = {key: torch.from_numpy(value[: self.filled]) for key, value in vars(self).items() if key in ARRAYS}
        return arrays | {"filled": self.filled, "head": self.head}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the content from `state_dict`."""
        self.filled, self.head = state["filled"], state["head"]
        images = state["images"].numpy()
        self.images = np.zeros((self.size, *images.shape[1:]), images.dtype)
        for key in ARRAYS:
            getattr(self, key)[: self.filled] = state[key].numpy()


ARRAYS = ("images", "actions", "rewards", "terminated", "whole")
