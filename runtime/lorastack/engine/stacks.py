"""The LoRAs of a step's rows as segments."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from lorastack.engine.batch import RowStep
from lorastack.engine.views import lora_views
from lorastack.lora.segments import LoraBatch, Segment


def lay_out_loras(steps: Sequence[RowStep], counts: Sequence[int]) -> LoraBatch:
    """Segments over rows of `counts` tokens each; neighbours with the same stack share them."""
    segments: list[Segment] = []
    start = 0
    pairs_by_stack = groupby(zip(steps, counts, strict=True), key=lambda pair: pair[0].stack)
    for _, group in pairs_by_stack:
        pairs = list(group)
        end = start + sum(count for _, count in pairs)
        first = pairs[0][0]
        for use, adapter in zip(first.request.loras, first.adapters.loras, strict=True):
            segments.append(
                Segment(start=start, end=end, weights=lora_views(adapter), scale=use.scale)
            )
        start = end
    return LoraBatch(tuple(segments))
