"""Memory of a step on the device, made once: a step allocates nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from lorastack.kernels.triton.attention import AttentionWorkspace
from lorastack.kernels.triton.attention_plan import AttentionShape
from lorastack.kernels.triton.lora import CHUNK
from lorastack.kernels.triton.samples import num_spans
from lorastack.kernels.triton.weight import SPREAD_TOKENS, MatmulPlan, Weight
from lorastack.layout import ModelShapes

MAX_PARTS = 512  # of attention, or as many as the longest row has splits


class Multiplied(Protocol):
    """What memory needs to know of a weight."""

    @property
    def num_outputs(self) -> int: ...

    @property
    def plan(self) -> MatmulPlan: ...


Form = TypeVar("Form", bound=Multiplied, covariant=True)


@dataclass(frozen=True, slots=True)
class Products(Generic[Form]):
    """A model's weights: of a layer, in the order of `layout.GROUPS`, all layers being alike."""

    layer: tuple[Form, ...]
    lm_head: Form


@dataclass(frozen=True, slots=True)
class Workspace:
    """For steps of up to T tokens. hidden_TH: float32. x_TH, hidden_XH, q_TX, context_TX and
    inner_TI are of the model's dtype; parts, logits and deltas (of LoRAs) float32, flat. cos_TF,
    sin_TF, and each token's place, int32: for RoPE that is made for the step.
    """

    hidden_TH: Tensor
    x_TH: Tensor
    hidden_XH: Tensor
    q_TX: Tensor
    context_TX: Tensor
    inner_TI: Tensor
    parts: Tensor
    logits: Tensor
    deltas: Tensor
    keys_XS: Tensor
    cos_TF: Tensor
    sin_TF: Tensor
    places_T: Tensor

    @classmethod
    def of(
        cls,
        shapes: ModelShapes,
        products: Products[Multiplied],
        tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Workspace:
        query = shapes.num_heads * shapes.head_dim

        def room(size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(tokens, size, dtype=dtype, device=device)

        most = max(_parts_numel(each, tokens) for each in products.layer)
        widest = max(each.num_outputs for each in products.layer)
        return cls(
            hidden_TH=room(shapes.hidden_size, torch.float32),
            x_TH=room(shapes.hidden_size),
            hidden_XH=room(shapes.hidden_size),
            q_TX=room(query),
            context_TX=room(query),
            inner_TI=room(shapes.intermediate_size),
            parts=torch.zeros(most, device=device),
            logits=torch.zeros(_parts_numel(products.lm_head, tokens), device=device),
            deltas=torch.zeros(tokens * widest, device=device),
            keys_XS=room(num_spans(shapes.vocab_size), torch.int64),
            cos_TF=room(shapes.head_dim // 2, torch.float32),
            sin_TF=room(shapes.head_dim // 2, torch.float32),
            places_T=torch.arange(tokens, dtype=torch.int32, device=device),
        )

    def parts_of(self, weight: Weight, bucket: int) -> Tensor:
        """[C, bucket, O] for a product with `weight`. All products share this memory."""
        return _parts(self.parts, weight, bucket)

    def deltas_of(self, weight: Weight, bucket: int) -> Tensor:
        """[bucket, O] for what LoRAs add to a product with `weight`. All share this memory."""
        return self.deltas[: bucket * weight.num_outputs].view(bucket, weight.num_outputs)

    def logits_of(self, lm_head: Weight, bucket: int) -> Tensor:
        """[C, bucket, V]: the first becomes the sum of all."""
        return _parts(self.logits, lm_head, bucket)


class LoraMemory:
    """What steps with LoRAs need beside it, made when first asked for, and kept: graphs know where
    it lies."""

    def __init__(self, shapes: ModelShapes, device: torch.device) -> None:
        inputs = (shapes.hidden_size, shapes.num_heads * shapes.head_dim, shapes.intermediate_size)
        self._num_chunks = -(-max(inputs) // CHUNK)
        self._vocab_size = shapes.vocab_size
        self._device = device
        self._rooms: dict[int, Tensor] = {}
        self._logit_deltas: dict[int, Tensor] = {}

    def shrunk(self, room: int) -> Tensor:
        """[chunks, room], float32: the workspace of `lora.shrink`."""
        if room not in self._rooms:
            self._rooms[room] = torch.zeros(self._num_chunks, room, device=self._device)
        return self._rooms[room]

    def logit_deltas(self, tokens: int) -> Tensor:
        """[tokens, V], float32: what LoRAs of lm_head add."""
        if tokens not in self._logit_deltas:
            deltas_XV = torch.zeros(tokens, self._vocab_size, device=self._device)
            self._logit_deltas[tokens] = deltas_XV
        return self._logit_deltas[tokens]


def attention_workspace(
    shape: AttentionShape, max_context: int, programs: int, device: torch.device
) -> tuple[AttentionWorkspace, int]:
    """And the parts for which it has room."""
    max_parts = max(MAX_PARTS, -(-max_context // shape.split))
    return AttentionWorkspace.of(shape, max_parts, programs, device), max_parts


def _parts_numel(weight: Multiplied, tokens: int) -> int:
    """The most that a bucket of up to so many tokens takes."""
    spread = [bucket for bucket in (tokens, SPREAD_TOKENS) if bucket <= tokens]
    return max(weight.plan.num_parts(bucket) * bucket for bucket in spread) * weight.num_outputs


def _parts(memory: Tensor, weight: Weight, bucket: int) -> Tensor:
    shape = (weight.plan.num_parts(bucket), bucket, weight.num_outputs)
    return memory[: shape[0] * shape[1] * shape[2]].view(shape)
