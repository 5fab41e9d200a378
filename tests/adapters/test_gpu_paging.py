"""Paging on a GPU: what steps read there while adapters come, go and move."""

from __future__ import annotations

import random
import time

import pytest
import torch
from torch import Tensor

from lorastack.adapters.memory.arena import DeviceArena, PinnedArena
from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.memory.stream import device_streams
from lorastack.config import MIB
from lorastack.layout import AdapterLayout
from tests.adapters.pools import Views, head_rows, views_at

SIZES = [size * MIB + 256 for size in (1, 3, 20, 7, 40, 5, 2, 33)]  # bytes
BUDGET = 70 * MIB

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def contents(number: int) -> Tensor:
    return torch.arange(number, number + SIZES[number], dtype=torch.int64).mul_(37).to(torch.uint8)


def test_what_steps_read_is_exact_while_adapters_come_go_and_move() -> None:
    """Steps are told to the device and not waited for; 40 MiB fit in no slab and are pageable."""
    cuda = torch.device("cuda")

    def load(digest: str) -> PackedAdapter:
        number = int(digest)
        layout = AdapterLayout(
            slots={}, scales={}, num_elements=SIZES[number], itemsize=1, num_heads=0
        )
        buffer = pinned.empty(SIZES[number], torch.uint8)
        buffer.copy_(contents(number))
        return PackedAdapter(digest=digest, buffer=buffer, layout=layout, pinned=buffer.is_pinned())

    streams = device_streams(cuda)
    assert streams is not None
    pinned = PinnedArena(128 * MIB, lambda: host.drop_oldest(), slab=32 * MIB)
    host = HostCache(128 * MIB, load)
    arena = DeviceArena(BUDGET, cuda, streams)
    copies = Copies(arena, streams, head_rows, lambda: None, views_at)
    pool = DevicePool(BUDGET, host, copies=copies, idle=pinned.grow)
    chance = random.Random(0)
    expected = [contents(number).to(cuda) for number in range(len(SIZES))]
    busy = torch.randn(2048, 2048, device=cuda)
    unequal = torch.zeros((), dtype=torch.int64, device=cuda)
    for _ in range(60):
        digest = str(chance.randrange(len(SIZES)))
        while (found := pool.acquire([digest])) is None:
            pool.poll()
            time.sleep(0.0005)  # as the step loop rests
        assert isinstance(found[0].views, Views)
        assert found[0].views.address == found[0].buffer.data_ptr()
        busy = (busy @ busy).tanh_()
        unequal += (found[0].buffer != expected[int(digest)]).sum()
        pool.release([digest])
        pool.poll()
    pool.close()
    assert unequal.item() == 0
    assert pool.stats().evictions > 10
