"""A pool for tests whose loads can be waited for and whose clock stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from lorastack.adapters.memory.device import Copy, DeviceAdapter
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.pool import DevicePool
from tests.adapters.test_host import packed

CPU = torch.device("cpu")
SIZES = {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5, "too-large": 11}
WAIT = 120.0  # seconds until a test gives up


class Bench:
    """A pool whose loads can be waited for."""

    def __init__(
        self,
        budget: int = 10,
        load: Callable[[str], PackedAdapter] | None = None,
        device: torch.device = CPU,
        copy: Copy | None = None,
    ) -> None:
        self.now = 0.0  # seconds
        self.loads: list[str] = []
        self._done = threading.Semaphore(0)
        self._load = load or (lambda digest: packed(digest, SIZES[digest]))
        self.host = HostCache(100, self._counted)
        self.pool = DevicePool(
            budget, device, self.host, self._done.release, copy=copy, clock=lambda: self.now
        )

    def _counted(self, digest: str) -> PackedAdapter:
        self.loads.append(digest)
        return self._load(digest)

    def settle(self) -> bool:
        """Waits until the loader has done all it was asked for, then polls."""
        pipeline = self.pool._pipeline
        for _ in (*pipeline.loading, *pipeline.copying):
            assert self._done.acquire(timeout=WAIT)
        return self.pool.poll()

    def wait_for(self, condition: Callable[[], bool], *rows: str) -> None:
        """Polls while these rows ask, until the condition holds."""
        end = time.monotonic() + WAIT
        while not condition():
            assert time.monotonic() < end, self.resident
            for row in rows:
                assert self.pool.acquire(row) is None, row
            self.pool.poll()

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


def resident(pool: DevicePool) -> list[tuple[str, int, int]]:
    """(digest, bytes, pins) of every device copy, least recently used first."""
    return [(each.digest, each.nbytes, each.in_use) for each in pool.stats().adapters]


@contextmanager
def bench(
    budget: int = 10,
    load: Callable[[str], PackedAdapter] | None = None,
    copy: Copy | None = None,
) -> Iterator[Bench]:
    made = Bench(budget, load, copy=copy)
    try:
        yield made
    finally:
        made.pool.close()
