"""LoRAs on all shards: shard 0 hands each one on while it comes to its own device, beside steps.

A shard gets its part and no more, through a file in memory, and applies all of it. The heads of an
adapter stay on shard 0.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lorastack.layout import AdapterLayout
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.parallel.crew import Crew
from lorastack.model.backends.parallel.orders import Drop, Hold, Use
from lorastack.model.backends.parallel.shards import Shard, shard_lora


@dataclass(frozen=True, slots=True)
class HandOver:
    """See `adapters.memory.stream.Event`: done when all shards hold a LoRA."""

    future: Future[None]

    def done(self) -> bool:
        """Never waits; raises DeviceLostError for a shard that is lost."""
        if not self.future.done():
            return False
        self.future.result()
        return True


class Lender:
    """Shard 0's side, for the step thread. Between `hand_over` and `take_back` of an adapter steps
    may use it, once the event is done."""

    def __init__(self, shard: Shard, crew: Crew) -> None:
        self._own, *self._others = shard.all
        self._crew = crew
        self._numbers: dict[str, int] = {}  # what the other shards call an adapter's LoRA
        self._count = count()
        self._parts: WeakKeyDictionary[LoraWeights, LoraWeights] = WeakKeyDictionary()

    def hand_over(self, digest: str, buffer: Tensor, layout: AdapterLayout) -> HandOver:
        """Begins to; never waits. buffer: on the CPU, and as it is until the event is done."""
        number = self._numbers[digest] = next(self._count)
        return HandOver(self._crew.aside(partial(self._hold, number, buffer, layout)))

    def take_back(self, digest: str) -> None:
        """The other shards let go of it, in the order of the calls, and never of what a step that
        has begun uses."""
        order = Drop(self._numbers.pop(digest))
        self._crew.aside(lambda: self._crew.tell(order))

    def lend(self, lora: LoraBatch) -> tuple[LoraBatch, tuple[Use, ...]]:
        """A step's LoRAs for shard 0 and for the others."""
        segments, uses = [], []
        for segment in lora.segments:
            weights = segment.weights
            if weights not in self._parts:
                self._parts[weights] = shard_lora(weights, self._own)
            segments.append(replace(segment, weights=self._parts[weights]))
            number = self._numbers[weights.digest]
            uses.append(Use(segment.start, segment.end, number, segment.scale))
        return LoraBatch(tuple(segments)), tuple(uses)

    def _hold(self, number: int, buffer: Tensor, layout: AdapterLayout) -> None:
        whole = LoraWeights.from_buffer(buffer, layout)
        parts = [shard_lora(whole, shard) for shard in self._others]
        with ExitStack() as files:
            self._crew.tell(
                Hold(number, layout), [files.enter_context(_in_file(part)) for part in parts]
            )


class Borrower:
    """Another shard's side. What it holds changes in one thread, and steps read it in another."""

    def __init__(self, shard: Shard, dtype: torch.dtype, device: torch.device) -> None:
        """dtype: of all adapters."""
        self._shard = shard
        self._dtype = dtype
        self._device = device
        self._parts: dict[int, LoraWeights] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def hold(self, order: Hold, file: int) -> None:
        """Returns when the part is on the device. file: see `Hold`; it is closed."""
        whole = torch.empty(order.layout.num_elements, dtype=self._dtype, device="meta")
        part = shard_lora(LoraWeights.from_buffer(whole, order.layout), self._shard)
        views: list[Tensor] = []
        if shapes := _tensors(part):  # none of an adapter of heads alone
            sizes = [each.numel() for each in shapes]
            flat = _mapped(file, sum(sizes), self._dtype)
            if self._stream is not None:
                flat = self._to_device(flat, self._stream)
            split = zip(torch.split(flat, sizes), shapes, strict=True)
            views = [values.view(each.shape) for values, each in split]
        os.close(file)
        self._parts[order.number] = _with(part, views)

    def drop(self, order: Drop) -> None:
        """Lets go of a part; steps that have it keep it to their end."""
        del self._parts[order.number]

    def batch(self, uses: Iterable[Use]) -> LoraBatch:
        """The segments that an order means."""
        return LoraBatch(
            tuple(Segment(use.start, use.end, self._parts[use.number], use.scale) for use in uses)
        )

    def _to_device(self, host: Tensor, stream: torch.cuda.Stream) -> Tensor:
        """In a stream of its own, for which no step waits."""
        # Steps that are enqueued may still read what had this memory before.
        flat = torch.empty_like(host, device=self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            flat.copy_(host)
        stream.synchronize()
        return flat


@contextmanager
def _in_file(part: LoraWeights) -> Iterator[int]:
    """A file in memory with a part's values, open for as long as the context."""
    tensors = _tensors(part)
    file = os.memfd_create("lorastack-lora")
    try:
        if tensors:
            size = sum(each.numel() for each in tensors)
            os.ftruncate(file, size * tensors[0].itemsize)
            values = _mapped(file, size, tensors[0].dtype)
            torch.cat([each.flatten() for each in tensors], out=values)
        yield file
    finally:
        os.close(file)


def _mapped(file: int, size: int, dtype: torch.dtype) -> Tensor:
    """An open file as a tensor, which outlives it. size: elements."""
    return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=size, dtype=dtype)


def _tensors(weights: LoraWeights) -> list[Tensor]:
    """All of a LoRA, in an order of its own."""
    tensors: list[Tensor] = []
    for group in weights.groups.values():
        tensors += (group.a_RI, *(target.b_OR for target in group.targets))
    if weights.embedding is not None:
        tensors += (weights.embedding.a_RV, weights.embedding.b_HR)
    return tensors


def _with(weights: LoraWeights, tensors: Sequence[Tensor]) -> LoraWeights:
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
    return replace(weights, groups=groups, embedding=embedding)
