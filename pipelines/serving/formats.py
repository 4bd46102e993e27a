"""What a model is exported as."""

from typing import Literal

Format = Literal["onnx", "torchscript", "pt2", "safetensors"]
Precision = Literal["fp16", "int8"]
SUFFIXES: dict[str, Format] = {".onnx": "onnx", ".pt": "torchscript", ".pt2": "pt2", ".safetensors": "safetensors"}
