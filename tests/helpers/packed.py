"""Adapters' tensors as plain dictionaries: from their files, and into a buffer."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from lorastack.adapters.formats import ParsedAdapter
from lorastack.adapters.medusa import Choices
from lorastack.adapters.reading import DTYPES
from lorastack.kernels.packing import allocate, view
from lorastack.layout import AdapterLayout, TensorKey


def pack(
    tensors: Mapping[TensorKey, Tensor],
    scales: Mapping[tuple[int, str], float],
    num_heads: int,
    choices: Choices,
    dtype: torch.dtype,
) -> tuple[AdapterLayout, Tensor]:
    """A buffer with these tensors in it."""
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    layout, buffer = allocate(shapes, scales, num_heads, choices, dtype=dtype)
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
