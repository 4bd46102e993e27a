"""Conversion of the RT-DETR networks published with Hugging Face transformers."""

import json
import re
from pathlib import Path
from typing import Any

from modules.detection.transformer import RTDETR
from modules.networks import BackboneError
from modules.published import Published

PREFIX = "hf-hub:"  # prefix of their names, as in timm
KINDS = ("rt_detr", "rt_detr_v2")  # the second version can load the weights of the first, with equal predictions
LICENCE = "Apache-2.0 (RT-DETR), learned from COCO"
BACKBONES = {(3, 4, 6, 3): "resnet50d", (3, 4, 23, 3): "resnet101d"}  # by number of blocks per stage
LIKE_OURS = (  # settings that affect predictions and are not arguments of `RTDETR`
    "encoder_hidden_dim", "encoder_ffn_dim", "encoder_layers", "encoder_attention_heads", "encode_proj_layers",
    "encoder_activation_function", "activation_function", "normalize_before", "hidden_expansion", "decoder_in_channels",
    "decoder_ffn_dim", "decoder_n_points", "decoder_attention_heads", "decoder_activation_function", "learn_initial_query",
    "with_box_refine", "decoder_n_levels", "decoder_offset_scale", "decoder_method", "positional_encoding_temperature",
)  # fmt: skip
PLACES = (  # parameter names of the library -> Fovea's; the first match applies
    (r"model\.backbone\.model\.embedder\.embedder\.2\.normalization", "backbone.bn1"),
    (r"model\.backbone\.model\.embedder\.embedder\.(\d)\.(convolution|normalization)", "backbone.conv1.{}"),
    (r"model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.layer\.(\d)\.(convolution|normalization)",
     "backbone.layer{}.{}.{}{}"),
    (r"model\.backbone\.model\.encoder\.stages\.(\d)\.layers\.(\d+)\.shortcut\.(?:1\.)?(convolution|normalization)",
     "backbone.layer{}.{}.downsample.{}"),
    (r"model\.(?!backbone\.)", "detector.net."),
)  # fmt: skip


def is_published(place: Path) -> bool:
    """Whether a folder has a network saved by the library: ``config.json`` and ``model.safetensors``."""
    return (place / "config.json").is_file() and not (place / "architecture.yaml").exists()


def read(place: str) -> Published:
    """Loads an RT-DETR on ResNet as a module with equal predictions.

    Args:
        place: a folder, or the name of a repository on the Hugging Face hub.

    Raises:
        BackboneError: it is another network or cannot be loaded, or the library is not installed.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForObjectDetection, RTDetrResNetConfig
    except ImportError as error:
        raise BackboneError(
            f"{place} is read by the package transformers ({error}): pip install transformers."
        ) from None
    try:
        config: Any = AutoConfig.from_pretrained(place)
        if config.model_type not in KINDS:
            raise BackboneError(
                f"{place} is a {config.model_type}, and of the library transformers only RT-DETR (rt_detr, rt_detr_v2) can be "
                "taken over as a whole."
            )
        model, info = AutoModelForObjectDetection.from_pretrained(place, use_safetensors=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, json.JSONDecodeError) as error:
        if isinstance(error, BackboneError):
            raise
        raise BackboneError(
            f"{place} cannot be read as a network of the library transformers ({str(error).strip().splitlines()[0]}): give a folder "
            f"with config.json and model.safetensors, or {PREFIX}OWNER/NAME where there is a network."
        ) from None
    size: int | str = 640  # as published
    mean, std = [0.0] * 3, [1.0] * 3
    try:
        processor: Any = AutoImageProcessor.from_pretrained(place)
    except (OSError, ValueError):
        processor = None
    if processor is not None:
        height, width = (int((processor.size or {}).get(side, 640)) for side in ("height", "width"))
        size = height if height == width else f"{height}x{width}"
        if processor.do_normalize:
            mean, std = [*processor.image_mean], [*processor.image_std]
    body, plain = config.backbone_config, RTDetrResNetConfig()
    shape = ("layer_type", "embedding_size", "hidden_sizes", "hidden_act", "downsample_in_first_stage", "downsample_in_bottleneck",
             "num_channels")  # fmt: skip
    backbone = BACKBONES.get(tuple(getattr(body, "depths", ())))
    unlike = [f"backbone_config.{name}" for name in shape if getattr(body, name, None) != getattr(plain, name)]
    unlike += [] if backbone else ["backbone_config.depths"]
    names = [config.id2label[k] for k in range(config.num_labels)]
    options = {
        "strides": list(config.feat_strides), "width": config.d_model, "queries": config.num_queries, "layers": config.decoder_layers,
        "denoising": config.num_denoising,
    }  # fmt: skip
    if not unlike:
        info_only = type(
            "Maps", (), {"channels": lambda _: [256, 512, 1024, 2048], "reduction": lambda _: [4, 8, 16, 32]}
        )()
        ours = RTDETR(type("Backbone", (), {"feature_info": info_only})(), len(names), size, **options).net.config
        unlike = [
            name
            for name in LIKE_OURS
            if _plain(getattr(config, name, getattr(ours, name))) != _plain(getattr(ours, name))
        ]
    if unlike or info["missing_keys"] or info["mismatched_keys"]:
        raise BackboneError(
            f"{place} is an RT-DETR that cannot be taken over as a whole: it differs in {', '.join(unlike) or 'its weights'}. "
            "Those on ResNet-50 can, such as hf-hub:PekingU/rtdetr_v2_r50vd."
        )
    architecture = {
        "num_classes": len(names), "label_names": names, "in_chans": 3, "image_size": size, "fit": "stretch",
        "backbone": backbone,
        "backbone_options": {"small_stem": False, "pretrained_cfg_overlay": {"mean": mean, "std": std}},
        "detector": {"class_path": "modules.detection.RTDETR", "init_args": options},
    }  # fmt: skip
    weights = {_named(key): value for key, value in model.state_dict().items() if key.startswith("model.")}
    return Published("DetectionModule", architecture, weights, LICENCE)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _named(key: str) -> str:
    """Converts the name of a parameter."""
    begin, place = next((found, place) for pattern, place in PLACES if (found := re.match(pattern, key)))
    *numbers, kind = begin.groups() or ("",)
    norm = kind == "normalization"
    if "conv1" in place:
        numbers = [3 * int(numbers[0]) + norm]
    elif "downsample" in place:
        numbers = [int(numbers[0]) + 1, numbers[1], 1 + norm]
    elif numbers:
        numbers = [int(numbers[0]) + 1, numbers[1], "bn" if norm else "conv", int(numbers[2]) + 1]
    return place.format(*numbers) + key[begin.end() :]
