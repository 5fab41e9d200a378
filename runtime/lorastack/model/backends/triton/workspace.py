"""Memory of a step on the device, made once: a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lorastack.kernels.triton.attention import AttentionWorkspace
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.samples import num_spans
from lorastack.kernels.triton.weight import Weight
from lorastack.layout import ModelShapes
from lorastack.model.weights import DecoderWeights

MAX_PARTS = 512  # of attention, or as many as the longest row has splits


@dataclass(frozen=True, slots=True)
class Workspace:
    """For steps of up to T tokens. hidden_TH: float32. x_TH, hidden_XH, q_TX, context_TX and
    inner_TI are of the model's dtype; parts and logits float32, flat.
    """

    hidden_TH: Tensor
    x_TH: Tensor
    hidden_XH: Tensor
    q_TX: Tensor
    context_TX: Tensor
    inner_TI: Tensor
    parts: Tensor
    logits: Tensor
    keys_XS: Tensor

    @classmethod
    def of(
        cls,
        shapes: ModelShapes,
        weights: DecoderWeights[Weight],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Workspace:
        query = shapes.num_heads * shapes.head_dim

        def room(size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(tokens, size, dtype=dtype, device=device)

        layer = weights.layers[0]
        most = max(
            _parts_numel(each, tokens) for each in (layer.qkv, layer.o, layer.gate_up, layer.down)
        )
        return cls(
            hidden_TH=room(shapes.hidden_size, torch.float32),
            x_TH=room(shapes.hidden_size),
            hidden_XH=room(shapes.hidden_size),
            q_TX=room(query),
            context_TX=room(query),
            inner_TI=room(shapes.intermediate_size),
            parts=torch.zeros(most, device=device),
            logits=torch.zeros(_parts_numel(weights.lm_head, tokens), device=device),
            keys_XS=room(num_spans(shapes.vocab_size), torch.int64),
        )

    def parts_of(self, weight: Weight, bucket: int) -> Tensor:
        """[C, bucket, O] for a product with `weight`. All products share this memory."""
        return _parts(self.parts, weight, bucket)

    def logits_of(self, lm_head: Weight, bucket: int) -> Tensor:
        """[C, bucket, V]: the first becomes the sum of all."""
        return _parts(self.logits, lm_head, bucket)


def attention_workspace(
    shape: AttentionShape, max_context: int, programs: int, device: torch.device
) -> tuple[AttentionWorkspace, int]:
    """And the parts for which it has room."""
    max_parts = max(MAX_PARTS, -(-max_context // shape.split))
    return AttentionWorkspace.of(shape, max_parts, programs, device), max_parts


def _parts_numel(weight: Weight, tokens: int) -> int:
    """The most that a bucket of up to so many tokens takes."""
    spread = [bucket for bucket in (tokens, 64) if bucket <= tokens]
    return max(weight.plan.num_parts(bucket) * bucket for bucket in spread) * weight.num_outputs


def _parts(memory: Tensor, weight: Weight, bucket: int) -> Tensor:
    shape = (weight.plan.num_parts(bucket), bucket, weight.num_outputs)
    return memory[: shape[0] * shape[1] * shape[2]].view(shape)
