"""How a pretrained backbone is put to a new use: which strategy suits, which layers learn when, heads without descent."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.linear_model import RidgeClassifierCV
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_val_predict, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from timm.models._manipulate import flatten_modules, group_parameters
from torch import Tensor, nn

Strategy = Literal["scratch", "features", "finetune", "freeze_unfreeze"]
Transfer = Literal["scratch", "features", "finetune", "freeze_unfreeze", "auto"]

FIRST_LAYER = 0.1  # rate of the layer nearest to the image, as a share of the head's, where a strategy sets the decay
PROBED = (1000, 500)  # images to train on and to validate with that `measure` looks at
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)  # C of the support vector machine
UNTESTED = 1e-2  # C where a class has a single image, so that nothing can be held out
SEARCHED = 2000  # images at most with which C is chosen
GRID = 1024  # numbers at most that `grid` leaves of an image or of a stage's maps
LARGE = 50  # images a class from which a data set counts as large


def layers(backbone: nn.Module, coarse: bool = False) -> dict[str, int]:
    """The layer of each parameter of a backbone by its name; 0 is nearest to the image.

    Args:
        backbone: what `create_backbone` makes, also with ``features_only``.
        coarse: count stages, where the architecture has them, instead of blocks.
    """
    inner: Any = getattr(backbone, "model", None) if not hasattr(backbone, "group_matcher") else backbone
    if hasattr(inner, "group_matcher"):
        prefix = "" if inner is backbone else "model."
        found = group_parameters(inner, inner.group_matcher(coarse=coarse), reverse=True)
        return {prefix + name: int(layer) for name, layer in found.items()}
    parts = flatten_modules(backbone.named_children(), depth=1, module_types="container")
    named = {name: [f"{name}.{key}" for key, _ in part.named_parameters()] for name, part in parts}
    filled = [keys for keys in named.values() if keys]
    return {key: layer for layer, keys in enumerate(filled) for key in keys}


def unfreezing(count: int, head_epochs: int, epochs: int) -> list[int]:
    """The epoch in which each layer starts to learn: the last one after the head had its time, then one after the other
    from the top down, the last of them before the training is half over (Howard & Ruder 2018, arXiv:1801.06146).

    Args:
        count: layers.
        head_epochs: epochs in which only the head learns.
        epochs: epochs of the whole training; 0 if it is not known, which opens a layer each epoch.

    Returns:
        An epoch, counted from 0, for each layer; the first is the layer nearest to the image.
    """
    span = max(0, -(-epochs // 2) - head_epochs) if epochs else count
    return [head_epochs + span * (count - 1 - layer) // count for layer in range(count)]


def pool(features: Any) -> Tensor:
    """What a backbone answers as one vector for each image, float B×D; of maps B×C×H×W the mean of the last."""
    last: Tensor = features[-1] if isinstance(features, list | tuple) else features
    return last.mean((2, 3)) if last.ndim == 4 else last


class Stages(nn.Module):
    """A backbone that tells what each of its stages makes of an image, after the image itself and before its answer.

    Args:
        backbone: what `create_backbone` makes, without ``features_only``.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        info = getattr(backbone.feature_info, "info", backbone.feature_info)
        self._channels = {level["module"]: level["num_chs"] for level in info}
        self._seen: dict[str, Tensor] = {}
        self.widths: dict[str, int] = {}  # numbers of each stage, by its name; known after the first image
        for name in self._channels:
            backbone.get_submodule(name).register_forward_hook(partial(self._note, name))

    def _note(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        maps = output[0] if isinstance(output, tuple) else output
        if maps.ndim == 4 and maps.shape[1] != self._channels[name]:
            maps = maps.permute(0, 3, 1, 2)
        self._seen[name] = grid(maps) if maps.ndim == 4 else maps.flatten(1, -2).mean(1)

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×H×W to the numbers of all stages in a row, float B×D: maps are averaged to a grid, so that each stage
        has about a thousand numbers; of tokens the mean is taken."""
        answer = pool(self.backbone(image))
        named = {name: self._seen[name] for name in self._channels}
        stages = {"image": grid(image), **named, "answer": answer}
        self.widths = {name: value.shape[1] for name, value in stages.items()}
        return torch.cat(list(stages.values()), 1)


@torch.no_grad()
def extract(
    network: nn.Module, batches: Iterable[dict[str, Tensor]], normalize: Callable[[Tensor], Tensor]
) -> tuple[NDArray[np.float32], NDArray[np.int64] | None]:
    """What a fixed network makes of images.

    Args:
        network: a backbone; it is in evaluation mode meanwhile.
        batches: with ``image`` uint8 B×C×H×W, and ``label`` int64 B or none.
        normalize: makes the network's input of the images.

    Returns:
        Pooled features, float32 N×D, and the labels, int64 N, or None.
    """
    modes = {part: part.training for part in network.modules()}
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    network.eval()
    features, labels = [], []
    for batch in batches:
        features.append(pool(network(normalize(batch["image"].to(device)))).float().cpu().numpy())
        labels.append(batch.get("label"))
    for part, training in modes.items():
        part.training = training
    known = [label.numpy() for label in labels if label is not None]
    return np.concatenate(features), np.concatenate(known) if known else None


def grid(maps: Tensor) -> Tensor:
    """Averages maps, float B×C×H×W, to a grid of about a thousand numbers, float B×D."""
    side = max(1, int((GRID / maps.shape[1]) ** 0.5))
    return F.adaptive_avg_pool2d(maps, (min(side, maps.shape[2]), min(side, maps.shape[3]))).flatten(1)


class Grid(nn.Module):
    """`grid` as the network that `extract` asks."""

    def forward(self, image: Tensor) -> Tensor:
        """float B×C×H×W to float B×D."""
        return grid(image)


@dataclass
class Solution:
    """A linear head found without descent.

    Args:
        weight: float K×D.
        bias: float K.
        penalty: the C of the support vector machine.
        accuracy: of the images held out in cross-validation, in [0, 1]; None where nothing could be held out.
        images: how many it was fitted to.
    """

    weight: NDArray[np.float64]
    bias: NDArray[np.float64]
    penalty: float
    accuracy: float | None
    images: int

    def __str__(self) -> str:
        """What was done, in a line."""
        how = "as is usual (a class with one image leaves nothing to hold out)"
        if self.accuracy is not None:
            how = f"by cross-validation, in which {self.accuracy:.1%} of the held-out images were right"
        return f"A linear SVM on the fixed features of {self.images:,} images; C = {self.penalty:g} {how}."


class Scaler(TransformerMixin, BaseEstimator):
    """Features without their mean, divided by their own standard deviation plus the mean one of all.

    With their own alone, a feature that a handful of images all but leaves at rest would outweigh all others.
    """

    def fit(self, features: NDArray[Any], labels: Any = None) -> "Scaler":
        """Takes mean and deviations of features N×D."""
        deviation = features.std(0, dtype=np.float64)
        self.mean_, self.scale_ = features.mean(0, dtype=np.float64), deviation + (deviation.mean() or 1.0)
        return self

    def transform(self, features: NDArray[Any]) -> NDArray[np.float64]:
        """Scales features N×D."""
        return (features - self.mean_) / self.scale_


def machine(penalty: float = UNTESTED) -> Any:
    """The estimator of scikit-learn's that `solve` fits: `Scaler`, then a linear SVM."""
    return make_pipeline(Scaler(), LinearSVC(C=penalty, dual=True, random_state=0, max_iter=5000))


def solve(features: NDArray[np.float32], labels: NDArray[np.int64], num_classes: int) -> Solution:
    """Fits a linear support vector machine to features, one class against the rest (Cortes & Vapnik 1995).

    C is chosen by stratified cross-validation, on 2,000 images at most. The scaling is folded into the weights, and
    these are divided by a temperature (Guo et al. 2017, arXiv:1706.04599), fitted to the held-out margins, so that the
    softmax of the answers is a probability; neither changes which class is highest.

    Args:
        features: float N×D.
        labels: int N, in [0, K).
        num_classes: K. A class without images is never answered.

    Returns:
        The head.
    """
    present, counts = np.unique(labels, return_counts=True)
    if len(present) < 2:
        return Solution(np.zeros((num_classes, features.shape[1])), np.where(np.isin(range(num_classes), present), 0.0, -1e4),
                        UNTESTED, None, len(labels))  # fmt: skip
    penalty, accuracy, temperature, folds = UNTESTED, None, 1.0, min(3, int(counts.min()))
    if folds > 1:
        part = np.arange(len(labels))
        if len(part) > max(SEARCHED, len(present) * folds):
            part = train_test_split(
                part, train_size=max(SEARCHED, len(present) * folds), stratify=labels, random_state=0
            )[0]
            folds = max(2, min(folds, int(np.unique(labels[part], return_counts=True)[1].min())))
        split = StratifiedKFold(folds, shuffle=True, random_state=0)
        search = GridSearchCV(machine(), {"linearsvc__C": PENALTIES}, cv=split, refit=False)
        search.fit(features[part], labels[part])
        penalty, accuracy = search.best_params_["linearsvc__C"], float(search.best_score_)
        held = cross_val_predict(machine(penalty), features[part], labels[part], cv=split, method="decision_function")
        margins = np.stack([-held / 2, held / 2], 1) if held.ndim == 1 else held
        truth = (np.arange(len(part)), np.searchsorted(present, labels[part]))
        size = margins.std()
        found = minimize_scalar(
            lambda t: -log_softmax(margins / (size * np.exp(t)), 1)[truth].mean(), bounds=(-4, 4), method="bounded"
        )  # bounded: where all were right, it has no minimum
        temperature = float(size * np.exp(found.x))
    fitted = machine(penalty).fit(features, labels)
    scaler, svm = fitted[0], fitted[1]
    weight = svm.coef_ / scaler.scale_
    bias = svm.intercept_ - weight @ scaler.mean_
    if len(present) == 2:  # it has one margin for both
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    whole, offset = np.zeros((num_classes, weight.shape[1])), np.full(num_classes, -1e4)
    whole[present], offset[present] = weight / temperature, bias / temperature
    return Solution(whole, offset, float(penalty), accuracy, len(labels))


def probe(train: tuple[NDArray[Any], Any], val: tuple[NDArray[Any], Any]) -> float:
    """How well a linear classifier tells classes apart by some features: its accuracy on held-out images, in [0, 1].

    The classifier is ridge regression on scaled features, its penalty chosen by leaving one out, which costs one
    decomposition.

    Args:
        train: features float N×D and labels int N to fit to.
        val: those to measure with.
    """
    classifier = make_pipeline(Scaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 13)))
    return float(classifier.fit(*train).score(*val))


@dataclass(frozen=True)
class Evidence:
    """What is known of a data set before a backbone is trained on it.

    Args:
        images: images to train on.
        classes: number of classes; 1 where the task has none.
        features: accuracy of `probe` on the backbone's features; None where images have no label of their own.
        pixels: the same on the images themselves, averaged to a `grid`.
    """

    images: int
    classes: int
    features: float | None = None
    pixels: float | None = None

    @property
    def per_class(self) -> float:
        """Images a class."""
        return self.images / max(1, self.classes)

    @property
    def similar(self) -> bool | None:
        """Whether classes lie better apart in the features than in the pixels: what the source saw is of use here."""
        return None if self.features is None or self.pixels is None else self.features > self.pixels


@dataclass(frozen=True)
class Choice:
    """A strategy and why.

    Args:
        strategy: the one to take.
        quadrant: size and similarity in words, such as ``small, similar``.
        reason: why it suits, in a sentence.
        evidence: the numbers.
    """

    strategy: Strategy
    quadrant: str
    reason: str
    evidence: Evidence = field(repr=False)

    def __str__(self) -> str:
        """The choice in a line."""
        return f"Transfer: {self.strategy} ({self.quadrant}). {self.reason}"

    def report(self) -> str:
        """The choice with all its numbers, as Markdown."""
        e = self.evidence
        rows = [
            ("images to train on", f"{e.images:,}"),
            ("classes", f"{e.classes:,}"),
            ("images a class", f"{e.per_class:.1f} (large from {LARGE})"),
            ("linear probe on the features", "no label" if e.features is None else f"{e.features:.3f}"),
            ("linear probe on the pixels", "no label" if e.pixels is None else f"{e.pixels:.3f} (similar if lower)"),
        ]  # fmt: skip
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return f"# {self.strategy}\n\n**{self.quadrant}**: {self.reason}\n\n| measure | value |\n|---|---|\n{table}\n"


def choose(evidence: Evidence) -> Choice:
    """Chooses a strategy by the four quadrants of data-set size and similarity to the source.

    Large is a data set with `LARGE` images a class. Similar is a source whose features separate the classes better than
    the pixels do. Few images of what the source knows leave its features alone; in the other quadrants all layers learn,
    the early ones slowly. What lectures advise for them was seldom better in `benchmarks.transfer`: to unfreeze from the
    top down never, to begin from scratch once in eleven cases.
    """
    e, size = evidence, "large" if evidence.per_class >= LARGE else "small"
    count = f"{e.per_class:.4g} image{'' if e.per_class == 1 else 's'} a class"
    if e.similar is None:
        why = f"There are {count}, and without a label for each image nothing says how similar the source is."
        return Choice("finetune", f"{size}, similarity not known", why, e)
    seen = f"a linear classifier is right in {e.features:.0%} on the features and in {e.pixels:.0%} on the pixels"
    if e.similar and size == "small":
        why = f"The source knows what is in these images ({seen}), and {count} are few to change it with."
        return Choice("features", "small, similar", why, e)
    if e.similar:
        why = f"The source knows what is in these images ({seen}), and {count} are enough to improve on it."
        return Choice("finetune", "large, similar", why, e)
    return Choice(
        "finetune", f"{size}, different", f"The source saw other things ({seen}): all layers have to learn.", e
    )


def measure(backbone: nn.Module, data: Any, normalize: Callable[[Tensor], Tensor], classes: int | None) -> Choice:
    """Measures what data are to a backbone, on 1,000 training and 500 validation images at most, and chooses.

    Args:
        backbone: the pretrained one.
        data: a data module.
        normalize: makes the network's input of images.
        classes: number of classes; None counts the labels that are seen.

    Returns:
        See `choose`.
    """
    train, val = (data.plain_loader(split, most, False) for split, most in zip(("train", "val"), PROBED, strict=True))
    features, labels = extract(backbone, train, normalize)
    scores: list[float | None] = [None, None]
    if labels is not None:
        scores[0] = probe((features, labels), extract(backbone, val, normalize))
        scores[1] = probe(*(extract(Grid(), images, Tensor.float) for images in (train, val)))
    if classes is None:
        classes = 1 if labels is None else len(np.unique(labels))
    return choose(Evidence(len(data.sources["train"]), classes, scores[0], scores[1]))
