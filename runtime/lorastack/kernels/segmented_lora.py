"""Segmented LoRA: every slice of a step's tokens gets its own low-rank update.

Contract. For each segment and each target of its group

    outs[target][start:end] += scale * (x[start:end] @ A_t.T) @ B_t.T

in place, where A_t is the target's rank slice of the group's joined A, and scale is the target's
times the segment's. Segments may come in any order, be empty, differ in rank, leave tokens out (the
base model's rows) and overlap (a stack: the updates add up, in the order given). Nothing is padded.
x and all A and B have one dtype; an output may have another (lm_head's is float32). An output's
rows may be strided, its columns must not be. A scale that the output's dtype cannot hold is
infinite, so that its own tokens alone are not finite.

Source: the batched LoRA of Punica (SGMV), with plain slices for indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetLora:
    """One target of a group. index: its place in the group; rank: its rows of the group's A."""

    index: int
    rank: slice
    b_OR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class GroupLora:
    """An adapter's targets in one group and their joined A, [sum of ranks, in]."""

    a_RI: Tensor
    targets: tuple[TargetLora, ...]


GroupSegment: TypeAlias = tuple[int, int, float, GroupLora]  # start, end, scale, weights


def segmented_lora(x_TI: Tensor, outs: Sequence[Tensor], segments: Iterable[GroupSegment]) -> None:
    """See the module. outs: by the target's index. One shrink a segment, one expand a target."""
    for start, end, scale, group in segments:
        if start == end:
            continue
        shrunk_TR = x_TI[start:end] @ group.a_RI.t()
        for target in group.targets:
            out_TO = outs[target.index][start:end]
            part_TR = shrunk_TR[:, target.rank]
            alpha = held(target.scale * scale, out_TO.dtype)
            if out_TO.dtype == part_TR.dtype:
                out_TO.addmm_(part_TR, target.b_OR.t(), alpha=alpha)
            else:
                out_TO.add_(part_TR @ target.b_OR.t(), alpha=alpha)


def held(scale: float, dtype: torch.dtype) -> float:
    """The scale; infinity of its sign where the dtype cannot hold it, as torch would raise."""
    return scale if abs(scale) <= torch.finfo(dtype).max else math.copysign(math.inf, scale)


def segmented_lora_reference(
    x_TI: Tensor, outs: Sequence[Tensor], segments: Iterable[GroupSegment]
) -> None:
    """The contract token by token, in float64."""
    for start, end, scale, group in segments:
        for token in range(start, end):
            x_I = x_TI[token].double()
            for target in group.targets:
                a_RI = group.a_RI[target.rank].double()
                delta_O = target.scale * scale * (target.b_OR.double() @ (a_RI @ x_I))
                outs[target.index][token] += delta_O.to(outs[target.index].dtype)
