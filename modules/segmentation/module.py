"""Semantic segmentation."""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray
from torch import Tensor, nn
from typing_extensions import override

from modules.answers import Answer
from modules.base import Stage, VisionModule
from modules.callbacks.means import Losses
from modules.callbacks.publish import Report
from modules.measures.per_stage import PerStage
from modules.networks.dense_decoders import DenseDecoder, UNet, covering
from modules.networks.parts import describe
from modules.networks.pyramid import skip_unread
from modules.optimization import Optimization
from modules.pictures.charts import confusion_matrix
from modules.pictures.palette import IGNORED, tint
from modules.pictures.sheets import as_rgb, sheet
from modules.segmentation import pictures
from modules.segmentation.answers import MapAnswers
from modules.segmentation.losses import IGNORE, CrossEntropy, Loss
from modules.segmentation.metrics import SegmentationMetric
from modules.segmentation.windows import strips
from modules.spec import Backbone, DataSpec
from modules.training_data import Batch
from modules.views import mean_of_classes
from modules.warm_start import ClassRows

SHOWN = 6  # number of validation images shown with their class maps
WORST = 6  # number of images with the largest errors shown


class SegmentationModule(VisionModule):
    """Semantic segmentation: a backbone with a decoder that predicts a class for each pixel.

    Metrics: mean intersection over union (``miou``), Dice, pixel accuracy and boundary F1, overall and per class, from
    counts over all pixels. Logs predictions next to the ground truth with their errors for the same images each
    epoch, the images with the most wrong pixels, and the confusion matrix.

    Args:
        data: description of the data. Images larger than its ``image_size`` are predicted with overlapping windows of
            this size; ``class_weights`` are the weights of the classes' pixels, see ``--data.class_weighting``.
        backbone: the network that the decoder is built on.
        decoder: computes classes from the backbone's feature maps: UNet, FPN, DeepLabV3, DeepLabV3Plus or SegFormer.
        loss: CrossEntropy (the default), Dice, Focal, Lovasz, or a Mixture of them.
        optimization: optimiser, schedule and regularisation.
    """

    monitor = "val/miou"
    mode = "max"
    any_bands = True
    mirrors = True
    takes = ("num_classes", "label_names", "in_chans", "image_size")
    takes_for_training = ("class_weights",)
    needs = ("mask",)
    late_parts: ClassVar[Mapping[str, type]] = {"decoder": DenseDecoder}

    def __init__(
        self,
        data: DataSpec,
        backbone: Backbone = Backbone("resnet18"),
        optimization: Optimization | None = None,
        decoder: Callable[[nn.Module, int], DenseDecoder] = UNet,
        loss: Loss | None = None,
    ) -> None:
        super().__init__(data, backbone, optimization, "maps")
        num_classes = data.num_classes
        self.decoder = decoder(self.backbone, num_classes)
        skip_unread(self, self.decoder.pyramid)
        if self.channels_last:
            self.decoder.to(memory_format=torch.channels_last)
        self.multiple = max(self.backbone.feature_info.reduction() + self.decoder.pyramid.strides)
        self.loss = loss or CrossEntropy()
        weights = None if data.class_weights is None else torch.tensor(data.class_weights)
        self.register_buffer("class_weights", weights, persistent=False)
        self.figures = PerStage(lambda _: SegmentationMetric(num_classes))
        self.answers = MapAnswers(self.label_names)
        self.shown: list[pictures.MapExample] = []
        self.worst: list[pictures.MapExample] = []

    @override
    def parts(self) -> dict[str, Any]:
        return {"decoder": describe(self.decoder, **self.decoder.options)}

    @property
    @override
    def class_layers(self) -> dict[str, ClassRows]:
        return {"decoder.last": ClassRows()}

    def forward(self, image: Tensor) -> Tensor:
        """Computes logits, float B×K×H×W, from images of any size, uint8 B×C×H×W."""
        height, width = image.shape[2:]
        below, right = -height % self.multiple, -width % self.multiple
        x = self.normalize(image)
        if below or right:  # zeros are the mean colour
            x = F.pad(x, (0, right, 0, below))
        return covering(self.decoder(self.backbone(x)), (height, width), (height + below, width + right))

    @override
    def losses(self, batch: Batch) -> Losses:
        return Losses({"loss": self.loss(self(batch["image"]).float(), batch["mask"].long(), self.class_weights)})

    def measure(self, batch: Batch, stage: Stage) -> Losses:
        """See `VisionModule.measure`. The loss is computed image by image, so that its mean is independent of the
        batches."""
        mask, logits = batch["mask"].long(), self.views.mean(self, batch["image"], mean_of_classes).float()
        found = logits.argmax(1)
        self.figures[stage].update(found, mask)
        if self.trainer.is_global_zero:
            with self.publisher.optional(f"{stage}/segmentations"):
                self._keep_pictures(batch["image"], found, batch["mask"])
        losses = [self.loss(one[None], true[None], self.class_weights) for one, true in zip(logits, mask, strict=True)]
        return Losses({"loss": torch.stack(losses).mean()})

    def _keep_pictures(self, image: Tensor, found: Tensor, mask: Tensor) -> None:
        """Keeps the first images, and those with the most wrong pixels."""
        for one in map(pictures.MapExample, image, found.to(torch.uint8), mask):
            if len(self.shown) < SHOWN:
                self.shown.append(one.cpu())
            errors = one.errors()
            if errors and (len(self.worst) < WORST or errors > self.worst[-1].errors()):
                self.worst = sorted([*self.worst, one.cpu()], key=lambda example: -example.errors())[:WORST]

    @override
    def report(self, stage: Stage) -> Report:
        values = self.figures[stage].compute()
        self.figures[stage].reset()
        counts = values.pop("confusion").cpu().numpy()
        columns = [values.pop(f"{key}_per_class").tolist() for key in ("iou", "dice", "boundary_f1")]
        report = Report(values)
        shown, worst, self.shown, self.worst = self.shown, self.worst, [], []
        names = self.label_names
        for key, examples in (("segmentations", shown), ("mistakes", worst)):
            if examples:
                report.pictures[key] = partial(pictures.column, examples, names)
        report.pictures["confusion_matrix"] = lambda: confusion_matrix(counts, names)
        rows = [
            [name, int(row.sum()), *(None if value != value else value for value in figures)]
            for name, row, *figures in zip(names, counts, *columns, strict=True)
        ]
        report.tables["per_class"] = ["class", "pixels", "iou", "dice", "boundary_f1"], rows
        return report

    @torch.inference_mode()
    def class_map(self, image: Tensor) -> Tensor:
        """Predicts the class of each pixel of an image of any size, in bounded memory; see
        `modules.segmentation.windows.strips`.

        Args:
            image: uint8 C×H×W.

        Returns:
            uint8 H×W, on the CPU.
        """
        pieces = strips(partial(self.views.mean, self, mean=mean_of_classes), image, self.size, self.device)
        return torch.cat([piece.argmax(0).to("cpu", torch.uint8) for piece in pieces])

    def class_maps(self, batch: Batch) -> Iterator[NDArray[np.uint8]]:
        """Predicts the class map of each image of a batch, in the format of `predict`, uint8 H×W."""
        for i, image in enumerate(batch["image"]):
            height, width = batch["size"][i].tolist() if "size" in batch else image.shape[1:]
            yield self.class_map(image[:, :height, :width]).numpy()

    def predict(self, batch: Batch) -> list[Answer]:
        """Returns for each image its ``labels``, the largest first; ``size`` (height, width); ``shares``, the fraction
        of each class; and ``masks``, the COCO run-length code of each class in the image.

        Args:
            batch: ``image`` uint8 B×C×H×W, or a list of C×H×W; ``size``, optional, the height and width of the images
                without padding.
        """
        result = []
        for mask in self.class_maps(batch):
            counts = np.bincount(mask.ravel(), minlength=self.num_classes)
            order = [k for k in np.argsort(-counts, kind="stable").tolist() if counts[k]]
            masks, shares = {}, {}
            for k in order:
                code = rle.encode(np.asfortranarray(mask == k, np.uint8))
                masks[self.label_names[k]] = {"size": list(mask.shape), "counts": code["counts"].decode()}
                shares[self.label_names[k]] = round(int(counts[k]) / mask.size, 6)
            result.append({"labels": list(shares), "size": list(mask.shape), "shares": shares, "masks": masks})
        return result

    def draw_samples(self, batch: Batch, columns: int = 8) -> NDArray[np.uint8]:
        """See `VisionModule.draw_samples`; with the classes as an overlay, and ignored pixels in white."""
        tiles = []
        for image, mask in zip(batch["image"], batch["mask"].cpu().numpy(), strict=True):
            tile = tint(as_rgb(image), mask)
            tile[mask == IGNORE] = IGNORED
            tiles.append(tile)
        return sheet(tiles, columns)
