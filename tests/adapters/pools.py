"""A pool for tests whose loads can be waited for and whose clock stands still."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lorastack.adapters.memory.arena import DeviceArena
from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.pipeline import Others
from lorastack.adapters.memory.pool import DevicePool
from lorastack.layout import AdapterLayout
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
            copies = Copies(arena, device.streams, head_rows, self._done.release, views_at)
        self.pool = DevicePool(
            budget,
            self.host,
            self._done.release,
            copies=copies,
            others=others,
            make_views=views_at,
            clock=lambda: self.now,
        )

    def _counted(self, digest: str) -> PackedAdapter:
        self.loads.append(digest)
        return self._load(digest)

    def settle(self) -> bool:
        """Waits until the loader has done all it was asked for, and the device too; then polls."""
        self.wait_for_loads()
        self.wait_for_views()
        if self._device is not None:
            self._device.settle()
        return self.pool.poll()

    def wait_for_views(self) -> None:
        """Until all that were asked for are made. Their stream gets on when the test says so."""
        if (copies := self.pool._pipeline._copies) is not None:
            copies._making.submit(int).result(WAIT)

    def wait_for_loads(self) -> None:
        """Until all that were asked for wait to be polled."""
        pipeline = self.pool._pipeline
        threads = pipeline._loads, pipeline._hits
        while sum(each._results.qsize() for each in threads) < len(pipeline.loading):
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


@dataclass(frozen=True)
class Views:
    """address: where they were made for. thread: by which."""

    address: int
    thread: str


def views_at(digest: str, buffer: Tensor, layout: AdapterLayout) -> Views:
    assert buffer.nbytes == layout.nbytes
    return Views(buffer.data_ptr(), threading.current_thread().name)


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


def step(made: Bench, *rows: str, heads: str = "") -> list[bool]:
    """A step of rows with these LoRAs ("ab" is the stack of a and b): which of them ran.

    heads: those of rows that have some, parted by blanks; "ab" is a, which b corrects.
    """
    held = [made.pool.acquire(list(row)) for row in rows]
    drafts = [made.pool.try_acquire(list(each)) for each in heads.split()]
    for adapters in (*(each for each in held if each), *(each for each in drafts if each)):
        made.pool.release([each.digest for each in adapters])
    made.settle()
    return [each is not None for each in held] + [each is not None for each in drafts]
