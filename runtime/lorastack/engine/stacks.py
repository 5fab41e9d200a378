"""The LoRAs of a step's rows as segments, over views of the adapters' buffers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from weakref import WeakKeyDictionary

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.engine.batch import RowStep
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights


class Stacks:
    """Keeps views into adapters' buffers, made once while an adapter is on the device."""

    def __init__(self) -> None:
        self._views: WeakKeyDictionary[DeviceAdapter, LoraWeights] = WeakKeyDictionary()

    def weights(self, adapter: DeviceAdapter) -> LoraWeights:
        """The adapter's LoRA, views of its buffer."""
        if adapter not in self._views:
            self._views[adapter] = LoraWeights.from_buffer(
                adapter.buffer, adapter.layout, adapter.digest
            )
        return self._views[adapter]

    def segments(self, steps: Sequence[RowStep], counts: Sequence[int]) -> LoraBatch:
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
                    Segment(start=start, end=end, weights=self.weights(adapter), scale=use.scale)
                )
            start = end
        return LoraBatch(tuple(segments))
