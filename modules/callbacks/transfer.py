"""How a backbone is put to its new use: measured, chosen, with the evidence."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV
from sklearn.pipeline import make_pipeline
from torch import Tensor, nn
from typing_extensions import override

from modules.callbacks.freezing import FIRST_LAYER, layers
from modules.callbacks.linear_head import Scaler
from modules.networks import BackboneError
from modules.networks.backbones import create_backbone, imported, untrained
from modules.networks.features import Grid, SharedFeatures, extract
from modules.optimization import Optimization
from modules.spec import Backbone, DataSpec, SharedBackbone, Strategy
from modules.training_data import training_data

if TYPE_CHECKING:
    from modules.base import VisionModule

PROBED = (1000, 500)  # images to train on and to validate with that `measure` looks at
LARGE = 50  # images a class from which a data set counts as large


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
        why = f"There are {count}. Without a label for each image, the similarity to the source is not known."
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


@dataclass(frozen=True)
class StartedBackbone:
    """The backbone that a module begins with.

    Args:
        network: what `create_backbone` made, in the memory order that is asked for.
        pretrained: whether it has published weights.
        learned: whether it has weights that learned something, published or not.
        licence: of these.
        strategy: how it is put to its new use; None where ``optimization`` says it, or it is to be chosen.
        normalization: means and standard deviations of the channels that it expects, float C each, of values in [0, 1].
    """

    network: Any
    pretrained: bool
    learned: bool
    licence: str | None
    strategy: Strategy | None
    normalization: tuple[Tensor, Tensor]


def started(backbone: Backbone, data: DataSpec, output: str, plan: Optimization) -> StartedBackbone:
    """Makes a backbone, with random weights where the transfer is from scratch.

    Args:
        backbone: which one.
        data: description of its data.
        output: see `VisionModule`.
        plan: how it is trained.

    Raises:
        BackboneError: it cannot be made, or the settings of the training contradict the transfer.
    """
    if isinstance(backbone, SharedBackbone):  # whoever has it trains it, and prepares images for it
        part = SharedFeatures(backbone.feature_info, output == "maps")
        plain = torch.zeros(data.in_chans), torch.ones(data.in_chans)
        return StartedBackbone(part, False, False, None, None, plain)
    transfer, scratch = backbone.transfer, backbone.transfer == "scratch"
    if plan.frozen_epochs < 0 and transfer in ("finetune", "freeze_unfreeze", "auto"):
        raise BackboneError(
            f"--model.backbone.transfer {transfer} lets the backbone learn, which --model.optimization.frozen_epochs "
            f"{plan.frozen_epochs} forbids: leave one of them out."
        )
    pretrained = backbone.pretrained and not scratch
    network: Any = create_backbone(
        backbone.name,
        pretrained,
        data.in_chans,
        data.image_size,
        data.num_classes if output == "logits" else 0,
        features_only=output == "maps",
        grad_checkpointing=backbone.grad_checkpointing,
        **(backbone.options or {}),
    )
    learned = pretrained or imported(backbone.name) != imported(
        network.recipe["backbone"]
    )  # from a file or a registered model
    licence: str | None = getattr(network, "licence", None)
    if pretrained:
        licence = str(network.pretrained_cfg.get("license") or "not stated")
    if scratch and learned:
        twin = untrained(network, data.in_chans, data.image_size).state_dict()
        network.load_state_dict({key: twin.get(key, value) for key, value in network.state_dict().items()})
        learned, licence = False, None
    if backbone.channels_last:
        network.to(memory_format=torch.channels_last)
    mean, std = (torch.tensor(network.pretrained_cfg[key], dtype=torch.float32) for key in ("mean", "std"))
    if len(mean) != data.in_chans:
        mean, std = (value.mean().repeat(data.in_chans) for value in (mean, std))
    strategy = None if transfer == "auto" else transfer
    return StartedBackbone(network, pretrained, learned, licence, strategy, (mean, std))


def check_learned(module: "VisionModule") -> None:
    """Makes sure that there is something to transfer.

    Raises:
        BackboneError: the strategy needs learned weights, and these are random.
    """
    if module.transfer not in (None, "scratch") and not module.learned:
        raise BackboneError(
            f"--model.backbone.transfer {module.transfer} starts from what the network has learned, and "
            f"{module.backbone.recipe['backbone']} has random weights: give --start with a trained network, "
            "--model.backbone.pretrained true, or a file of weights or a registered model as --model.backbone."
        )


def continue_from(module: "VisionModule", checkpoint: dict[str, Any]) -> None:
    """Makes ready for a training that goes on: what it started from has been learned, and its strategy chosen.

    Args:
        module: whose weights are loaded later, by the trainer.
        checkpoint: of `read_checkpoint`.
    """
    module.learned = True
    if module.transfer == "auto":
        module.strategy = checkpoint.get("transfer")


def planned(plan: Optimization, strategy: Strategy | None, backbone: nn.Module) -> Optimization:
    """The settings of a training with what a strategy adds: a user's own stay, where the strategy has room for them."""
    if strategy == "scratch":
        return replace(plan, backbone_lr_scale=1.0, layer_decay=1.0, frozen_epochs=0)
    if strategy == "features":
        return replace(plan, frozen_epochs=-1)
    if strategy in ("finetune", "freeze_unfreeze") and plan.layer_decay == 1:
        last = max(layers(backbone).values(), default=0) + 1
        return replace(plan, layer_decay=FIRST_LAYER ** (1 / last))
    return plan


class TransferChoice(L.Callback):
    """Where a module's ``transfer`` is ``auto``, takes the strategy that suits the data, if the training does not go on with
    one; see `continue_from`."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast("VisionModule", pl_module)
        if stage != "fit":
            return
        check_learned(module)
        if module.transfer != "auto" or module.strategy is not None:
            return
        module.to(trainer.strategy.root_device)
        choice, data = None, training_data(trainer)
        if trainer.is_global_zero:
            choice = measure(module.backbone, data, module.normalize, getattr(module, "num_classes", None))
        choice = trainer.strategy.broadcast(choice)
        assert choice is not None
        module.strategy = choice.strategy
        module.print(choice)
        tags = {"transfer": choice.strategy, "quadrant": choice.quadrant}
        module.publisher.text(trainer, "transfer", choice.report(), tags)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["transfer"] = cast("VisionModule", pl_module).strategy
