"""Medusa v2 heads applied to a batch: r_k = x + SiLU(W_k x + b_k), logits = lm_head(r_k).

Shape suffixes: B rows, K heads, H hidden, V vocabulary, X any rows, R ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lorastack.layout import HEADS, AdapterLayout, Part
from lorastack.speculation.tree import Choices


@dataclass(frozen=True, slots=True)
class HeadsWeights:
    """Views into an adapter's buffer: its Medusa heads. choices: its own tree, () for none."""

    weight_KHH: Tensor
    bias_KH: Tensor
    choices: Choices

    @property
    def num_heads(self) -> int:
        return self.weight_KHH.shape[0]

    @staticmethod
    def from_buffer(buffer: Tensor, layout: AdapterLayout) -> HeadsWeights:
        """Nothing is copied. buffer: flat, as `layout` describes; it must hold heads."""
        return HeadsWeights(
            _stacked(buffer, layout, Part.WEIGHT),
            _stacked(buffer, layout, Part.BIAS),
            layout.choices,
        )


def _stacked(buffer: Tensor, layout: AdapterLayout, part: Part) -> Tensor:
    """One view [K, ...] over the adjacent tensors of all heads."""
    slots = [layout.slots[head, HEADS, part] for head in range(layout.num_heads)]
    start, shape, size = slots[0].offset, slots[0].shape, math.prod(slots[0].shape)
    for head, slot in enumerate(slots):
        assert slot.offset == slots[0].offset + head * size, (
            f"{part} of head {head} is not adjacent"
        )
    start = slots[0].offset
    return buffer[start : start + len(slots) * size].view(len(slots), *shape)


def apply_heads(hidden_BH: Tensor, groups: Sequence[tuple[slice, HeadsWeights]]) -> Tensor:
    """Every row's heads, [sum of rows x heads, H], ordered by (row, head).

    groups: (rows that share these heads, the heads); rows in no group have none and give none.
    Head counts may differ between groups. One matmul a group.
    """
    parts_XH = []
    for rows, heads in groups:
        x_BH = hidden_BH[rows]
        num_heads, size, _ = heads.weight_KHH.shape
        block_BX = linear(x_BH, heads.weight_KHH.view(-1, size), heads.bias_KH.view(-1))
        r_BKH = x_BH[:, None] + silu(block_BX).view(-1, num_heads, size)
        parts_XH.append(r_BKH.view(-1, size))
    return torch.cat(parts_XH) if parts_XH else hidden_BH[:0]


def apply_heads_reference(
    hidden_BH: Tensor, groups: Sequence[tuple[slice, HeadsWeights]]
) -> Tensor:
    """What `apply_heads` computes, one head of one row at a time."""
    outputs_H = [
        x_H + silu(heads.weight_KHH[head] @ x_H + heads.bias_KH[head])
        for rows, heads in groups
        for x_H in hidden_BH[rows]
        for head in range(heads.num_heads)
    ]
    return torch.stack(outputs_H) if outputs_H else hidden_BH[:0]


def top_candidates(logits_XV: Tensor, num: int) -> Tensor:
    """The `num` best token ids of each row, int64 [X, num], best first, ties to the lowest id.

    num: at most V.
    """
    size = logits_XV.shape[1]
    values_XR, ids_XR = logits_XV.topk(min(num + 1, size))
    tied_X = values_XR[:, num - 1] == values_XR[:, -1] if num < size else None
    ids_XR = _ordered(logits_XV, ids_XR[:, :num])
    if tied_X is not None:
        # topk cuts a tie anywhere: take those rows' lowest ids at the cut instead.
        for row in tied_X.nonzero()[:, 0].tolist():
            logits_V, cut = logits_XV[row], values_XR[row, num - 1]
            above = (logits_V > cut).nonzero()[:, 0]
            level = (logits_V == cut).nonzero()[: num - len(above), 0]
            ids_XR[row] = _ordered(logits_V[None], torch.cat([above, level])[None])[0]
    return ids_XR


def _ordered(logits_XV: Tensor, ids_XR: Tensor) -> Tensor:
    """The same ids by falling logit, then rising id."""
    ids_XR = ids_XR.sort(dim=-1).values
    order_XR = logits_XV.gather(1, ids_XR).argsort(dim=-1, descending=True, stable=True)
    return ids_XR.gather(1, order_XR)
