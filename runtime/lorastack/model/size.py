"""How much memory a model's weights take, known from its config.json alone."""

from __future__ import annotations

import torch

from lorastack.kernels.quantize import GROUP, Kind, head_kind
from lorastack.layout import LAYER_TARGETS, LM_HEAD
from lorastack.model.config import DecoderConfig


def weights_nbytes(
    config: DecoderConfig, dtype: torch.dtype, kind: Kind | None, device: torch.device
) -> int:
    """Bytes at the height of loading: all weights, and the largest matrix as it is read.

    kind: what they are quantised to. Norms and biases, some KiB a layer, are left out.
    """
    shapes = config.shapes
    vocabulary = shapes.vocab_size * shapes.hidden_size
    layer = sum(_stored(*shapes.target_shape(target), dtype, kind) for target in LAYER_TARGETS)
    head = _stored(*shapes.target_shape(LM_HEAD), dtype, head_kind(kind))
    if shapes.tie_word_embeddings and kind is None and device.type != "cpu":
        head = 0  # the embedding itself; elsewhere it is laid out once more
    largest = max(vocabulary, 2 * shapes.intermediate_size * shapes.hidden_size)
    return shapes.num_layers * layer + head + (vocabulary + largest) * dtype.itemsize


def _stored(outputs: int, inputs: int, dtype: torch.dtype, kind: Kind | None) -> int:
    """Of one matrix; quantised ones have scales of 2 bytes."""
    if kind is None:
        return outputs * inputs * dtype.itemsize
    if kind is Kind.INT8:
        return outputs * (inputs + 2)
    return outputs * (inputs // 2 + inputs // GROUP * 2)
