"""Recognition of classes that a few pictures introduce: the class of a picture is that of the nearest prototype."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import HeadedAnswers, likeliest
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import Gathered, PerStage
from modules.networks import BackboneError
from modules.optimization import Optimization
from modules.pictures.sheets import sheet
from modules.processes import gathered
from modules.ranges import PositiveInt
from modules.spec import Backbone, DataSpec
from modules.training_data import given_data

EPISODES = 600  # of an evaluation


def prototypes(embedding: Tensor, number: Tensor) -> Tensor:
    """The mean embedding of each class, of float N×D and int64 N with all of 0 … K-1, as float K×D.

    >>> prototypes(torch.tensor([[0.0, 2.0], [2.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 0, 1])).tolist()
    [[1.0, 2.0], [5.0, 0.0]]
    """
    members = F.one_hot(number).T.to(embedding)
    with torch.autocast(embedding.device.type, enabled=False):  # of 16 bits, the mean would be too coarse
        return members @ embedding / members.sum(1, keepdim=True)


def scores(embedding: Tensor, prototype: Tensor) -> Tensor:
    """Negative squared Euclidean distances of float N×D to prototypes, float K×D, as float N×K, the logits of the classes.

    Source: Snell et al. 2017, arXiv:1703.05175, equation 2; their softmax is the probability of each class.
    """
    return -torch.cdist(embedding, prototype, compute_mode="donot_use_mm_for_euclid_dist").square()


def episodes(
    labels: NDArray[np.int64], way: int, pictures: int, count: int = EPISODES
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Episodes of an evaluation, always the same of the same labels.

    Args:
        labels: of all pictures, int64 N.
        way: classes in each episode, of those that have ``pictures``.
        pictures: of each class.
        count: how many episodes.

    Yields:
        The classes, int64 ``way``, and the places of their pictures, int64 ``way``×``pictures``.
    """
    generator = np.random.default_rng(0)
    places = {k: np.flatnonzero(labels == k) for k in rich(labels, pictures).tolist()}
    for _ in range(count):
        chosen = generator.choice([*places], way, replace=False)
        yield chosen, np.stack([generator.choice(places[k], pictures, replace=False) for k in chosen])


def rich(labels: NDArray[np.int64], pictures: int) -> NDArray[np.int64]:
    """The classes that have so many pictures, of int64 N."""
    return np.flatnonzero(np.bincount(labels) >= pictures)


class FewShotModule(VisionModule):
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175): a class is the mean of the embeddings of a few pictures.

    A picture's embedding is the backbone's pooled features. In training, each batch is an episode: the first
    ``shots`` pictures of each class make its prototype, and the others are told apart by their squared distances to the
    prototypes, times a factor that is learned too (Oreshkin et al. 2018, arXiv:1805.10123). Of fixed features (``transfer``
    ``features``) the factor is all that is learned, which changes no answer: the baseline. Measured on classes that were
    never seen, in 600 episodes that are always the same.

    Args:
        data: description of its data.
        backbone: the network that embeds.
        optimization: how it is trained.
        way: N, the classes of an episode in evaluation.
        shots: K, the pictures of each class that make its prototype.
        queries: pictures of each class that an episode of the evaluation asks about.
        unit: scale embeddings to length one, which suits features that were trained otherwise (Wang et al. 2019,
            arXiv:1911.04623).
    """

    monitor = "val/accuracy"
    mode = "max"
    needs = ("identity",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("convnet"),
        optimization: Optimization | None = None,
        way: PositiveInt = 5,
        shots: PositiveInt = 1,
        queries: PositiveInt = 15,
        unit: bool = False,
    ) -> None:
        super().__init__(data, backbone, optimization)
        if way < 2:
            raise BackboneError(f"--model.way must be at least 2, not {way}: an episode tells classes apart.")
        self.way, self.shots, self.queries, self.unit = way, shots, queries, unit
        size = 1 if unit else self.backbone.head_hidden_size
        self.log_factor = nn.Parameter(torch.tensor(size**-0.5).log())  # by which distances grow
        self.gathered = PerStage(lambda _: Gathered())
        self.taught: tuple[list[str], Tensor] | None = None  # names and prototypes of the classes that it answers with

    @override
    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("way", "shots", "queries", "unit")}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = given_data(self.trainer)
        for split in {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if data is not None and split in data.sources:
                self._check(np.asarray(getattr(data.sources[split], "labels", ())), split)

    def _check(self, labels: NDArray[np.int64], split: str) -> None:
        """Looks whether a split has episodes.

        Raises:
            BackboneError: it has too few classes with enough pictures.
        """
        pictures = self.shots + self.queries
        if (count := len(rich(labels, pictures))) < self.way:
            raise BackboneError(
                f"An episode needs --model.way {self.way} classes with {pictures} pictures each (--model.shots "
                f"{self.shots} and --model.queries {self.queries}), and of the {len(np.unique(labels))} classes of the {split} split "
                f"{count} have so many. Give smaller numbers, or data with more."
            )

    def forward(self, image: Tensor) -> Tensor:
        """uint8 B×C×H×W to embeddings, float32 B×D."""
        embedding = self.backbone(self.normalize(image)).float()
        return F.normalize(embedding) if self.unit else embedding

    def logits(self, embedding: Tensor, prototype: Tensor) -> Tensor:
        """See `scores`; float N×K, times the factor."""
        return scores(embedding, prototype) * self.log_factor.exp()

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """See `VisionModule.losses`; the episode is that of all processes' batches together."""
        embedding, identity, index = (
            gathered(each) for each in (self(batch["image"]), batch["identity"], batch["index"])
        )
        number = identity.unique(return_inverse=True)[1]
        support = (number[:, None] == number).tril(-1).sum(1) < self.shots  # of each class the first
        asked = ~support & ~torch.isin(index, index[support])  # a class with few pictures has some twice
        if not asked.any():
            raise BackboneError(
                f"The pictures of a class in a batch all make its prototype, and none is left to ask about: give more "
                f"--data.pictures_per_person than --model.shots {self.shots}."
            )
        logits, target = self.logits(embedding[asked], prototypes(embedding[support], number[support])), number[asked]
        accuracy = (logits.argmax(1) == target).float().mean()
        return Losses({"loss": F.cross_entropy(logits, target)}, {"accuracy": accuracy}, len(target))

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Gathers the split's embeddings, of which `report` draws episodes."""
        self.gathered[stage].update(self(batch["image"]), batch["identity"], batch["index"])
        return Losses({})

    @torch.no_grad()
    def report(self, stage: Stage) -> Report:
        """Measures 600 episodes: mean accuracy with its 95 % confidence interval, and the accuracy of each class."""
        embedding, identity, index = self.gathered[stage].compute()
        self.gathered[stage].reset()
        labels, pictures = identity.cpu().numpy(), self.shots + self.queries
        way = min(self.way, len(rich(labels, pictures)))  # of a part of the split
        if way < 2:
            return Report({"accuracy": torch.nan})
        target, losses, right, chosen, guesses = torch.arange(way).repeat_interleave(self.queries), [], [], [], []
        drawn = list(episodes(labels, way, pictures))
        for classes, places in drawn:
            shown = embedding[torch.from_numpy(places).to(embedding.device)]
            logits = self.logits(shown[:, self.shots :].flatten(0, 1), shown[:, : self.shots].mean(1)).cpu()
            losses.append(F.cross_entropy(logits, target))
            guesses.append(logits.argmax(1))
            right.append((guesses[-1] == target).float().view(way, -1).mean(1))
            chosen.append(classes)
        rates, told = torch.stack(right), np.stack(chosen)
        accuracy = rates.mean(1)
        report = Report({
            "loss": torch.stack(losses).mean(),
            "accuracy": accuracy.mean(),
            "accuracy_ci95": 1.96 * accuracy.std() / len(accuracy) ** 0.5,
        })  # fmt: skip
        loader = self.trainer.test_dataloaders if stage == "test" else self.trainer.val_dataloaders
        dataset: Any = getattr(loader, "dataset", None)
        names = [str(name) for name in getattr(getattr(dataset, "source", None), "names", range(labels.max() + 1))]
        rows = [[names[k], int((labels == k).sum()), float(rates.numpy()[told == k].mean())] for k in np.unique(told)]
        report.tables["per_class"] = ["class", "images", "accuracy"], rows
        if dataset is not None:
            report.pictures["episode"] = lambda: self._drawn(*drawn[0], guesses[0], names, index.cpu().numpy(), dataset)
        return report

    def _drawn(
        self,
        classes: NDArray[np.int64],
        places: NDArray[np.int64],
        guess: Tensor,
        names: Sequence[str],
        index: NDArray[np.int64],
        dataset: Any,
        most: int = 6,
    ) -> NDArray[np.uint8]:
        """An episode, a class in each row: pictures that make its prototype, then queries with what they are taken for."""
        shown, asked = range(min(self.shots, most)), range(min(self.queries, most))
        images, captions = [], []
        for row, answers in enumerate(guess.view(len(classes), -1)):
            images += [places[row, i] for i in shown] + [places[row, self.shots + i] for i in asked]
            captions += [f"{names[classes[row]]}:" for _ in shown] + [names[classes[answers[i]]] for i in asked]
        pixels = [dataset[int(index[i]), 0]["image"] for i in images]
        return sheet(pixels, len(shown) + len(asked), captions, side=64)

    def teach(self, embedding: Tensor, names: Sequence[str]) -> None:
        """Introduces the classes that `predict` answers with, instead of those before.

        Args:
            embedding: of pictures, float N×D.
            names: the class of each, N.
        """
        known = sorted(set(names))
        number = torch.tensor([known.index(name) for name in names], device=self.device)
        self.taught = known, prototypes(embedding.to(self.device), number)
        self.answers = HeadedAnswers("{label} {probability:.3f}")

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """For each image its ``embedding``, a list of floats; of a network that was taught classes ``label``, ``probability``
        and the five likeliest labels as ``top``."""
        embedding = self(batch["image"])
        if self.taught is None:
            return [{"embedding": row} for row in embedding.tolist()]
        names, known = self.taught
        return likeliest(self.logits(embedding, known), names)
