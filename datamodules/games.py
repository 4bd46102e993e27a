"""Gymnasium environments as data that the network generates itself by acting."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge
from numpy.typing import NDArray
from typing_extensions import override

from datamodules.base import VisionDataModule
from datamodules.digests import digest_of
from datamodules.episodes import Episode, Observation, ReplayMemory
from datamodules.errors import DataError
from datamodules.loading import KeyedDataset, KeyedLoader, Sample
from datamodules.options import NonNegativeInt, PositiveInt, Preprocessing, Probability
from datamodules.splits import SPLITS

Values = Callable[[Observation], NDArray[np.float32]]  # of observations N×H×W×C, the value of each action, N×A
LOOKED_AT = 1000  # observations for the mean and standard deviation
SHOWN = 1000  # length of the training split when it is inspected; training plays as many episodes as it needs
PLUGINS = {"MinAtar": ("minatar.gym", "minatar"), "ALE": ("ale_py", "ale-py")}  # by namespace: module, package


class Space(NamedTuple):
    """Observation shape H×W×C, with height and width 1 for numbers, and the number of actions."""

    height: int
    width: int
    channels: int
    actions: int
    numbers: bool


class EpisodeSource:
    """Initial states of a split's episodes: sample i has the first observation as ``image`` and the seed as
    ``episode``.

    Args:
        data: the environment.
        split: its name.
        seed: of the split.
        count: number of episodes.
    """

    def __init__(self, data: "Gymnasium", split: str, seed: int, count: int) -> None:
        self.data, self.key, self.count = data, (seed, SPLITS.index(split)), count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        seed = self.seed(index)
        return {"image": self.data.begin(seed).observation, "episode": seed}

    def seed(self, index: int) -> int:
        """Seed of an episode."""
        return int(np.random.SeedSequence((*self.key, index)).generate_state(1)[0])

    @property
    def digest(self) -> str:
        """Digest of everything that determines the episodes, except the actions."""
        data = self.data
        setting = (data.environment, data.options, data.frame_stack, data.max_episode_steps)
        return digest_of(repr((*setting, self.key, self.count)).encode())


class PlayingLoader(KeyedLoader):
    """Acts in the environment and yields batches from the replay memory. Everything is a function of the seed and the
    network.

    Every process of a training plays the same, and takes its share of each batch.

    Args:
        data: the environment.
        rank, world_size: this process among all.
    """

    def __init__(self, data: "Gymnasium", rank: int = 0, world_size: int = 1) -> None:
        dataset: KeyedDataset = data.dataset("train", True)
        super().__init__(dataset, data.batch_size, True, data.seed, rank, world_size)
        self.data, self.memory = data, ReplayMemory(data.memory_size)
        self.steps = self.episodes = 0  # numbers of actions and of episodes so far
        self.episode: Episode | None = None  # the current episode
        self.returns: list[float] = []  # returns of episodes that ended since the last batch

    def __len__(self) -> int:
        return self.data.epoch_batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self.batches_done = self._first
        for number in range(self._first, len(self)):
            while self.steps < self.data.replay_start:
                self._act()
            for _ in range(self.data.update_every):
                self._act()
            count = self.batch_size * self.world_size
            drawn = self.memory.sample(count, np.random.default_rng((self.seed, self.epoch, number)))
            self.batches_done = number + 1
            batch = {key: value[self.rank :: self.world_size] for key, value in drawn.items()}
            batch["returns"], self.returns = torch.tensor(self.returns), []
            yield batch
        self._first = 0

    def _act(self) -> None:
        """Performs one action: the greedy one, or with probability ε a random one."""
        generator = np.random.default_rng((self.seed, self.steps))
        if self.episode is None:
            self.episode = self.data.begin(self.data.sources["train"].seed(self.episodes))
            self.episodes += 1
            self.memory.see(self.episode.observation)
        if generator.random() < self.data.epsilon(self.steps):
            action = int(generator.integers(self.data.num_classes))
        else:
            action = int(self.data.policy(self.episode.observation[None])[0].argmax())
        reward = self.data.learned(self.episode.step(action))
        self.memory.add(action, reward, self.episode.terminated, self.episode.observation)
        self.steps += 1
        if self.episode.over:
            self.returns.append(sum(self.episode.rewards))
            self.episode = None

    @override
    def state_dict(self) -> dict[str, Any]:
        actions = torch.tensor(self.episode.actions if self.episode else [], dtype=torch.int64)
        more = {"steps": self.steps, "episodes": self.episodes, "under_way": self.episode is not None}
        return super().state_dict() | more | {"actions": actions, "memory": self.memory.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.steps, self.episodes = state["steps"], state["episodes"]
        if self.steps:
            self.memory.load_state_dict(state["memory"])
        if state["under_way"]:
            seed = self.data.sources["train"].seed(self.episodes - 1)
            self.episode = self.data.begin(seed, state["actions"].tolist())


@dataclass(kw_only=True, eq=False, repr=False)
class Gymnasium(VisionDataModule[EpisodeSource]):
    """A Gymnasium environment with discrete actions and numeric or pixel observations.

    Training episodes depend on ``seed``; those of validation and test are fixed. Their batches: ``image`` B×C×H×W, the
    first observations, uint8 images or float32 numbers; ``episode`` int64 B, the seeds. Training batches: see
    `ReplayMemory.sample`; ``returns`` of the episodes that ended since the last batch, float32.

    Args:
        environment: its name in Gymnasium, such as ``CartPole-v1``, ``MinAtar/Breakout-v1`` (package minatar) or
            ``ALE/Pong-v5`` (package ale-py; as 84×84 grey levels of every fourth frame, as published).
        options: further arguments of the environment.
        max_episode_steps: maximum length of an episode, if the environment does not set a lower one.
        frame_stack: number of last observations that are stacked as channels; the agent history length.
        clip_rewards: clip rewards to [-1, 1] for learning; returns are not clipped.
        batch_size: transitions per batch and process; the minibatch size.
        epoch_batches: training batches between two validations.
        update_every: actions per batch; the update frequency.
        memory_size: number of stored observations; the replay memory size.
        replay_start: random actions before the first batch; the replay start size.
        epsilon_start: initial probability of a random action; the initial exploration.
        epsilon_end: final probability of a random action; the final exploration.
        epsilon_steps: actions over which it decreases linearly; the final exploration frame.
        val: number of validation episodes.
        test: number of test episodes.
    """

    environment: str = "CartPole-v1"
    options: dict[str, Any] | None = None
    max_episode_steps: PositiveInt = 10_000
    frame_stack: PositiveInt = 1
    clip_rewards: bool = False
    batch_size: PositiveInt = 32
    num_workers: NonNegativeInt = 0
    epoch_batches: PositiveInt = 1000
    update_every: PositiveInt = 4
    memory_size: Annotated[int, Ge(2)] = 100_000
    replay_start: PositiveInt = 1000
    epsilon_start: Probability = 1.0
    epsilon_end: Probability = 0.05
    epsilon_steps: PositiveInt = 10_000
    val: PositiveInt = 20
    test: PositiveInt = 100

    @override
    def load(self) -> dict[str, EpisodeSource]:
        _ = self.space
        for less, more in (("replay_start", "memory_size"), ("epsilon_end", "epsilon_start")):
            if getattr(self, less) > getattr(self, more):
                raise DataError(
                    f"--data.{less} {getattr(self, less)} must be at most --data.{more}, which is {getattr(self, more)}."
                )
        train = EpisodeSource(self, "train", self.seed, SHOWN)
        return {"train": train, **{name: EpisodeSource(self, name, 0, getattr(self, name)) for name in ("val", "test")}}

    @override
    def transform(self, training: bool) -> None:
        """Returns None: observations are not changed."""

    @property
    @override
    def preprocessing(self) -> Preprocessing:
        return Preprocessing(self.image_size, self.in_chans, "stretch", numbers=self.space.numbers)

    @property
    @override
    def title(self) -> str:
        return self.environment

    @property
    @override
    def extent(self) -> str:
        """The episodes of validation and test; those of the training go on for as long as it does."""
        return f"{self.val:,} episodes val, {self.test:,} test"

    @cached_property
    def space(self) -> Space:
        """Observation and action space.

        Raises:
            DataError: there is no such environment, or its actions or observations are of another kind.
        """
        environment = self.make()
        seen, actions = environment.observation_space, environment.action_space
        if type(actions).__name__ != "Discrete":
            raise DataError(
                f"--data.environment {self.environment}: Q-learning chooses one of a few actions, and this environment takes {actions}. "
                "Choose one whose action space is Discrete, such as CartPole-v1."
            )
        if type(seen).__name__ != "Box" or len(seen.shape) not in (1, 2, 3):
            raise DataError(
                f"--data.environment {self.environment}: a network sees numbers or a picture (Box), and this environment shows {seen}. "
                "Choose another, such as CartPole-v1."
            )
        first = self.begin(0).observation
        height, width, channels = first.shape
        return Space(height, width, channels, int(actions.n), first.dtype != np.uint8)

    @property
    @override
    def in_chans(self) -> int:
        return self.space.channels

    @property
    def image_size(self) -> int | str:
        """Size of an observation; see `augmentations.sides`."""
        height, width = self.space[:2]
        return height if height == width else f"{height}x{width}"

    @property
    def num_classes(self) -> int:
        """Number of actions."""
        return self.space.actions

    @property
    def observation_mean(self) -> list[float] | None:
        """Mean of each number of an observation; None for pictures."""
        return self._statistics[0]

    @property
    def observation_std(self) -> list[float] | None:
        """Standard deviation of each."""
        return self._statistics[1]

    @cached_property
    def _statistics(self) -> tuple[list[float] | None, list[float] | None]:
        """Statistics of observations under random actions with a fixed seed."""
        if not self.space.numbers:
            return None, None
        generator, seen = np.random.default_rng(0), list[Observation]()
        while len(seen) < LOOKED_AT:
            episode = self.begin(len(seen))
            while not episode.over and len(seen) < LOOKED_AT:
                episode.step(int(generator.integers(self.num_classes)))
                seen.append(episode.observation)
        numbers = np.stack(seen).reshape(LOOKED_AT, -1).astype(np.float64)
        return numbers.mean(0).tolist(), np.maximum(numbers.std(0), 1e-3).tolist()

    def make(self, render: bool = False) -> Any:
        """Creates an environment.

        Raises:
            DataError: the name is unknown, or a package is missing.
        """
        try:
            import gymnasium
        except ImportError:
            raise DataError(
                "Environments need the package gymnasium, which is not installed: pip install 'gymnasium[classic-control]'; "
                "those of MinAtar also need minatar, and those of Atari ale-py."
            ) from None
        module, package = PLUGINS.get(self.environment.partition("/")[0], ("", ""))
        options = dict(self.options or {})
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # renders without a screen
        if module == "ale_py":
            options["frameskip"] = 1  # that of the preprocessing replaces it
        try:
            if module and self.environment not in gymnasium.registry:
                getattr(import_module(module), "register_envs", int)()
            limit = gymnasium.spec(self.environment).max_episode_steps or self.max_episode_steps
            made = gymnasium.make(
                self.environment,
                max_episode_steps=min(limit, self.max_episode_steps),
                render_mode="rgb_array" if render else None,
                disable_env_checker=True,
                **options,
            )
            return gymnasium.wrappers.AtariPreprocessing(made) if module == "ale_py" else made
        except ImportError as error:
            missing = f"pip install {package}" if package else "install it"
            raise DataError(f"--data.environment {self.environment} needs a package: {error}; {missing}.") from None
        except (gymnasium.error.Error, TypeError, ValueError, AttributeError) as error:
            said = " ".join(str(error).split()).removesuffix(".")
            raise DataError(
                f"--data.environment {self.environment} cannot be made: {said}. Names are those of Gymnasium, such as CartPole-v1 or "
                "MinAtar/Breakout-v1; --data.options has its arguments."
            ) from None

    def begin(self, seed: int, actions: Sequence[int] = ()) -> Episode:
        """Starts an episode and repeats the given actions."""
        return Episode(self.make(), seed, self.frame_stack, actions)

    def epsilon(self, step: int) -> float:
        """Probability of a random action at a step."""
        if step < self.replay_start:
            return 1.0
        share = min(1.0, (step - self.replay_start) / self.epsilon_steps)
        return self.epsilon_start + share * (self.epsilon_end - self.epsilon_start)

    def learned(self, reward: float) -> float:
        """Returns the reward for learning: clipped if requested."""
        return min(1.0, max(-1.0, reward)) if self.clip_rewards else reward

    @property
    def policy(self) -> Values:
        """Action values of the network in training for some observations."""
        if self.trainer is None:
            raise DataError(
                "The environment is played by the network in training: attach the data module to a trainer with one."
            )
        module: Any = self.trainer.lightning_module
        return module.values

    def play(self, seeds: Sequence[int], values: Values) -> list[Episode]:
        """Plays episodes to their ends in parallel with greedy actions.

        Args:
            seeds: seeds of the episodes.
            values: computes the values of the actions.
        """
        episodes = [self.begin(seed) for seed in seeds]
        while running := [episode for episode in episodes if not episode.over]:
            told = values(np.stack([episode.observation for episode in running]))
            for episode, of_actions in zip(running, told, strict=True):
                episode.values.append(float(of_actions.max()))
                episode.step(int(of_actions.argmax()))
        return episodes

    def film(self, seed: int, actions: Sequence[int], most: int = 200) -> Iterator[NDArray[np.uint8]]:
        """Renders the frames of a played episode, uint8 H×W×3: all, or the first ones."""
        episode = Episode(self.make(render=True), seed, self.frame_stack)
        yield episode.frame()
        for action in actions[: most - 1]:
            episode.step(action)
            yield episode.frame()

    @override
    def train_dataloader(self) -> KeyedLoader:
        trainer = self.trainer
        self._training = PlayingLoader(self, *((trainer.global_rank, trainer.world_size) if trainer else ()))
        self.load_state_dict(self._position)
        return self._training
