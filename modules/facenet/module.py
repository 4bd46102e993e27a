"""Face embeddings for verification and identification."""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_warn
from pytorch_metric_learning.losses import TripletMarginLoss
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.facenet import pictures as drawing
from modules.facenet.metrics import Pairs, report
from modules.facenet.mining import (
    ProgressiveMiner,
    TripletLoss,
    mean_distances,
    triplet_hinge,
    within_class_whitening,
)
from modules.measures.per_stage import Gathered, PerStage
from modules.networks import BackboneError
from modules.optimization import Optimization
from modules.processes import gathered
from modules.ranges import NonNegativeInt, Share
from modules.spec import Backbone, DataSpec
from modules.training_data import evaluated, training_data

COLLAPSE = 0.05  # mean squared distance between identities below which an embedding has collapsed


class FaceNetModule(VisionModule):
    """Face embeddings: a backbone with a linear layer onto the unit sphere, where images of the same person are close.

    Trained with the triplet loss on triplets mined over the batches of all processes (Schroff et al. 2015,
    arXiv:1503.03832). Evaluated on people who are not in the training set: verification (AUC, EER, TAR at FAR, ten
    folds as on LFW), retrieval, identification among distractors, clustering. The threshold is calibrated on the
    validation set and stored with the model.

    Args:
        data: description of the data; ``num_classes`` is the number of training identities.
        backbone: the network that the embedding is built on.
        optimization: optimiser, schedule and regularisation.
        embedding_size: dimensions of the embedding. 0 for the number of features, with the linear layer initialised as
            the identity: a published face network keeps its embedding until it is trained.
        levels: embed the pooled features of this many of the backbone's deepest feature maps, each normalised to unit
            length; 0 uses the backbone's own pooled features. The last layers of an object classifier discard what
            distinguishes faces.
        mirror: average the embeddings of an image and its mirror image in evaluation.
        whiten: initialise the linear layer with the within-class whitening of the features (WCCN; Hatch et al. 2006,
            Interspeech), computed in one pass over the training set. For pretrained features and few people.
        loss: any loss of pytorch-metric-learning; one with class weights, such as ArcFaceLoss, is given the number of
            identities and the embedding size, as ``num_classes`` and ``embedding_size``. None for the triplet loss with α = 0.2.
        miner: any miner of pytorch-metric-learning or of `modules.facenet`. None for progressive mining from semi-hard
            to hard triplets with the default loss, and no mining with another.
        false_accept_rate: fraction of pairs of different people that is accepted at the threshold, in (0, 1).
        threshold: largest squared distance, in [0, 4], at which two images count as the same person; calibrated in
            every validation.
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
        if not isinstance(loss, nn.Module):  # by name: the command line has them as None
            loss = cast(Callable[..., nn.Module], loss)(num_classes=data.num_classes, embedding_size=size)
        self.loss = loss
        self.miner = miner
        self.margin = self.loss.margin if isinstance(self.loss, TripletMarginLoss) else TripletLoss().margin
        self.gathered = PerStage(lambda _: Gathered())

    @override
    def parts(self) -> dict[str, Any]:
        # the threshold of the last validation
        names = ("embedding_size", "levels", "mirror", "threshold")
        return {name: getattr(self, name) for name in names}

    def features(self, image: Tensor) -> Tensor:
        """Computes the features to embed, float32 B×F, from images, uint8 B×C×H×W."""
        found = self.backbone(self.normalize(image))
        if not self.levels:
            return found.float()
        return torch.cat([F.normalize(level.float().mean((2, 3))) for level in found[-self.levels :]], 1)

    def forward(self, image: Tensor) -> Tensor:
        """Computes unit embeddings, float32 B×D for any precision of the backbone, from images, uint8 B×C×H×W."""
        embedding = self._embed(image)
        if self.mirror and not self.training:
            embedding = F.normalize(embedding + self._embed(image.flip(3)))
        return embedding

    def _embed(self, image: Tensor) -> Tensor:
        features = self.features(image)
        with torch.autocast(features.device.type, enabled=False):
            return F.normalize(self.head(features))

    def on_train_start(self) -> None:
        """Whitens the features at the start of the training, if requested."""
        super().on_train_start()
        if self.whiten and self.global_step == 0:
            self._whiten()

    @torch.no_grad()
    def _whiten(self, most: int = 10_000, shrinkage: float = 0.1) -> None:
        """Initialises the linear layer so that the within-class variance is the same in all directions.

        All processes compute the same from at most ``most`` training images and their mirror images.
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
        """See `VisionModule.losses`; computed over the batches of all processes together."""
        embedding, identity = gathered(self(batch["image"])), gathered(batch["identity"])
        triplets = self.miner(embedding, identity) if self.miner else None
        near, far = mean_distances(embedding, identity)
        active = triplet_hinge(embedding, identity, self.margin)[1]
        figures = {"active_triplets": active, "mate_distance": near, "stranger_distance": far}
        if isinstance(self.miner, ProgressiveMiner):
            figures["hard_triplets"] = self.miner.state.float()
        return Losses({"loss": self.loss(embedding, identity, triplets)}, figures, len(identity))

    def on_train_epoch_end(self) -> None:
        """Warns if the embeddings collapse."""
        spread = self.trainer.callback_metrics["train/stranger_distance"]
        if self.current_epoch and spread < COLLAPSE:
            rank_zero_warn(
                f"The embeddings collapse: in epoch {self.current_epoch} the mean squared distance between people is only "
                f"{float(spread):.4f}. Try semi-hard triplets only (--model.miner modules.facenet.SemiHardMiner), "
                "a lower --model.optimization.lr, more people in a batch."
            )

    def measure(self, batch: dict[str, Tensor], stage: Stage) -> Losses:
        """Collects the embeddings of the split; `report` computes the loss."""
        self.gathered[stage].update(self(batch["image"]), batch["identity"], batch["index"])
        return Losses({})

    def report(self, stage: Stage) -> Report:
        """Computes the metrics of the split; calibrates the threshold on the validation set."""
        embedding, identity, index = self.gathered[stage].compute()
        self.gathered[stage].reset()
        loss, active = triplet_hinge(embedding, identity, self.margin)
        vectors, people, places = (value.cpu().numpy() for value in (embedding, identity, index))
        dataset = evaluated(self.trainer, stage)
        listed, given = getattr(getattr(dataset, "source", None), "pairs", None), None
        if listed is not None and len(vectors) == len(dataset):  # not if only a part of the split was evaluated
            given = Pairs(listed[:, 0], listed[:, 1], listed[:, 2] > 0, listed[:, 3])
        found = report(vectors, people, self.false_accept_rate, self.threshold if stage == "test" else None, given)
        if stage == "val" and found.roc is not None and not self.trainer.sanity_checking:
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
        """See `StoredModule.on_load_checkpoint`; also restores the threshold."""
        super().on_load_checkpoint(checkpoint)
        self.threshold = checkpoint.get("architecture", {}).get("threshold", self.threshold)

    @torch.inference_mode()
    @override
    def predict(self, batch: dict[str, Tensor]) -> list[Answer]:
        """Returns the ``embedding`` of each image, a list of floats."""
        return [{"embedding": row} for row in self(batch["image"]).tolist()]
