"""LoRAs on the way to other shards: their parts, their numbers, and when they go."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from lorastack.kernels.packing import allocate
from lorastack.lora.segments import LoraBatch, Segment
from lorastack.lora.weights import LoraWeights
from lorastack.model.backends.parallel.loras import Borrower, Lender, _tensors
from lorastack.model.backends.parallel.orders import Drop, Hold, Order
from lorastack.model.backends.parallel.shards import Shard, shard_lora
from tests.model.test_parallel import packed_lora

CPU = torch.device("cpu")


class Inline:
    """In place of `Crew`, for shards 1 and up of this process: jobs are done at once."""

    def __init__(self, count: int, dtype: torch.dtype = torch.float32) -> None:
        self.shards = [Borrower(shard, dtype, CPU) for shard in Shard(0, count).all[1:]]

    def aside(self, job: Callable[[], None]) -> Future[None]:
        future: Future[None] = Future()
        future.set_result(job())
        return future

    def tell(self, order: Order, files: Sequence[int] = ()) -> None:
        for index, shard in enumerate(self.shards):
            if isinstance(order, Hold):
                shard.hold(order, os.dup(files[index]))
            else:
                assert isinstance(order, Drop)
                shard.drop(order)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_shard_gets_its_part_of_a_lora_and_no_more(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype
) -> None:
    crew = Inline(4, dtype)
    lender = Lender(Shard(0, 4), crew)  # type: ignore[arg-type]
    layout, buffer = packed_lora(tmp_path, tiny_llama, 3)
    buffer = buffer.to(dtype)
    whole = LoraWeights.from_buffer(buffer, layout, "a")
    assert lender.hand_over("a", buffer, layout).done()
    own, uses = lender.lend(LoraBatch((Segment(1, 3, whole, 0.5),)))
    batches = [own, *(shard.batch(uses) for shard in crew.shards)]
    for shard, batch in zip(Shard(0, 4).all, batches, strict=True):
        (segment,) = batch.segments
        assert (segment.start, segment.end, segment.scale) == (1, 3, 0.5)
        got, wanted = _tensors(segment.weights), _tensors(shard_lora(whole, shard))
        assert len(got) == len(wanted)
        for mine, part in zip(got, wanted, strict=True):
            assert mine.dtype == dtype and torch.equal(mine, part)
    lender.take_back("a")
    assert not any(shard._parts for shard in crew.shards)


def test_an_adapter_that_comes_again_is_another_one(tmp_path: Path, tiny_llama: Path) -> None:
    """What is let go of late is never the new one."""
    crew = Inline(2)
    lender = Lender(Shard(0, 2), crew)  # type: ignore[arg-type]
    layout, buffer = packed_lora(tmp_path, tiny_llama, 3)
    for _ in range(2):
        lender.hand_over("a", buffer, layout)
        lender.take_back("a")
    lender.hand_over("a", buffer, layout)
    assert crew.shards[0]._parts.keys() == {2}


def test_of_an_adapter_of_heads_the_others_hold_nothing() -> None:
    crew = Inline(2)
    lender = Lender(Shard(0, 2), crew)  # type: ignore[arg-type]
    layout, buffer = allocate({}, {}, 1, dtype=torch.float32)
    assert lender.hand_over("heads", buffer, layout).done()
    assert not _tensors(crew.shards[0]._parts[0])
    lender.take_back("heads")
