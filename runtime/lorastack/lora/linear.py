"""LoRA updates: what the decoder calls after each projection of the base model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from lorastack.kernels.segmented_lora import GroupSegment, held, segmented_lora
from lorastack.lora.segments import LoraBatch
from lorastack.lora.weights import LM_HEAD_GROUP


def add_group(
    x_TI: Tensor, outs: Sequence[Tensor], lora: LoraBatch, layer: int, group: int
) -> None:
    """Add the LoRA updates of GROUPS[group] of a layer to its outputs, in place.

    x_TI: the group's input; outs: one [T, O] tensor a target, in the group's order.
    """
    if lora:
        segmented_lora(x_TI, outs, _group_segments(lora, (layer, group)))


def add_lm_head(hidden_XH: Tensor, logits_XV: Tensor, lora: LoraBatch) -> None:
    """Add lm_head's LoRA updates in place. Segments index the X rows."""
    if lora:
        segmented_lora(hidden_XH, (logits_XV,), _group_segments(lora, LM_HEAD_GROUP))


def add_embedding(token_ids_T: Tensor, hidden_TH: Tensor, lora: LoraBatch) -> None:
    """Add embed_tokens' LoRA updates to the embedded tokens in place."""
    for segment in lora.segments:
        weights = segment.weights.embedding
        if weights is None or segment.start == segment.end:
            continue
        tokens = slice(segment.start, segment.end)
        # A matmul's bits may depend on the number of tokens; these do not.
        a_TR = weights.a_RV.t()[token_ids_T[tokens]].float()
        delta_TH = (a_TR[:, None] * weights.b_HR.float()).sum(-1)
        scale = held(weights.scale * segment.scale, hidden_TH.dtype)
        hidden_TH[tokens].add_(delta_TH, alpha=scale)


def _group_segments(lora: LoraBatch, key: tuple[int, int]) -> Iterator[GroupSegment]:
    """The segments whose LoRA adapts the group `key` of `LoraWeights.groups`."""
    for segment in lora.segments:
        if group := segment.weights.groups.get(key):
            yield segment.start, segment.end, segment.scale, group
