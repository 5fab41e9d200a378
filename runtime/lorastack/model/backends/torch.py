"""A step in plain torch, on any device."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import embedding, rms_norm, silu

from lorastack.kernels.attention import AttentionPlan, attend
from lorastack.kernels.attention_plan import plan_attention
from lorastack.kernels.linear import (
    Dense,
    copy_rows,
    linear,
    linear_wide,
    pack_dense,
    plain_weight,
)
from lorastack.kernels.ops import Ops
from lorastack.kernels.quantize import Kind, head_kind
from lorastack.kernels.upload import upload
from lorastack.lora.linear import add_embedding, add_group, add_lm_head
from lorastack.lora.segments import LoraBatch
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.accept import accept_trees
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.config import DecoderConfig
from lorastack.model.context import ForwardBatch, Outputs, SampledTree
from lorastack.model.kv import KVCache
from lorastack.model.weights import DecoderWeights, LayerWeights, Packing, load_weights

QKV, O, GATE_UP, DOWN = range(4)  # noqa: E741  indices into layout.GROUPS


@dataclass(frozen=True, slots=True)
class StepMeta:
    """A step on the device, all that is known of it before its first layer.

    outputs_X: places of the tokens whose results are wanted. sin_T1D: with its first half negated,
    see `_rotate`.
    """

    token_ids_T: Tensor
    outputs_X: Tensor
    plan: AttentionPlan
    cos_T1D: Tensor
    sin_T1D: Tensor


class TorchBackend:
    """See `Backend`; with plain `Ops` the reference for every other one."""

    name = "torch"
    overlaps = False

    def __init__(
        self,
        config: DecoderConfig,
        weights: DecoderWeights[Dense],
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        kind: Kind | None = None,
    ) -> None:
        """kind: what the weights are quantised to."""
        self.shapes = shapes = config.shapes
        self.device = device
        self.dtype = dtype
        self.quantization = "" if kind is None else kind.value
        self.dynamic_rope_begin = config.dynamic_rope_begin
        self.ops = ops
        self._weights = weights
        self._tied = shapes.tie_word_embeddings and weights.lm_head.scales is None
        self._eps = config.rms_eps
        self._window = config.window
        self._rope_scale = config.rope_scale
        self._inv_freq = config.inv_freq.to(device)
        self._num_heads = shapes.num_heads
        self._head_dim = shapes.head_dim
        self._query_size = shapes.num_heads * shapes.head_dim
        self._key_size = shapes.num_kv_heads * shapes.head_dim

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        config: DecoderConfig,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        kind: Kind | None = None,
    ) -> TorchBackend:
        """kind: what weights are quantised to. Raises what `load_weights` raises."""
        dense = partial(pack_dense, kind=kind, quantise=ops.quantise)
        head = partial(pack_dense, kind=head_kind(kind), quantise=ops.quantise)
        packing = Packing(dense, pair=dense, head=head, copies=kind is not None)
        weights = load_weights(checkpoint, config, device=device, dtype=dtype, packing=packing)
        return cls(config, weights, device, dtype, ops, kind)

    def make_kv(self, num_pages: int, page_size: int) -> KVCache:
        """See `Backend`."""
        return KVCache(self.shapes, num_pages, page_size, self.dtype, self.device)

    def prepare(self, kv: KVCache) -> None:
        """See `Backend`."""

    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """See `Backend`."""
        return self.outputs(*self.compute(batch, kv), batch.trees)

    def compute(self, batch: ForwardBatch, kv: KVCache) -> tuple[Tensor, Tensor]:
        """The states and logits of `Outputs`: what devices that share a model do together."""
        meta = self._prepare(batch, kv)
        hidden_TH = self._embed(meta.token_ids_T)
        add_embedding(meta.token_ids_T, hidden_TH, batch.lora)
        for layer in self._weights.layers:
            hidden_TH = self._layer(hidden_TH, layer, batch.lora, kv, meta)
        hidden_XH = hidden_TH[meta.outputs_X]
        hidden_XH = rms_norm(hidden_XH, (hidden_XH.shape[-1],), self._weights.norm, self._eps)
        logits_XV = self.logits(hidden_XH, batch.lora.select(batch.outputs))
        if not batch.outputs:
            hidden_TH[-1, 0].item()  # waits: a step that ends later than its call cannot be timed
        return hidden_XH, logits_XV

    def outputs(
        self, hidden_XH: Tensor, logits_XV: Tensor, trees: Sequence[SampledTree]
    ) -> Outputs:
        """What `forward` makes of what `compute` gives."""
        peaks_X, best_X = _download(*self.ops.best(logits_XV))
        accepted = accept_trees(self.ops, logits_XV, best_X, trees)
        return Outputs(hidden_XH, logits_XV, peaks_X, best_X, accepted)

    def logits(self, hidden_XH: Tensor, lora: LoraBatch) -> Tensor:
        """See `Backend`."""
        logits_XV = linear_wide(hidden_XH, self._weights.lm_head)
        add_lm_head(hidden_XH, logits_XV, lora)
        return logits_XV

    def head_rows(self, ids: Sequence[int], out_NH: Tensor) -> None:
        """See `Backend`."""
        weight_VH = self._weights.embed_VH if self._tied else plain_weight(self._weights.lm_head)
        copy_rows(weight_VH.__getitem__, torch.tensor(ids), out_NH)

    def adopt(self, lora: LoraWeights) -> None:
        """See `Backend`. Steps read its tensors alone."""

    def _prepare(self, batch: ForwardBatch, kv: KVCache) -> StepMeta:
        """Brings the step to the device in one copy. Clears pages that rows begin to fill."""
        share, window = self._query_size // self._key_size, self._window
        host = plan_attention(batch.rows, page_size=kv.page_size, share=share, window=window)
        prompt_ends = self._prompt_ends(batch)
        numbers = [batch.token_ids, batch.outputs, prompt_ends, *host.parts]
        parts = iter(upload(numbers, self._inv_freq.device))
        token_ids_T, outputs_X, prompt_ends_T = (next(parts) for _ in range(3))
        plan = host.placed(parts, self.dtype)
        kv.clear(plan.fresh_pages)
        frequency = self._inv_freq
        if prompt_ends:
            frequency = frequency[torch.maximum(plan.positions_T, prompt_ends_T)]
        angle_TF = plan.positions_T[:, None].float() * frequency
        cos_TF, sin_TF = angle_TF.cos(), angle_TF.sin()
        cos_T1D = torch.cat((cos_TF, cos_TF), dim=-1).mul_(self._rope_scale)[:, None]
        sin_T1D = torch.cat((-sin_TF, sin_TF), dim=-1).mul_(self._rope_scale)[:, None]
        cos_T1D, sin_T1D = cos_T1D.to(self.dtype), sin_T1D.to(self.dtype)
        return StepMeta(token_ids_T, outputs_X, plan, cos_T1D, sin_T1D)

    def _prompt_ends(self, batch: ForwardBatch) -> list[int]:
        """Each token's prompt's last position, where dynamic RoPE asks for it: see `model.rope`."""
        if self.dynamic_rope_begin is None:
            return []
        return [row.prompt - 1 for row in batch.rows for _ in range(row.num_tokens)]

    def _layer(
        self,
        hidden_TH: Tensor,
        weights: LayerWeights[Dense],
        lora: LoraBatch,
        kv: KVCache,
        meta: StepMeta,
    ) -> Tensor:
        """One decoder layer; adds to hidden_TH in place and returns it."""
        index, size = weights.index, (hidden_TH.shape[-1],)
        x_TH = rms_norm(hidden_TH, size, weights.attention_norm, self._eps)
        qkv = linear(x_TH, weights.qkv)
        sizes = [self._query_size, self._key_size, self._key_size]
        add_group(x_TH, qkv.split_with_sizes(sizes, 1), lora, index, QKV)
        self._rotate(qkv, meta)
        kv.write(index, meta.plan.slots_T, qkv[:, self._query_size :])
        q_THD = qkv[:, : self._query_size].view(-1, self._num_heads, self._head_dim)
        context_TI = attend(q_THD, kv.data[index], meta.plan)
        self._add_dense(hidden_TH, context_TI, weights.o, lora, index, O)

        x_TH = rms_norm(hidden_TH, size, weights.mlp_norm, self._eps)
        gate_up = linear(x_TH, weights.gate_up)
        gate_TI, up_TI = gate_up.chunk(2, dim=1)
        add_group(x_TH, (gate_TI, up_TI), lora, index, GATE_UP)
        inner_TI = silu(gate_TI).mul_(up_TI)
        self._add_dense(hidden_TH, inner_TI, weights.down, lora, index, DOWN)
        return hidden_TH

    def _embed(self, token_ids_T: Tensor) -> Tensor:
        return embedding(token_ids_T, self._weights.embed_VH)

    def _add_dense(
        self,
        hidden_TH: Tensor,
        x_TI: Tensor,
        weight: Dense,
        lora: LoraBatch,
        layer: int,
        group: int,
    ) -> None:
        """Adds a projection back to the hidden size, and its LoRAs, to hidden_TH in place."""
        hidden_TH += linear(x_TI, weight)
        add_group(x_TI, (hidden_TH,), lora, layer, group)

    def _rotate(self, qkv: Tensor, meta: StepMeta) -> None:
        """RoPE on queries and keys, in place: x * cos + (second half negated, first half) * sin.

        Rolling by half a head swaps the halves; the sign is already in sin.
        """
        qk_TND = qkv[:, : self._query_size + self._key_size].view(len(qkv), -1, self._head_dim)
        swapped_TND = qk_TND.roll(self._head_dim // 2, -1)
        qk_TND.mul_(meta.cos_T1D).addcmul_(swapped_TND, meta.sin_T1D)


def _download(peaks_X: Tensor, best_X: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the host, in one copy: float64 holds either exactly."""
    found_2X = torch.stack((peaks_X.double(), best_X.double())).cpu()
    return found_2X[0].to(peaks_X.dtype), found_2X[1].to(best_X.dtype)
