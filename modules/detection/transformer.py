"""RT-DETR, built from the parts of Hugging Face transformers on Fovea's feature maps."""

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert
from typing_extensions import override

from modules.detection.detector import UNSEEN, OneStageDetector, default_strides, unseen
from modules.networks import BackboneError
from modules.networks.pyramid import aligned
from modules.processes import mean_over_processes
from modules.ranges import NonNegativeInt, PositiveInt
from modules.spec import sides
from modules.training_data import Batch
from modules.warm_start import ClassRows

TIE = 1e-3  # logits that differ by less are equal: runtimes compute the last digits differently
CERTAIN = 20  # a logit beyond which none is surer
HEADS = 8  # attention heads
MOST = 12  # maximum number of decoder layers


class RTDETR(OneStageDetector):
    """RT-DETRv2 (Zhao et al. 2024, arXiv:2304.08069; Lv et al. 2024, arXiv:2407.17140), from Hugging Face transformers.

    An encoder applies self-attention to the coarsest map and fuses it with the finer ones. The locations with the
    highest scores become queries, which the decoder refines layer by layer by attention to the maps near their boxes.
    In training, objects are matched one-to-one to queries; noisy copies of the objects are denoised as additional
    queries, which stabilises the matching. There are no anchors, and no non-maximum suppression unless ``nms_iou`` is
    set.

    Args:
        strides: strides of the feature maps; by default three, from 4 on up to 256 pixels, otherwise from 8 on.
        width: channels of maps and queries, a multiple of 8.
        queries: number of queries per image, at most as many as the maps have locations.
        layers: number of decoder layers.
        denoising: number of denoising queries per image; 0 for none.

    Raises:
        BackboneError: the package transformers is not installed, or it does not support the width or the number of
            layers.
    """

    nms_iou = 1.0
    class_layers: ClassVar[Mapping[str, ClassRows]] = {
        "net.enc_score_head": ClassRows(),
        "net.denoising_class_embed": ClassRows(behind=1),  # the class without an object
        **{f"net.decoder.class_embed.{n}": ClassRows() for n in range(MOST)},
    }

    def __init__(
        self,
        backbone: Any,
        num_classes: int,
        image_size: int | str,
        strides: list[int] | None = None,
        width: PositiveInt = 256,
        queries: PositiveInt = 300,
        layers: PositiveInt = 6,
        denoising: NonNegativeInt = 100,
    ) -> None:
        os.environ.setdefault("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")  # its checks cannot be exported to ONNX
        try:
            from transformers import RTDetrV2Config, RTDetrV2ForObjectDetection
            from transformers.loss.loss_rt_detr import RTDetrForObjectDetectionLoss
        except ImportError as error:
            raise BackboneError(
                f"RTDETR comes with the package transformers ({error}): pip install transformers."
            ) from None
        if width % HEADS:
            raise BackboneError(f"--model.detector.width must be a multiple of {HEADS} for RTDETR, not {width}.")
        if not 2 <= layers <= MOST:
            raise BackboneError(f"--model.detector.layers must be from 2 to {MOST} for RTDETR, not {layers}.")
        options = {"width": width, "queries": queries, "layers": layers, "denoising": denoising}
        super().__init__(backbone, num_classes, image_size, strides or default_strides(image_size), options)
        height, across = sides(image_size)
        coarsest = self.pyramid.strides[-1]
        if any(coarse != 2 * fine for fine, coarse in pairwise(self.pyramid.strides)):
            raise BackboneError(f"--model.detector.strides of RTDETR must double from one to the next, not {strides}.")
        if height % coarsest or across % coarsest:
            near = "x".join(str(max(1, round(side / coarsest)) * coarsest) for side in dict.fromkeys((height, across)))
            raise BackboneError(
                f"RTDETR takes images whose sides {coarsest} divides: --data.image_size {near}, not {image_size}."
            )
        levels, count = len(self.pyramid.strides), sum(-(-height // s) * -(-across // s) for s in self.pyramid.strides)
        described: Any = RTDetrV2Config
        config = described(
            num_labels=num_classes, d_model=width, encoder_hidden_dim=width, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
            encoder_in_channels=self.pyramid.channels, encode_proj_layers=[levels - 1], feat_strides=self.pyramid.strides,
            decoder_in_channels=[width] * levels, decoder_n_levels=levels, num_feature_levels=levels, decoder_layers=layers,
            num_queries=min(queries, count), num_denoising=denoising, encoder_attention_heads=HEADS, decoder_attention_heads=HEADS,
        )  # fmt: skip
        self.net = RTDetrV2ForObjectDetection(config).model  # its decoder has the heads
        for part in self.net.modules():
            if "loss_type" in vars(part):  # where it is None, whoever looks at all attributes is warned
                cast(Any, part).loss_type = "RTDetrV2ForObjectDetection"
        self.loss = RTDetrForObjectDetectionLoss
        self.net.backbone = nn.Identity()  # the pyramid computes the maps instead
        self.net.encoder_input_proj = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width))
            for channels in self.pyramid.channels
        )

    @override
    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        read = aligned(self.pyramid(features), self.pyramid.strides)
        maps = zip(self.net.encoder_input_proj, read, strict=True)
        mixed = self.net.encoder([project(x) for project, x in maps])
        return [x.float() for x in mixed.last_hidden_state]

    @override
    def losses(self, outputs: list[Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """See `Detector.losses`. Denoising queries are random, and means are over the batch's objects: evaluation has
        no loss."""
        if not self.training:
            return {}, torch.tensor(len(batch["boxes"]))
        height, across = self.size
        scale = outputs[0].new_tensor([across, height, across, height])
        targets = [
            {"boxes": box_convert(boxes[~ignore], "xyxy", "cxcywh") / scale, "class_labels": labels[~ignore]}
            for boxes, labels, ignore in zip(batch["boxes"], batch["labels"], batch["ignore"], strict=True)
        ]
        with torch.autocast(outputs[0].device.type, enabled=False):
            found = self.net(None, inputs_embeds=outputs[0], encoder_outputs=(outputs,), labels=targets)
            logits, boxes = found.intermediate_logits, found.intermediate_reference_points  # B×layers×Q×K and ×4
            logits, first = (
                self._seen(logits, boxes, batch),
                self._seen(found.enc_topk_logits, found.enc_topk_bboxes, batch),
            )
            _, parts, _ = self.loss(
                logits[:, -1], targets, outputs[0].device, boxes[:, -1], self.net.config, logits, boxes,
                enc_topk_logits=first, enc_topk_bboxes=found.enc_topk_bboxes, denoising_meta_values=found.denoising_meta_values,
            )  # fmt: skip
        objects = logits.new_tensor(float(max(1, sum(len(target["boxes"]) for target in targets))))
        share = objects / mean_over_processes(objects)  # the library only counts the objects of its own process
        names = {"vfl": "class", "bbox": "side", "giou": "box"}
        told = {name: [v for key, v in parts.items() if key.startswith(f"loss_{of}")] for of, name in names.items()}
        if self.net.config.num_denoising:  # DDP expects a gradient, even if a batch has no objects
            told["class"].append(0 * self.net.denoising_class_embed.weight.sum())
        return {name: torch.stack(values).sum() * share for name, values in told.items()}, torch.tensor(len(targets))

    def _seen(self, logits: Tensor, boxes: Tensor, batch: Batch) -> Tensor:
        """Masks logits B×…×K in regions to ignore, outside of any object, so that they have no loss."""
        if not any(ignore.any() for ignore in batch["ignore"]):
            return logits
        height, across = self.size
        middles = boxes.detach()[..., :2] * boxes.new_tensor([across, height])
        images = zip(middles.flatten(1, -2), batch["boxes"], batch["ignore"], strict=True)
        masked = torch.stack([unseen(*image) for image in images]).view(logits.shape[:-1])
        return logits.masked_fill(masked[..., None], UNSEEN)

    @override
    def dense(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """See `OneStageDetector.dense`; for the queries. Same as in the library, but exportable with a dynamic batch
        size."""
        net: Any = self.net
        with torch.autocast(outputs[0].device.type, enabled=False):
            maps = [project(x) for project, x in zip(net.decoder_input_proj, outputs, strict=True)]
            sizes = tuple((x.shape[2], x.shape[3]) for x in maps)
            places = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)
            anchors, valid = net.generate_anchors(sizes, device=places.device, dtype=places.dtype)
            memory = net.enc_output(valid * places)
            score = net.enc_score_head(memory).amax(-1).clamp(-CERTAIN, CERTAIN)
            place = torch.arange(score.shape[1], dtype=torch.int32, device=score.device)
            rank = (score / TIE).round().to(torch.int32) * score.shape[1] - place  # of equal ones, the first
            first = rank.topk(net.config.num_queries, 1).indices.sort(1).values[..., None]
            boxes = (net.enc_bbox_head(memory) + anchors).gather(1, first.expand(-1, -1, 4))
            starts = [sum(h * w for h, w in sizes[:n]) for n in range(len(sizes))]
            found = net.decoder(
                inputs_embeds=memory.gather(1, first.expand(-1, -1, memory.shape[2])), encoder_hidden_states=places,
                encoder_attention_mask=None, reference_points=boxes, spatial_shapes=torch.tensor(sizes, device=places.device),
                spatial_shapes_list=[*sizes], level_start_index=torch.tensor(starts, device=places.device),
            )  # fmt: skip
        height, across = self.size
        boxes = box_convert(found.intermediate_reference_points[:, -1], "cxcywh", "xyxy")
        scale = boxes.new_tensor([across, height, across, height])
        return self.within(boxes * scale), found.intermediate_logits[:, -1].sigmoid()
