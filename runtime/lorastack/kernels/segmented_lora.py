"""Segmented LoRA: every slice of a step's tokens gets its own low-rank update.

Contract. For each segment and each of its targets

    outs[target][start:end] += scale * (x[start:end] @ A_t.T) @ B_t.T

in place, where A_t is the target's rank slice of the segment's fused A. Segments may come in any
order, be empty, differ in rank, leave tokens out (the base model's rows) and overlap (a stack: the
updates add up, in the order given). Nothing is padded. x and all A and B have one dtype; an output
may have another (lm_head's is float32). An output's rows may be strided, its columns must not be. A
scale that the output's dtype cannot hold is infinite, so that its own tokens alone are not finite.

Source: the batched LoRA of Punica (SGMV), with plain slices for indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SegmentTarget:
    """One target. index: into `outs`; rank: its rows of the fused A; b_OR: [out, r]."""

    index: int
    rank: slice
    b_OR: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class KernelSegment:
    """Tokens start..end and what they multiply with. a_RI: [sum of ranks, in]."""

    start: int
    end: int
    a_RI: Tensor
    targets: tuple[SegmentTarget, ...]


def segmented_lora(x_TI: Tensor, outs: Sequence[Tensor], segments: Iterable[KernelSegment]) -> None:
    """One shrink for all targets of a segment, one expand a target."""
    for segment in segments:
        if segment.start == segment.end:
            continue
        shrunk_TR = x_TI[segment.start : segment.end] @ segment.a_RI.t()
        for target in segment.targets:
            out_TO = outs[target.index][segment.start : segment.end]
            part_TR = shrunk_TR[:, target.rank]
            scale = held(target.scale, out_TO.dtype)
            if out_TO.dtype == part_TR.dtype:
                out_TO.addmm_(part_TR, target.b_OR.t(), alpha=scale)
            else:
                out_TO.add_(part_TR @ target.b_OR.t(), alpha=scale)


def held(scale: float, dtype: torch.dtype) -> float:
    """The scale, or infinity of its sign where the dtype cannot hold it: torch would raise."""
    return scale if abs(scale) <= torch.finfo(dtype).max else math.copysign(math.inf, scale)


def segmented_lora_reference(
    x_TI: Tensor, outs: Sequence[Tensor], segments: Iterable[KernelSegment]
) -> None:
    """The contract token by token, in float64."""
    for segment in segments:
        for token in range(segment.start, segment.end):
            x_I = x_TI[token].double()
            for target in segment.targets:
                a_RI = segment.a_RI[target.rank].double()
                delta_O = target.scale * (target.b_OR.double() @ (a_RI @ x_I))
                outs[target.index][token] += delta_O.to(outs[target.index].dtype)
