"""A pool for tests whose loads can be waited for and whose clock stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lorastack.adapters.memory.arena import DeviceArena
from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.pipeline import Others
from lorastack.adapters.memory.pool import DevicePool
from tests.adapters.test_host import packed
from tests.helpers.streams import FakeDevice

CPU = torch.device("cpu")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "too-large": 11}
WAIT = 120.0  # seconds until a test gives up


class Bench:
    """A pool whose loads can be waited for."""

    def __init__(
        self,
        budget: int = 10,
        load: Callable[[str], PackedAdapter] | None = None,
        device: FakeDevice | None = None,
        others: Others | None = None,
    ) -> None:
        """device: what adapters are copied to; None: the host copies serve. others: of others."""
        self.now = 0.0  # seconds
        self.loads: list[str] = []
        self._done = threading.Semaphore(0)
        self._load = load or (lambda digest: packed(digest, SIZES[digest]))
        self._device = device
        self.host = HostCache(100 * budget, self._counted)
        copies = None
        if device is not None:
            arena = DeviceArena(budget, CPU, device.streams)
            copies = Copies(arena, device.streams, head_rows, self._done.release)
        self.pool = DevicePool(
            budget,
            self.host,
            self._done.release,
            copies=copies,
            others=others,
            clock=lambda: self.now,
        )

    def _counted(self, digest: str) -> PackedAdapter:
        self.loads.append(digest)
        return self._load(digest)

    def settle(self) -> bool:
        """Waits until the loader has done all it was asked for, and the device too; then polls."""
        self.wait_for_loads()
        if self._device is not None:
            self._device.settle()
        return self.pool.poll()

    def wait_for_loads(self) -> None:
        """Until all that were asked for wait to be polled."""
        pipeline = self.pool._pipeline
        while pipeline._loads._results.qsize() < len(pipeline.loading):
            assert self._done.acquire(timeout=WAIT)

    def wait_for(self, condition: Callable[[], bool], *rows: str) -> None:
        """Polls while these rows ask, until the condition holds."""
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end, self.resident
            for row in rows:
                assert self.pool.acquire(row) is None, row
            self.pool.poll()
            time.sleep(0.0005)  # as the step loop rests

    def hold(self, *digests: str) -> tuple[DeviceAdapter, ...]:
        """Acquires, waiting for the load."""
        found = self.pool.acquire(digests)
        if found is None:
            self.settle()
            found = self.pool.acquire(digests)
        assert found is not None, digests
        return found

    def use(self, *digests: str) -> None:
        self.hold(*digests)
        self.pool.release(digests)

    @property
    def resident(self) -> dict[str, int]:
        """Digest -> pins, least recently used first."""
        return {digest: pins for digest, _, pins in resident(self.pool)}


def head_rows(ids: Sequence[int], out_NH: Tensor) -> None:
    """Row i of lm_head holds i everywhere."""
    out_NH.copy_(torch.tensor(ids)[:, None].expand_as(out_NH))


def resident(pool: DevicePool) -> list[tuple[str, int, int]]:
    """(digest, bytes, pins) of every device copy, least recently used first."""
    return [(each.digest, each.nbytes, each.in_use) for each in pool.stats().adapters]


@contextmanager
def bench(
    budget: int = 10,
    load: Callable[[str], PackedAdapter] | None = None,
    device: FakeDevice | None = None,
    others: Others | None = None,
) -> Iterator[Bench]:
    made = Bench(budget, load, device, others)
    try:
        yield made
    finally:
        made.pool.close()
