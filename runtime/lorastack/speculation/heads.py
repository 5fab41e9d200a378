"""Medusa heads applied to a batch: r = x, then r + SiLU(W r + b) for each block, then logits.

Logits of version 2 heads are lm_head(r), the base model's (the caller's business); those of
version 1 are r through the head's own output matrix, whatever a row's LoRA does to lm_head.

Shape suffixes: B rows, K heads, L blocks a head, H hidden, V vocabulary, X any rows, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from lorastack.kernels.packing import view_run
from lorastack.layout import HEADS, AdapterLayout, Part
from lorastack.speculation.tree import Choices


@dataclass(frozen=True, slots=True)
class HeadsWeights:
    """Views into an adapter's buffer: its Medusa heads. choices: its own tree, () for none."""

    weight_LKHH: Tensor
    bias_LKH: Tensor
    output_KVH: Tensor | None  # version 1's; None: the base model's lm_head serves
    choices: Choices

    @property
    def num_heads(self) -> int:
        return self.bias_LKH.shape[1]

    @staticmethod
    def from_buffer(buffer: Tensor, layout: AdapterLayout) -> HeadsWeights:
        """Nothing is copied. buffer: flat, as `layout` describes; it must hold heads."""
        weight_XH = _rows(buffer, layout, Part.WEIGHT)
        num_heads, size = layout.num_heads, weight_XH.shape[1]
        output_KVH = None
        if own_outputs(layout):
            output_KVH = _rows(buffer, layout, Part.OUTPUT).view(num_heads, -1, size)
        return HeadsWeights(
            weight_XH.view(-1, num_heads, size, size),
            _rows(buffer, layout, Part.BIAS).view(-1, num_heads, size),
            output_KVH,
            layout.choices,
        )


def own_outputs(layout: AdapterLayout) -> bool:
    """Whether these are version 1 heads, with an output matrix each."""
    return (0, HEADS, Part.OUTPUT) in layout.slots


def _rows(buffer: Tensor, layout: AdapterLayout, part: Part) -> Tensor:
    """One view over the adjacent tensors of one part, joined along their first dimension."""
    keys = sorted(key for key in layout.slots if key[1:] == (HEADS, part))
    return view_run(buffer, layout, tuple(keys))


def apply_heads(hidden_BH: Tensor, groups: Sequence[tuple[slice, HeadsWeights]]) -> Tensor:
    """Every row's heads, [sum of rows x heads, H], ordered by (row, head).

    groups: (rows that share these heads, the heads); rows in no group have none and give none.
    Head and block counts may differ between groups. One matmul a group and block.
    """
    parts_XH = []
    for rows, heads in groups:
        x_BH = hidden_BH[rows]
        size = x_BH.shape[1]
        # The first blocks of all heads read the same state: one plain matmul.
        weight_XH, bias_X = heads.weight_LKHH[0].view(-1, size), heads.bias_LKH[0].view(-1)
        block_BKH = linear(x_BH, weight_XH, bias_X).view(-1, heads.num_heads, size)
        r_BKH = x_BH[:, None] + silu(block_BKH)
        for weight_KHH, bias_KH in zip(heads.weight_LKHH[1:], heads.bias_LKH[1:], strict=True):
            r_BKH = r_BKH + silu(torch.einsum("bki,koi->bko", r_BKH, weight_KHH) + bias_KH)
        parts_XH.append(r_BKH.view(-1, size))
    return torch.cat(parts_XH) if parts_XH else hidden_BH[:0]


def apply_heads_reference(
    hidden_BH: Tensor, groups: Sequence[tuple[slice, HeadsWeights]]
) -> Tensor:
    """What `apply_heads` computes, one block of one head of one row at a time."""
    outputs_H = []
    for rows, heads in groups:
        for x_H in hidden_BH[rows]:
            for head in range(heads.num_heads):
                r_H = x_H
                for weight_KHH, bias_KH in zip(heads.weight_LKHH, heads.bias_LKH, strict=True):
                    r_H = r_H + silu(weight_KHH[head] @ r_H + bias_KH[head])
                outputs_H.append(r_H)
    return torch.stack(outputs_H) if outputs_H else hidden_BH[:0]


def output_logits(r_XH: Tensor, output_KVH: Tensor) -> Tensor:
    """float32 [X, V] of version 1 heads. r_XH: rows of `apply_heads`, ordered by (row, head)."""
    num_heads, _, size = output_KVH.shape
    logits_BKV = torch.einsum("bkh,kvh->bkv", r_XH.view(-1, num_heads, size), output_KVH)
    return logits_BKV.reshape(len(r_XH), -1).float()


def output_logits_reference(r_XH: Tensor, output_KVH: Tensor) -> Tensor:
    """What `output_logits` computes, one row at a time."""
    return torch.stack(
        [output_KVH[row % len(output_KVH)] @ r_H for row, r_H in enumerate(r_XH)]
    ).float()


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
