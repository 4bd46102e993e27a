"""Embeddings in which distance says who is who."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import Tensor, nn
from typing_extensions import override

from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.facenet import pictures as drawing
from modules.facenet.metrics import Pairs, report
from modules.facenet.mining import (
    ProgressiveMiner,
    TripletLoss,
    mate_distance,
    stranger_distance,
    triplet_hinge,
    within_class_whitening,
)
from modules.measures.per_stage import Gathered, PerStage
from modules.networks import BackboneError
from modules.optimization import Optimization
from modules.processes import gathered
from modules.ranges import NonNegativeInt, Share
from modules.spec import Backbone, DataSpec
from modules.training_data import training_data

COLLAPSE = 0.05  # mean squared distance of strangers under which an embedding tells nobody apart


class FaceNetModule(VisionModule):
    """A backbone and a linear layer onto the unit sphere, on which pictures of one person lie together.

    Trained by the triplet loss on triplets mined over the batches of all processes (Schroff et al. 2015,
    arXiv:1503.03832). Measured on people that were never seen: verification (AUC, EER, TAR at FAR, ten folds as on LFW),
    retrieval, identification among distractors, clustering. A threshold is calibrated on the validation split and goes
    with the model.

    Args:
        data: description of its data; ``num_classes`` are the people to train on.
        backbone: the network that it is built on.
        optimization: how it is trained.
        embedding_size: dimensions of the embedding. 0 is the number of the features, and the linear layer starts as the
            identity: a published network of faces embeds as it was published, until it learns.
        levels: embed the pooled features of so many of the backbone's deepest feature maps, each scaled to length one;
            0 takes the backbone's own pooled features. The last layers of a classifier of objects forget what faces
            differ in.
        mirror: embed each picture as the mean with its mirror image, once trained.
        whiten: let the linear layer start as a whitening of the features within people (WCCN; Hatch et al. 2006,
            Interspeech), which one pass over the training pictures gives. For pretrained features and few people.
        loss: any loss of pytorch-metric-learning; one that keeps weights of the people, such as ArcFaceLoss, is told how
            many there are and the embedding's size. None is the triplet loss with α = 0.2.
        miner: any miner of pytorch-metric-learning, or of `modules.facenet`. None goes from semi-hard to hard triplets
            for the default loss, and mines nothing for another.
        false_accept_rate: share of strangers' pairs that is accepted at the threshold, in (0, 1).
        threshold: the largest squared distance, in [0, 4], at which two pictures count as one person; every validation
            calibrates it anew.
    """

    monitor = "val/auc"
    mode = "max"
    training_only = ("loss.", "miner.")

    takes_for_training = ("num_classes",)
    needs = ("identity",)

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("lenet5"),
        optimization: Optimization | None = None,
        embedding_size: NonNegativeInt = 128,
        levels: NonNegativeInt = 0,
        mirror: bool = False,
        whiten: bool = False,
        loss: nn.Module | Callable[[int, int], nn.Module] | None = None,
        miner: nn.Module | None = None,
        false_accept_rate: Share = 0.01,
        threshold: float | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization, "maps" if levels else "vector")
        if embedding_size == 1:
            raise BackboneError("--model.embedding_size must be at least 2, or 0 for the number of the features.")
        if not 0 < false_accept_rate < 1:
            raise BackboneError(f"--model.false_accept_rate must be a share between 0 and 1, not {false_accept_rate}.")
        self.embedding_size = embedding_size
        self.false_accept_rate, self.threshold = false_accept_rate, threshold
        self.levels, self.mirror, self.whiten = levels, mirror, whiten
        channels = self.backbone.feature_info.channels() if levels else [self.backbone.head_hidden_size]
        if levels > len(channels):
            raise BackboneError(
                f"{backbone.name} has {len(channels)} feature maps: --model.levels {levels} is too many."
            )
        size = embedding_size or sum(channels[-levels:])
        self.head = nn.Linear(sum(channels[-levels:]), size)
        if not embedding_size:
            nn.init.eye_(self.head.weight)
            nn.init.zeros_(self.head.bias)
        if loss is None:
            loss, miner = TripletLoss(), miner or ProgressiveMiner()
        self.loss = loss if isinstance(loss, nn.Module) else loss(data.num_classes, size)
        self.miner = miner
        self.margin = self.loss.margin if isinstance(self.loss, TripletMarginLoss) else TripletLoss().margin
        self.gathered = PerStage(lambda _: Gathered())

    @override
    def parts(self) -> dict[str, Any]:
        # the threshold is what the last validation calibrated
        names = ("embedding_size", "levels", "mirror", "threshold")
        return {name: getattr(self, name) for name in names}

    def features(self, image: Tensor) -> Tensor:
        """uint8 B×C×S×S to what is embedded, float32 B×F."""
        found = self.backbone(self.normalize(image))
        if not self.levels:
            return found.float()
        return torch.cat([F.normalize(level.float().mean((2, 3))) for level in found[-self.levels :]], 1)

    def forward(self, image: Tensor) -> Tensor:
        """uint8 B×C×S×S to embeddings of length one, float32 B×D whatever the precision of the backbone."""
        embedding = self._embed(image)
        if self.mirror and not self.training:
            embedding = F.normalize(embedding + self._embed(image.flip(3)))
        return embedding

    def _embed(self, image: Tensor) -> Tensor:
        features = self.features(image)
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.head(features))

    def on_train_start(self) -> None:
        """Whitens the features where a training begins that shall start so."""
        super().on_train_start()
        if self.whiten and self.global_step == 0:
            self._whiten()

    @torch.no_grad()
    def _whiten(self, most: int = 10_000, shrinkage: float = 0.1) -> None:
        """Sets the linear layer so that the features' differences within people become equally large in all directions.

        Every process computes the same from the same pictures, at most ``most``, and their mirror images.
        """
        rows, people = [], []
        self.eval()
        for batch in training_data(self.trainer).plain_loader("train", most, shared=False):
            image = batch["image"].to(self.device)
            rows += [self.features(image), self.features(image.flip(3))]
            people += [batch["identity"]] * 2
        self.train()
        weight, bias = within_class_whitening(
            torch.cat(rows), torch.cat(people).to(self.device), self.head.out_features, shrinkage
        )
        self.head.weight.copy_(weight)
        self.head.bias.copy_(bias)

    def losses(self, batch: dict[str, Tensor]) -> Losses:
        """See `VisionModule.losses`; the loss is that of all processes' batches together."""
        embedding, identity = gathered(self(batch["image"])), gathered(batch["identity"])
        triplets = self.miner(embedding, identity) if self.miner else None
        figures = {
            "active_triplets": triplet_hinge(embedding, identity, self.margin)[1],
            "mate_distance": mate_distance(embedding, identity),
            "stranger_distance": stranger_distance(embedding, identity),
        }
        if isinstance(self.miner, ProgressiveMiner):
            figures["hard_triplets"] = self.miner.state.float()
        return Losses({"loss": self.loss(embedding, identity, triplets)}, figures, len(identity))

    def on_train_epoch_end(self) -> None:
        """Looks whether all embeddings move together."""
        spread = self.trainer.callback_metrics["train/stranger_distance"]
        if self.current_epoch and spread < COLLAPSE:
            rank_zero_warn(
                f"The embeddings collapse: in epoch {self.current_epoch} strangers are only {float(spread):.4f} apart, in "
                "squared distance. What often helps: semi-hard triplets only (--model.miner modules.facenet.SemiHardMiner), "
                "a lower --model.optimization.lr, more people in a batch."
            )

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Gathers the split's embeddings, of which `report` says the loss."""
        self.gathered[stage].update(self(batch["image"]), batch["identity"], batch["index"])
        return Losses({})

    def report(self, stage: Stage) -> Report:
        """Measures the split; the threshold is calibrated on validation data."""
        embedding, identity, index = self.gathered[stage].compute()
        self.gathered[stage].reset()
        loss, active = triplet_hinge(embedding, identity, self.margin)
        vectors, people, places = (value.cpu().numpy() for value in (embedding, identity, index))
        trainer = self.trainer
        loader = trainer.test_dataloaders if stage == "test" else trainer.val_dataloaders
        dataset: Any = getattr(loader, "dataset", None)
        listed, given = getattr(getattr(dataset, "source", None), "pairs", None), None
        if listed is not None and len(vectors) == len(dataset):  # not a part of the split
            given = Pairs(listed[:, 0], listed[:, 1], listed[:, 2] > 0, listed[:, 3])
        found = report(vectors, people, self.false_accept_rate, self.threshold if stage == "test" else None, given)
        if stage == "val" and found.roc is not None and not trainer.sanity_checking:
            self.threshold = found.threshold
        told = Report({"loss": loss, "active_triplets": active, **found.figures})
        if found.roc is None or dataset is None:
            return told

        def picture(i: int) -> np.ndarray:
            return dataset[int(places[i]), 0]["image"]

        roc, threshold = found.roc, self.threshold if self.threshold is not None else found.threshold
        told.pictures["roc"] = lambda: drawing.roc_curve(roc, found.figures)
        told.pictures["distances"] = lambda: drawing.distance_histogram(found, threshold)
        with self.publisher.optional(f"{stage}/wrong_pairs"):
            if wrong := drawing.most_wrong(found, threshold):
                told.pictures["wrong_pairs"] = lambda: drawing.pair_sheet(found, wrong, picture)
        told.pictures["map"] = lambda: drawing.embedding_map(vectors, people, picture, stage == "test")
        return told

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `VisionModule.on_load_checkpoint`; takes over the threshold."""
        super().on_load_checkpoint(checkpoint)
        self.threshold = checkpoint.get("architecture", {}).get("threshold", self.threshold)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
        """For each image its ``embedding``, a list of floats."""
        return [{"embedding": row} for row in self(batch["image"]).tolist()]
