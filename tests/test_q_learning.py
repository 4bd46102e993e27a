import sys
from pathlib import Path

import mlflow
import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from mlflow.tracking import MlflowClient
from torch import Tensor, nn

from datamodules import DataError, Gymnasium
from datamodules.episodes import ReplayMemory
from datamodules.games import PlayingLoader
from modules import Backbone, DataSpec, QLearningModule
from modules.q_learning import ActionValues
from pipelines.app import app
from pipelines.engine.command import command
from pipelines.export import export
from pipelines.q_learning import play, q_learning
from pipelines.serving import registry
from pipelines.tracking.logger import run_id_of

SMALL = ["--data.val", "2", "--data.test", "2", "--data.replay_start", "20", "--data.epoch_batches", "3", "--data.max_episode_steps", "30",
         "--trainer.max_epochs", "1", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]  # fmt: skip
BREAKOUT = ["--data.environment", "MinAtar/Breakout-v1", "--model.backbone", "dqn", "--model.backbone.options.convolutions",
            "[[16, 3, 1]]"]  # fmt: skip


class Table(QLearningModule):
    """Values of two states and two actions, in a table; the target network has another."""

    def __init__(self, **options) -> None:
        super().__init__(DataSpec(num_classes=2, in_chans=1, image_size=1), gamma=0.5, **options)
        self.backbone, self.head = nn.Flatten(), Rows([[1.0, 2.0], [5.0, 3.0]])
        self.target = nn.Sequential(nn.Flatten(), Rows([[10.0, 20.0], [30.0, 40.0]]))


class Rows(nn.Module):
    def __init__(self, rows: list[list[float]]) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.tensor(rows))

    def forward(self, state: Tensor) -> Tensor:
        return self.rows[state[:, 0].long()]


def transitions() -> dict[str, Tensor]:
    """From state 0 to 1 and on; from 1 to 0; from 0 to 1, which is the end."""
    return {
        "image": torch.tensor([0.0, 1, 0]).view(3, 1, 1, 1), "next_image": torch.tensor([1.0, 0, 1]).view(3, 1, 1, 1),
        "action": torch.tensor([1, 0, 0]), "reward": torch.tensor([1.0, 0, 7]),
        "terminated": torch.tensor([False, False, True]), "returns": torch.zeros(0),
    }  # fmt: skip


def test_targets_are_those_worked_out_by_hand() -> None:
    # The target network's best: 40 in state 1, 20 in state 0; nothing is to come after an end.
    assert Table().targets(transitions()).tolist() == [1 + 0.5 * 40, 0.5 * 20, 7]
    # Of Double DQN, the network chooses action 0 in state 1 and action 1 in state 0.
    assert Table(double=True).targets(transitions()).tolist() == [1 + 0.5 * 30, 0.5 * 20, 7]
    # Values are 2, 5 and 1, errors 19, 5 and 6, of which Huber's loss takes half of one away.
    assert Table().losses(transitions()).total.item() == pytest.approx((18.5 + 4.5 + 5.5) / 3)


def test_a_duelling_head_adds_a_state_s_value_to_advantages_of_mean_zero() -> None:
    head = ActionValues(3, 8, 4, dueling=True)
    features = torch.rand(5, 3)
    torch.testing.assert_close(head(features).mean(1, keepdim=True), head.state(features))
    order = head.advantage(features).argsort(1)
    assert torch.equal(head(features).argsort(1), order)


def test_the_memory_gives_any_of_the_last_transitions_and_none_across_episodes() -> None:
    memory, seen = ReplayMemory(8), 0
    for length in (3, 4, 2, 3):  # observations count up; that an episode ends with begins no transition
        memory.see(np.full((1, 1, 1), seen, np.float32))
        for step in range(length):
            seen += 1
            memory.add(step, seen, step == length - 1, np.full((1, 1, 1), seen, np.float32))
        seen += 1
    drawn = memory.sample(4000, np.random.default_rng(0))
    image, following = (drawn[key].flatten() for key in ("image", "next_image"))
    assert torch.equal(following, image + 1)
    assert torch.equal(drawn["reward"], following)
    values, counts = image.unique(return_counts=True)
    assert values.tolist() == [9, 10, 12, 13, 14], "of the last eight observations, 8 to 15, 11 and 15 end an episode"
    assert counts.min() > 700
    assert values[drawn["terminated"].new_tensor([True] * 5)].tolist() == values.tolist()
    assert set(image[drawn["terminated"]].tolist()) == {10, 14}

    other = ReplayMemory(8)
    other.load_state_dict(memory.state_dict())
    again = other.sample(4000, np.random.default_rng(0))
    assert all(torch.equal(drawn[key], again[key]) for key in drawn)


def test_random_actions_become_rarer() -> None:
    data = Gymnasium(replay_start=10, epsilon_steps=100, epsilon_start=0.9, epsilon_end=0.1)
    assert [data.epsilon(step) for step in (0, 9, 10, 60, 110, 999)] == pytest.approx([1, 1, 0.9, 0.5, 0.1, 0.1])


@pytest.mark.parametrize("environment", ["CartPole-v1", "MinAtar/Breakout-v1"])
def test_an_environment_goes_on_where_the_checkpoint_was(environment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = property(lambda data: lambda seen: np.stack([[row.sum(), 0] for row in seen.astype(np.float32)]))
    monkeypatch.setattr(Gymnasium, "policy", sums)
    data = Gymnasium(environment=environment, replay_start=30, epoch_batches=40, memory_size=100, batch_size=4)
    whole = PlayingLoader(data)
    batches = list(whole)
    cut = PlayingLoader(data)
    for _, _ in zip(range(13), cut, strict=False):
        pass
    resumed = PlayingLoader(data)
    resumed.load_state_dict(cut.state_dict())
    for one, other in zip(batches[13:], resumed, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert resumed.episodes == whole.episodes > 2


def test_a_game_is_learned_registered_played_and_filmed(capsys: pytest.CaptureFixture[str]) -> None:
    cli = q_learning(["fit", *BREAKOUT, *SMALL, "--model.dueling", "true", "--output", "out", "--register", "player"])
    assert {"test/return", "test/return_std", "test/return_min", "test/discounted_return"} <= cli.rows.keys()
    files = {file.path for file in MlflowClient().list_artifacts(run_id_of("out"), "films")}
    assert files == {"films/test_episode.gif"}
    command(play, ["models:/player/1", "--episodes", "3", "--film", "film.mp4"], "play")
    said = capsys.readouterr().out
    assert "episode 2: return" in said
    assert "±" in said
    assert Path("film.mp4").stat().st_size > 1000
    answer = registry.load("models:/player/1").predict(None, [np.zeros((10, 10, 4), np.uint8)]).iloc[0]
    assert answer.action == int(np.argmax(answer.q_values))
    assert len(answer.q_values) == 3
    assert mlflow.pyfunc.load_model("models:/player/1").metadata.signature is not None


def test_numbers_are_asked_about_as_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    q_learning(["fit", *SMALL, "--output", "out", "--register", "pole"])
    model = registry.load("models:/pole/1")
    rows = model.predict(None, [[0, 0, 0.1, 0], np.zeros(4)])
    assert len(rows.q_values[0]) == 2
    served = mlflow.pyfunc.load_model("models:/pole/1").predict(pd.DataFrame({"image": [[0.0, 0.0, 0.1, 0.0]]}))
    assert served.q_values[0] == pytest.approx(rows.q_values[0], abs=1e-5)
    command(export, ["models:/pole/1", "pole.onnx"], "export")
    given = np.array([0, 0, 0.1, 0], np.float32).reshape(1, 4, 1, 1)
    told = onnxruntime.InferenceSession("pole.onnx").run(None, {"image": given})[0]
    assert told[0] == pytest.approx(rows.q_values[0], abs=1e-4)
    with pytest.raises(ValueError, match=r"An observation is 4 numbers, not \(3,\)"):
        model.predict(None, [[0, 0, 0]])
    with pytest.raises(ValueError, match="has learned from numbers and not from pictures"):
        app("models:/pole/1")
    with pytest.raises(SystemExit, match="2"):
        q_learning(["fit", *SMALL, "--output", "out", "--max_epochs", "9", "--data.clip_rewards", "true"])
    assert "--data.clip_rewards False, and this command says True" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ("CartPoll-v1", "Did you mean: `CartPole`"),
        ("Pendulum-v1", "takes Box.*Discrete"),
        ("FrozenLake-v1", "shows Discrete"),
        ("nothing at all", "Malformed"),
        ("Nowhere/Game-v0", "Nowhere"),
    ],
)
def test_an_environment_that_cannot_be_learned_is_named(environment: str, says: str) -> None:
    with pytest.raises(DataError, match=says):
        _ = Gymnasium(environment=environment).sources


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(DataError, match=r"replay_start 1000 must be at most --data.memory_size, which is 10"):
        _ = Gymnasium(memory_size=10).sources
    with pytest.raises(DataError, match=r"epsilon_end 0.5 must be at most --data.epsilon_start, which is 0.1"):
        _ = Gymnasium(epsilon_start=0.1, epsilon_end=0.5).sources


def test_a_missing_package_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    with pytest.raises(DataError, match="pip install 'gymnasium"):
        _ = Gymnasium().sources


def test_the_target_network_is_left_out_of_what_is_registered_and_follows_in_steps() -> None:
    module = QLearningModule(DataSpec(num_classes=2, in_chans=4, image_size=1), Backbone("mlp"))
    with torch.no_grad():
        module.head.advantage[2].bias.add_(1)
    image = torch.rand(3, 4, 1, 1)
    assert not torch.equal(module.target(image), module(image))
    module.follow()
    assert torch.equal(module.target(image), module(image))
    assert module.train().target.training is False
