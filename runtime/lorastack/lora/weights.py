"""An adapter's LoRA weights as views of its flat buffer. Nothing is copied."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lorastack.kernels.packing import view, view_run
from lorastack.kernels.segmented_lora import GroupLora, TargetLora
from lorastack.layout import (
    EMBED,
    GROUPS,
    HEADS,
    LM_HEAD,
    NO_LAYER,
    AdapterLayout,
    Part,
)

# lm_head is applied like a group of one; embed_tokens is a lookup and stands alone.
LM_HEAD_GROUP = (NO_LAYER, len(GROUPS))


@dataclass(frozen=True, slots=True)
class EmbeddingLora:
    """embed_tokens: a token's update is scale * B @ A[:, token]."""

    a_RV: Tensor
    b_HR: Tensor
    scale: float

    @property
    def group(self) -> GroupLora:
        """The same as a group of one, whose A is [rank, V]."""
        target = TargetLora(0, slice(0, len(self.a_RV)), self.b_HR, self.scale)
        return GroupLora(self.a_RV, (target,))


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class LoraWeights:
    """An adapter's LoRA. groups: by (layer, index into GROUPS) or LM_HEAD_GROUP, if adapted.
    digest: the adapter's, by which devices that share a model know it.

    Compared by identity, so it can be the weak key of what is derived from it.
    """

    groups: Mapping[tuple[int, int], GroupLora]
    embedding: EmbeddingLora | None
    digest: str = ""

    @classmethod
    def from_buffer(cls, buffer: Tensor, layout: AdapterLayout, digest: str = "") -> LoraWeights:
        """Views of `buffer`, which they keep alive. Empty for an adapter of heads only."""
        groups: dict[tuple[int, int], GroupLora] = {}
        for layer in sorted({layer for layer, target, _ in layout.slots if target != HEADS}):
            for index, group in enumerate((*GROUPS, (LM_HEAD,))):
                if weights := _group(buffer, layout, layer, group):
                    groups[layer, index] = weights
        return cls(groups, _embedding(buffer, layout), digest)


def _group(
    buffer: Tensor, layout: AdapterLayout, layer: int, group: tuple[str, ...]
) -> GroupLora | None:
    present = [target for target in group if (layer, target, Part.A) in layout.slots]
    if not present:
        return None
    targets: list[TargetLora] = []
    start = 0
    for target in present:
        b_OR = view(buffer, layout, (layer, target, Part.B))
        rank = slice(start, start + b_OR.shape[1])
        start = rank.stop
        targets.append(TargetLora(group.index(target), rank, b_OR, layout.scales[layer, target]))
    a_RI = view_run(buffer, layout, tuple((layer, target, Part.A) for target in present))
    return GroupLora(a_RI, tuple(targets))


def _embedding(buffer: Tensor, layout: AdapterLayout) -> EmbeddingLora | None:
    if (NO_LAYER, EMBED, Part.A) not in layout.slots:
        return None
    return EmbeddingLora(
        view(buffer, layout, (NO_LAYER, EMBED, Part.A)),
        view(buffer, layout, (NO_LAYER, EMBED, Part.B)),
        layout.scales[NO_LAYER, EMBED],
    )
