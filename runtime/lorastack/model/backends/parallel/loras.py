"""LoRAs on all shards: shard 0 hands each one on when a step first uses it.

Every shard has the whole of a LoRA and takes views of its part, so that the memory for adapters
counts the same bytes on every device. The heads of an adapter stay on shard 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.parallel.crew import Crew
from lorastack.model.backends.parallel.group import Group
from lorastack.model.backends.parallel.orders import Drop, Hold, Use
from lorastack.model.backends.parallel.shards import shard_lora


class _Held(NamedTuple):
    """number: what the other shards call it. part: what shard 0 applies."""

    number: int
    part: LoraWeights


class Lender:
    """Shard 0's side. A LoRA is held for as long as shard 0's own copy lives."""

    def __init__(self, group: Group, crew: Crew) -> None:
        self._group = group
        self._crew = crew
        self._held: WeakKeyDictionary[LoraWeights, _Held] = WeakKeyDictionary()
        self._count = 0
        self._gone: deque[int] = deque()  # any thread may append

    def lend(self, lora: LoraBatch) -> tuple[LoraBatch, tuple[Use, ...]]:
        """The batch for shard 0 and for the others, which hold all of its LoRAs then."""
        if self._gone:
            self._crew.send(Drop(tuple(self._gone.popleft() for _ in range(len(self._gone)))))
        segments, uses = [], []
        for segment in lora.segments:
            held = self._held.get(segment.weights) or self._hold(segment.weights)
            segments.append(replace(segment, weights=held.part))
            uses.append(Use(segment.start, segment.end, held.number, segment.scale))
        return LoraBatch(tuple(segments)), tuple(uses)

    def _hold(self, weights: LoraWeights) -> _Held:
        held = _Held(self._count, shard_lora(weights, self._group.shard))
        self._count += 1
        tensors = _tensors(weights)
        self._crew.send(Hold(held.number, _with(weights, [each.to("meta") for each in tensors])))
        self._group.broadcast(torch.cat([each.flatten() for each in tensors]))
        self._held[weights] = held
        finalize(weights, self._gone.append, held.number).atexit = False
        return held


class Borrower:
    """Another shard's side."""

    def __init__(self, group: Group, device: torch.device) -> None:
        self._group = group
        self._device = device
        self._parts: dict[int, LoraWeights] = {}

    def hold(self, order: Hold) -> None:
        """Takes part in the hand-over of a LoRA."""
        shapes = _tensors(order.weights)
        sizes = [each.numel() for each in shapes]
        flat = torch.empty(sum(sizes), dtype=shapes[0].dtype, device=self._device)
        self._group.broadcast(flat)
        views = [
            part.view(each.shape)
            for part, each in zip(torch.split(flat, sizes), shapes, strict=True)
        ]
        self._parts[order.number] = shard_lora(_with(order.weights, views), self._group.shard)

    def drop(self, numbers: Iterable[int]) -> None:
        """Lets go of LoRAs."""
        for number in numbers:
            del self._parts[number]

    def batch(self, uses: Iterable[Use]) -> LoraBatch:
        """The segments that an order means."""
        return LoraBatch(
            tuple(Segment(use.start, use.end, self._parts[use.number], use.scale) for use in uses)
        )


def _tensors(weights: LoraWeights) -> list[Tensor]:
    """All of a LoRA, in an order of its own."""
    tensors: list[Tensor] = []
    for group in weights.groups.values():
        tensors += (group.a_RI, *(target.b_OR for target in group.targets))
    if weights.embedding is not None:
        tensors += (weights.embedding.a_RV, weights.embedding.b_HR)
    return tensors


def _with(weights: LoraWeights, tensors: Iterable[Tensor]) -> LoraWeights:
    """The same LoRA made of other tensors, which are in the order of `_tensors`."""
    rest = iter(tensors)
    groups = {
        key: replace(
            group,
            a_RI=next(rest),
            targets=tuple(replace(target, b_OR=next(rest)) for target in group.targets),
        )
        for key, group in weights.groups.items()
    }
    embedding = weights.embedding
    if embedding is not None:
        embedding = replace(embedding, a_RV=next(rest), b_HR=next(rest))
    return LoraWeights(groups, embedding)
