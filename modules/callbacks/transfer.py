"""Transfer learning: measures how well pretrained features suit a data set, and chooses a strategy."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, cast

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.callbacks.freezing import FIRST_LAYER, layers
from modules.networks import BackboneError
from modules.networks.backbones import create_backbone, imported, normalization, untrained
from modules.networks.features import Grid, SharedFeatures, extract
from modules.optimization import Optimization
from modules.spec import Backbone, DataSpec, SharedBackbone, Strategy
from modules.training_data import training_data

if TYPE_CHECKING:
    from modules.base import VisionModule

PROBED = (1000, 500)  # maximum number of training and validation images that `measure` uses
LARGE = 500  # images per class from which a data set counts as large
DIFFERENT = 1.3  # errors of a probe on the features, as a multiple of those on the pixels, from which it is different


def probe(train: tuple[NDArray[Any], Any], val: tuple[NDArray[Any], Any]) -> float:
    """Linear probe: returns the accuracy in [0, 1] of a linear classifier on held-out features.

    The classifier is ridge regression on scaled features; its penalty is chosen by leave-one-out cross-validation,
    which needs a single matrix decomposition.

    Args:
        train: features float N×D and labels int N to fit to.
        val: features and labels to evaluate on.
    """
    from sklearn.linear_model import RidgeClassifierCV
    from sklearn.pipeline import make_pipeline

    from modules.callbacks.support_vectors import Scaler

    classifier = make_pipeline(Scaler(), RidgeClassifierCV(alphas=np.logspace(-1, 5, 13)))
    return float(classifier.fit(*train).score(*val))


@dataclass(frozen=True)
class Evidence:
    """Measurements of a data set before a backbone is trained on it.

    Args:
        images: number of training images.
        classes: number of classes; 1 if the task has none.
        features: accuracy of `probe` on the backbone's features; None if images have no label.
        pixels: accuracy of `probe` on the images themselves, averaged to a `Grid`.
    """

    images: int
    classes: int
    features: float | None = None
    pixels: float | None = None

    @property
    def per_class(self) -> float:
        """Images per class."""
        return self.images / max(1, self.classes)

    @property
    def similar(self) -> bool | None:
        """Whether `probe` makes fewer than `DIFFERENT` times as many errors on the features as on the pixels; None if unknown."""
        if self.features is None or self.pixels is None:
            return None
        return self.features == 1 or 1 - self.features < DIFFERENT * (1 - self.pixels)


@dataclass(frozen=True)
class Choice:
    """A transfer strategy, and the reason for it.

    Args:
        strategy: the chosen strategy.
        quadrant: size and similarity, such as ``small, similar``.
        reason: the reason in one sentence.
        evidence: the measurements.
    """

    strategy: Strategy
    quadrant: str
    reason: str
    evidence: Evidence = field(repr=False)

    def __str__(self) -> str:
        """The choice in one line."""
        return f"Transfer: {self.strategy} ({self.quadrant}). {self.reason}"

    def report(self) -> str:
        """Returns the choice and its measurements as Markdown."""
        e = self.evidence
        answer = {None: "unknown", True: "yes", False: "no"}[e.similar]
        rows = [
            ("images to train on", f"{e.images:,}"),
            ("classes", f"{e.classes:,}"),
            ("images per class", f"{e.per_class:.1f} (large from {LARGE})"),
            ("linear probe on the features", "no label" if e.features is None else f"{e.features:.3f}"),
            ("linear probe on the pixels", "no label" if e.pixels is None else f"{e.pixels:.3f}"),
            ("similar", f"{answer} (yes if the features have fewer than {DIFFERENT} times the errors of the pixels)"),
        ]  # fmt: skip
        table = "\n".join(f"| {name} | {value} |" for name, value in rows)
        return f"# {self.strategy}\n\n**{self.quadrant}**: {self.reason}\n\n| measure | value |\n|---|---|\n{table}\n"


def choose(evidence: Evidence) -> Choice:
    """Chooses a strategy by the four quadrants of data-set size and similarity to the source.

    A data set is large from `LARGE` images per class, and similar if features separate its classes not much worse than pixels
    do. A small, similar data set keeps the features frozen; in the other quadrants all layers are fine-tuned. The textbook
    strategies for those, gradual unfreezing and training from scratch, were never better in `benchmarks.transfer`.
    """
    e, size = evidence, "large" if evidence.per_class >= LARGE else "small"
    count = f"{e.per_class:.4g} image{'' if e.per_class == 1 else 's'} per class"
    if e.similar is None:
        why = f"There are {count}. The similarity to the source is unknown, because images have no label."
        return Choice("finetune", f"{size}, similarity unknown", why, e)
    seen = f"a linear classifier has {e.features:.0%} accuracy on the features and {e.pixels:.0%} on the pixels"
    if e.similar and size == "small":
        why = f"The pretrained features suit these images ({seen}), and {count} are too few to fine-tune them."
        return Choice("features", "small, similar", why, e)
    if e.similar:
        why = f"The pretrained features suit these images ({seen}), and {count} are enough to fine-tune them."
        return Choice("finetune", "large, similar", why, e)
    return Choice(
        "finetune",
        f"{size}, different",
        f"The pretrained features do not suit these images ({seen}): all layers learn.",
        e,
    )


def measure(backbone: nn.Module, data: Any, normalize: Callable[[Tensor], Tensor], classes: int | None) -> Choice:
    """Measures how well a backbone's features suit the data, on at most 1,000 training and 500 validation images, and
    chooses a strategy.

    Args:
        backbone: the pretrained network.
        data: a data module.
        normalize: converts images to the network's input.
        classes: number of classes; None counts the labels in the sample.

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


def chosen(trainer: L.Trainer, module: "VisionModule") -> Choice:
    """Returns the choice by `measure` for a module and its trainer's data, the same in all processes."""
    choice, data = None, training_data(trainer)
    if trainer.is_global_zero:
        choice = measure(module.backbone, data, module.normalize, getattr(module, "num_classes", None))
    choice = trainer.strategy.broadcast(choice)
    assert choice is not None
    return choice


@dataclass(frozen=True)
class StartedBackbone:
    """The initial backbone of a module.

    Args:
        network: the network of `create_backbone`, in the requested memory format.
        pretrained: whether it has published weights.
        learned: whether it has trained weights, published or not.
        licence: licence of the weights.
        strategy: transfer strategy; None if ``optimization`` sets it, or if it is still to be chosen.
        normalization: channel means and standard deviations that it expects, float C each, of values in [0, 1].
    """

    network: Any
    pretrained: bool
    learned: bool
    licence: str | None
    strategy: Strategy | None
    normalization: tuple[Tensor, Tensor]


def started(backbone: Backbone, data: DataSpec, output: str, plan: Optimization) -> StartedBackbone:
    """Creates a backbone, with random weights if it is trained from scratch.

    Args:
        backbone: its description.
        data: description of the data.
        output: see `VisionModule`.
        plan: training settings.

    Raises:
        BackboneError: it cannot be created, or the training settings contradict the transfer strategy.
    """
    if isinstance(backbone, SharedBackbone):  # its owner trains it and normalises images
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
    strategy = None if transfer == "auto" else transfer
    return StartedBackbone(network, pretrained, learned, licence, strategy, normalization(network, data.in_chans))


def check_learned(module: "VisionModule") -> None:
    """Checks that there are trained weights to transfer.

    Raises:
        BackboneError: the strategy needs trained weights, and these are random.
    """
    if module.transfer not in (None, "scratch") and not module.learned:
        raise BackboneError(
            f"--model.backbone.transfer {module.transfer} needs trained weights, and "
            f"{module.backbone.recipe['backbone']} has random weights: give --start with a trained network, "
            "--model.backbone.pretrained true, or a file of weights or a registered model as --model.backbone."
        )


def continue_from(module: "VisionModule", checkpoint: dict[str, Any]) -> None:
    """Prepares a module for a resumed training: its weights count as trained, and its strategy as chosen. Rates that fell
    layer by layer, as in `finetune` of earlier versions, still do."""
    module.learned = True
    if module.transfer == "auto":
        module.strategy = checkpoint.get("transfer")
    groups = [group for state in checkpoint.get("optimizer_states", []) for group in state["param_groups"]]
    module.falling_rates = module.strategy == "finetune" and any(
        "backbone." in group.get("name", "").removesuffix(".no_decay") for group in groups
    )


def planned(plan: Optimization, strategy: Strategy | None, backbone: nn.Module, falling_rates: bool) -> Optimization:
    """Returns the training settings with those of a strategy added; the user's own have precedence where both are
    possible.

    Args:
        plan: training settings.
        strategy: transfer strategy.
        backbone: the network.
        falling_rates: whether rates fall layer by layer with any strategy, not with ``freeze_unfreeze`` alone.
    """
    if strategy == "scratch":
        return replace(plan, backbone_lr_scale=1.0, layer_decay=1.0, frozen_epochs=0)
    if strategy == "features":
        return replace(plan, frozen_epochs=-1)
    if (strategy == "freeze_unfreeze" or falling_rates) and plan.layer_decay == 1:
        last = max(layers(backbone).values(), default=0) + 1
        return replace(plan, layer_decay=FIRST_LAYER ** (1 / last))
    return plan


class TransferChoice(L.Callback):
    """Chooses the strategy that suits the data if a module's ``transfer`` is ``auto``, unless a resumed training has
    already chosen one; see `continue_from`."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = cast("VisionModule", pl_module)
        if stage != "fit":
            return
        check_learned(module)
        if module.transfer != "auto" or module.strategy is not None:
            return
        module.to(trainer.strategy.root_device)
        choice = chosen(trainer, module)
        module.strategy = choice.strategy
        module.print(choice)
        tags = {"transfer": choice.strategy, "quadrant": choice.quadrant}
        module.publisher.text(trainer, "transfer", choice.report(), tags)
