"""How much memory a model's weights take, known from its config.json alone."""

from __future__ import annotations

import torch

from lorastack.kernels.quantize import GROUP, Kind, head_kind
from lorastack.layout import LAYER_TARGETS, LM_HEAD, ModelShapes
from lorastack.model.config import DecoderConfig


def weights_nbytes(
    config: DecoderConfig, dtype: torch.dtype, kind: Kind | None, device: torch.device
) -> int:
    """Bytes at the height of loading: all weights, and the largest matrix as it is read.

    kind: what they are quantised to. Norms and biases, some KiB a layer, are left out.
    """
    shapes = config.shapes
    vocabulary = shapes.vocab_size * shapes.hidden_size
    largest = max(vocabulary, 2 * shapes.intermediate_size * shapes.hidden_size)
    total = step_nbytes(shapes, dtype, kind) + (vocabulary + largest) * dtype.itemsize
    if shapes.tie_word_embeddings and kind is None and device.type != "cpu":
        total -= vocabulary * dtype.itemsize  # lm_head is the embedding; else it is laid out again
    return total


def step_nbytes(shapes: ModelShapes, dtype: torch.dtype, kind: Kind | None = None) -> int:
    """Bytes of the matrices that a step reads: those of all layers, and lm_head."""
    layer = sum(_stored(*shapes.target_shape(target), dtype, kind) for target in LAYER_TARGETS)
    head = _stored(*shapes.target_shape(LM_HEAD), dtype, head_kind(kind))
    return shapes.num_layers * layer + head


def _stored(outputs: int, inputs: int, dtype: torch.dtype, kind: Kind | None) -> int:
    """Bytes of one matrix; the scales of a quantised one have 2 bytes each."""
    if kind is None:
        return outputs * inputs * dtype.itemsize
    if kind is Kind.INT8:
        return outputs * (inputs + 2)
    return outputs * (inputs // 2 + inputs // GROUP * 2)
