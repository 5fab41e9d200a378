"""Adapters' tensors as plain dictionaries: from their files, and into a buffer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from lorastack.adapters.formats.dtypes import DTYPES
from lorastack.adapters.formats.parse import ParsedAdapter
from lorastack.kernels.packing import allocate, view
from lorastack.layout import EMBED, LM_HEAD, NO_LAYER, AdapterLayout, ModelShapes, Part, TensorKey
from lorastack.lora.weights import LoraWeights
from tests.helpers.adapters import lora_tensor_names


def pack(
    tensors: Mapping[TensorKey, Tensor],
    scales: Mapping[tuple[int, str], float],
    num_heads: int,
    dtype: torch.dtype,
    draft_vocabulary: tuple[int, ...] = (),
) -> tuple[AdapterLayout, Tensor]:
    """A buffer with these tensors in it."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layout, buffer = allocate(shapes, scales, num_heads, draft_vocabulary, dtype=dtype)
    for key, tensor in tensors.items():
        view(buffer, layout, key).copy_(tensor)
    return layout, buffer


def read_tensors(parsed: ParsedAdapter) -> dict[TensorKey, Tensor]:
    """The adapter's tensors in their stored dtypes and shapes."""
    tensors = {}
    for key, entry in parsed.tensors.items():
        data = np.fromfile(entry.path, np.uint8, entry.nbytes, offset=entry.offset)
        tensors[key] = torch.from_numpy(data).view(DTYPES[entry.dtype]).reshape(entry.shape)
    return tensors


def read_weights(
    folder: Path, shapes: ModelShapes, dtype: torch.dtype = torch.float32
) -> LoraWeights:
    """A written LoRA folder, packed and viewed, without the code of `adapters`."""
    layout, buffer = read_packed(folder, shapes, dtype)
    return LoraWeights.from_buffer(buffer, layout)


def read_packed(
    folder: Path, shapes: ModelShapes, dtype: torch.dtype = torch.float32
) -> tuple[AdapterLayout, Tensor]:
    """Its buffer."""
    config = json.loads((folder / "adapter_config.json").read_text())
    stored = load_file(folder / "adapter_model.safetensors")
    rank, alpha = config["r"], config["lora_alpha"]
    tensors: dict[TensorKey, Tensor] = {}
    scales: dict[tuple[int, str], float] = {}
    for target in config["target_modules"]:
        once = target in (EMBED, LM_HEAD)
        for layer in (NO_LAYER,) if once else range(shapes.num_layers):
            a, b = lora_tensor_names(layer, target)
            if a in stored:
                tensors[layer, target, Part.A] = stored[a]
                tensors[layer, target, Part.B] = stored[b]
                scales[layer, target] = alpha / rank
    return pack(tensors, scales, 0, dtype)
