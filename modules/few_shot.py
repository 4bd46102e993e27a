"""Few-shot classification with prototypical networks."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer, HeadedAnswers, likeliest
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
from modules.training_data import evaluated, given_data

EPISODES = 600  # number of episodes in an evaluation


def prototypes(embedding: Tensor, number: Tensor) -> Tensor:
    """Computes the mean embedding of each class, float K×D, from float N×D and class indices, int64 N with all of 0 …
    K-1.

    >>> prototypes(torch.tensor([[0.0, 2.0], [2.0, 2.0], [5.0, 0.0]]), torch.tensor([0, 0, 1])).tolist()
    [[1.0, 2.0], [5.0, 0.0]]
    """
    members = F.one_hot(number).T.to(embedding)
    with torch.autocast(embedding.device.type, enabled=False):  # half precision is too coarse for the mean
        return members @ embedding / members.sum(1, keepdim=True)


def scores(embedding: Tensor, prototype: Tensor) -> Tensor:
    """Computes logits, float N×K: negative squared Euclidean distances of float N×D to prototypes, float K×D.

    Source: Snell et al. 2017, arXiv:1703.05175, equation 2.
    """
    return -torch.cdist(embedding, prototype, compute_mode="donot_use_mm_for_euclid_dist").square()


def episodes(
    labels: NDArray[np.int64], way: int, pictures: int, count: int = EPISODES
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Draws the episodes of an evaluation; deterministic for given labels.

    Args:
        labels: labels of all images, int64 N.
        way: number of classes per episode, among those with at least ``pictures`` images.
        pictures: number of images per class.
        count: number of episodes.

    Yields:
        The classes, int64 ``way``, and the indices of their images, int64 ``way``×``pictures``.
    """
    generator = np.random.default_rng(0)
    places = {k: np.flatnonzero(labels == k) for k in rich(labels, pictures).tolist()}
    for _ in range(count):
        chosen = generator.choice([*places], way, replace=False)
        yield chosen, np.stack([generator.choice(places[k], pictures, replace=False) for k in chosen])


def rich(labels: NDArray[np.int64], pictures: int) -> NDArray[np.int64]:
    """Returns the classes with at least this number of images, from labels int64 N."""
    return np.flatnonzero(np.bincount(labels) >= pictures)


class FewShotModule(VisionModule):
    """Prototypical networks (Snell et al. 2017, arXiv:1703.05175): a class is represented by the mean embedding of a
    few images.

    The embedding of an image is the backbone's pooled features. In training, each batch is an episode: the first
    ``shots`` images of each class are its support set, whose mean is the prototype, and the others are classified by
    their squared distances to the prototypes, times a learned factor (Oreshkin et al. 2018, arXiv:1805.10123). With
    frozen features (``transfer`` ``features``) only the factor is learned, which changes no prediction: a baseline.
    Evaluated on unseen classes, in 600 fixed episodes.

    Args:
        data: description of the data.
        backbone: the embedding network.
        optimization: optimiser, schedule and regularisation.
        way: N, number of classes per episode in evaluation.
        shots: K, number of support images per class.
        queries: number of query images per class in an episode of the evaluation.
        unit: normalise embeddings to unit length, which suits features that were not trained on episodes (Wang et al.
            2019, arXiv:1911.04623).
    """

    monitor = "val/accuracy"
    mode = "max"
    needs = ("identity",)
    needs_whole_weights = "the learned factor of its distances is a single number"

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
        self.log_factor = nn.Parameter(torch.tensor(size**-0.5).log())  # factor on the distances
        self.gathered = PerStage(lambda _: Gathered())
        self.taught: tuple[list[str], Tensor] | None = None  # class names and prototypes for `predict`

    @override
    def parts(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("way", "shots", "queries", "unit")}

    @override
    def setup(self, stage: str) -> None:
        super().setup(stage)
        data = given_data(self.trainer)
        pictures = getattr(data, "pictures_per_person", None)
        if stage == "fit" and pictures is not None and pictures <= self.shots:
            raise BackboneError(
                f"--model.shots {self.shots} pictures of each class make its prototype, and with --data.pictures_per_person {pictures} "
                f"none is left to ask about: give --data.pictures_per_person {self.shots + 1} or more, or fewer shots."
            )
        for split in {"fit": ("val", "test"), "validate": ("val",), "test": ("test",)}.get(stage, ()):
            if data is not None and split in data.sources:
                self._check(np.asarray(getattr(data.sources[split], "labels", ())), split)

    def _check(self, labels: NDArray[np.int64], split: str) -> None:
        """Checks that a split has enough images for episodes.

        Raises:
            BackboneError: too few classes have enough images.
        """
        pictures = self.shots + self.queries
        if (count := len(rich(labels, pictures))) < self.way:
            raise BackboneError(
                f"An episode needs --model.way {self.way} classes with {pictures} pictures each (--model.shots "
                f"{self.shots} and --model.queries {self.queries}), and of the {len(np.unique(labels))} classes of the {split} split "
                f"{count} have so many. Give smaller numbers, or data with more."
            )

    def forward(self, image: Tensor) -> Tensor:
        """Computes embeddings, float32 B×D, from images, uint8 B×C×H×W."""
        embedding = self.backbone(self.normalize(image)).float()
        return F.normalize(embedding) if self.unit else embedding

    def logits(self, embedding: Tensor, prototype: Tensor) -> Tensor:
        """See `scores`; float N×K, times the learned factor."""
        return scores(embedding, prototype) * self.log_factor.exp()

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """See `VisionModule.losses`; the episode consists of the batches of all processes together."""
        embedding, identity, index = (
            gathered(each) for each in (self(batch["image"]), batch["identity"], batch["index"])
        )
        number = identity.unique(return_inverse=True)[1]
        support = (number[:, None] == number).tril(-1).sum(1) < self.shots  # the first of each class
        asked = ~support & ~torch.isin(index, index[support])  # a small class may be sampled twice
        if not asked.any():
            raise BackboneError(
                f"The pictures of a class in a batch all make its prototype, and none is left to ask about: give more "
                f"--data.pictures_per_person than --model.shots {self.shots}."
            )
        logits, target = self.logits(embedding[asked], prototypes(embedding[support], number[support])), number[asked]
        accuracy = (logits.argmax(1) == target).float().mean()
        return Losses({"loss": F.cross_entropy(logits, target)}, {"accuracy": accuracy}, len(target))

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Collects the embeddings of the split, from which `report` draws episodes."""
        self.gathered[stage].update(self(batch["image"]), batch["identity"], batch["index"])
        return Losses({})

    @torch.no_grad()
    def report(self, stage: Stage) -> Report:
        """Evaluates 600 episodes: mean accuracy with its 95 % confidence interval, and the accuracy per class."""
        embedding, identity, index = self.gathered[stage].compute()
        self.gathered[stage].reset()
        labels, pictures = identity.cpu().numpy(), self.shots + self.queries
        way = min(self.way, len(rich(labels, pictures)))  # if only a part of the split is evaluated
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
        dataset = evaluated(self.trainer, stage)
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
        """Draws an episode, one class per row: support images, then queries with their predicted classes."""
        shown, asked = range(min(self.shots, most)), range(min(self.queries, most))
        images, captions = [], []
        for row, answers in enumerate(guess.view(len(classes), -1)):
            images += [places[row, i] for i in shown] + [places[row, self.shots + i] for i in asked]
            captions += [f"{names[classes[row]]}:" for _ in shown] + [names[classes[answers[i]]] for i in asked]
        pixels = [dataset[int(index[i]), 0]["image"] for i in images]
        return sheet(pixels, len(shown) + len(asked), captions, side=64)

    def teach(self, embedding: Tensor, names: Sequence[str]) -> None:
        """Sets the classes that `predict` returns, replacing earlier ones.

        Args:
            embedding: embeddings of support images, float N×D.
            names: class name of each image, N.
        """
        known = sorted(set(names))
        number = torch.tensor([known.index(name) for name in names], device=self.device)
        self.taught = known, prototypes(embedding.to(self.device), number)
        self.answers = HeadedAnswers("{label} {probability:.3f}")

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``embedding`` of each image, a list of floats; after `teach`, ``label``, ``probability`` and the
        five most likely labels as ``top``."""
        embedding = self(batch["image"])
        if self.taught is None:
            return [{"embedding": row} for row in embedding.tolist()]
        names, known = self.taught
        return likeliest(self.logits(embedding, known), names)
