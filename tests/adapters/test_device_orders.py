"""Rows that page adapters through a small device whose streams get on in any order.

Steps are told to the device long before they run, copies and views fail, host memory is cut from
slabs that are used again and again. Whatever a step reads when its turn comes must be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.adapters.memory import arena, copies
from lorastack.adapters.memory.arena import PinnedArena
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.turns import QUANTUM
from lorastack.errors import InternalError
from lorastack.layout import DRAFT_KEY, AdapterLayout, TensorSlot
from tests.adapters.pools import Bench, Views, bench, views_at
from tests.helpers.streams import FakeDevice

SIZES = {"a": 1, "b": 3, "c": 4, "d": 6, "e": 9, "f": 5, "g": 7}
ROWS = {"g": (2, 7)}  # the base's rows that come last: ids; each has 2 elements
PAGEABLE = "f"
BUDGET, HOST, SLAB = 16, 20, 10  # bytes


def contents(digest: str) -> list[int]:
    own = SIZES[digest] - 2 * len(ROWS.get(digest, ()))
    values = [(ord(digest) * 3 + 11 * place) % 256 for place in range(own)]
    return values + [each for each in ROWS.get(digest, ()) for _ in range(2)]


@dataclass
class Row:
    """Wants to run `left` steps with its LoRAs, and with all of its heads where they are there."""

    loras: str
    heads: str
    left: int


class World:
    """A step loop whose device is late. Every row asks every step, as running rows do."""

    def __init__(self, made: Bench, device: FakeDevice, rows: Sequence[Row]) -> None:
        self.made, self.device, self.rows = made, device, rows
        self.num_read = 0

    def step(self) -> bool:
        """Takes in what is there and tells the device of a step of all rows that can run, if any.

        It may run long after, when they have given back what they held.
        """
        self.made.pool.poll()
        self.check_room()
        held: list[DeviceAdapter] = []
        for row in self.rows:
            if row.left:
                held += self.run_row(row)
        if held:
            # The buffers are taken now, and read when the device gets to this step.
            buffers = [(adapter.digest, adapter.buffer) for adapter in held]
            for adapter in held:
                assert isinstance(adapter.views, Views)
                assert adapter.views.address == adapter.buffer.data_ptr()
            self.device.steps.run(lambda: self.read(buffers))
        self.made.pool.release([adapter.digest for adapter in held])
        self.made.now += QUANTUM / 2
        return bool(held)

    def run_row(self, row: Row) -> list[DeviceAdapter]:
        try:
            found = self.made.pool.acquire(row.loras)
        except InternalError as error:
            assert "boom" in error.message
            return []
        if found is None:
            return []
        row.left -= 1
        try:
            heads = self.made.pool.try_acquire(row.heads) if row.heads else None
        except InternalError:
            heads = None
        return [*found, *(heads or ())]

    def read(self, buffers: list[tuple[str, torch.Tensor]]) -> None:
        for digest, buffer in buffers:
            assert buffer.tolist() == contents(digest), digest
            self.num_read += 1

    def check_room(self) -> None:
        here = {each.digest: each.nbytes for each in self.made.pool.stats().adapters}
        copying = self.made.pool._pipeline.copying
        assert sum(here.values()) + sum(copying.values()) <= BUDGET
        assert not here.keys() & copying.keys()

    def end(self, lag: int) -> None:
        """Nothing fails any more, and the device does what it is told: every row gets on.

        lag: steps that wait for their turn while copies may have theirs, and rows can run.
        """
        self.device.copies.failures.clear()
        self.device.views.failures.clear()
        for _ in range(500):
            if not any(row.left for row in self.rows):
                break
            left = lag if self.step() else 0
            self.made.wait_for_loads()
            self.made.wait_for_views()
            self.wait_for_thread()
            self.device.bring()
            while len(self.device.steps) > left and self.device.steps.advance():
                self.device.bring()
        assert not any(row.left for row in self.rows), "rows starve"
        self.device.settle()
        assert not any(self.made.resident.values())

    def wait_for_thread(self) -> None:
        """Until the thread that copies pageable memory has nothing to do."""
        thread = self.made.pool._pipeline._copies._thread
        in_thread = [
            each for each in self.made.pool._pipeline._copies._copies.values() if each.in_thread
        ]
        while thread._results.qsize() < sum(each.event is None for each in in_thread):
            assert self.made._done.acquire(timeout=120.0)


LORAS = st.sampled_from(["a", "b", "c", "d", "e", "f", "ab", "cd", "be", "fd", "abc"])
MOVES = ("step", "step", "load", "copies", "copies", "views", "steps", "fail", "fail views", "drop")


def loader(pinned: PinnedArena) -> Callable[[str], PackedAdapter]:
    def load(digest: str) -> PackedAdapter:
        values = contents(digest)
        ids = ROWS.get(digest, ())
        own = len(values) - 2 * len(ids)
        slots = {DRAFT_KEY: TensorSlot(own, (len(ids), 2))} if ids else {}
        layout = AdapterLayout(
            slots=slots,
            scales={},
            num_elements=len(values),
            itemsize=1,
            num_heads=0,
            draft_vocabulary=ids,
        )
        buffer = pinned.empty(own, torch.uint8)
        buffer.copy_(torch.tensor(values[:own], dtype=torch.uint8))
        return PackedAdapter(
            digest=digest, buffer=buffer, layout=layout, pinned=digest not in PAGEABLE
        )

    return load


def views_on(device: FakeDevice, digest: str, buffer: torch.Tensor, layout: AdapterLayout) -> Views:
    if device.views.failures:
        raise device.views.failures.pop()
    return views_at(digest, buffer, layout)


@given(
    rows=st.lists(
        st.builds(
            Row,
            loras=LORAS,
            heads=st.sampled_from(["", "", "g", "gb", "ab"]),
            left=st.integers(1, 6),
        ),
        min_size=1,
        max_size=6,
    ),
    moves=st.lists(st.sampled_from(MOVES), max_size=40),
    piece=st.integers(1, 5),
    lag=st.integers(0, 8),
)
@settings(max_examples=150, deadline=None)
def test_every_step_reads_what_it_should(
    rows: list[Row], moves: list[str], piece: int, lag: int
) -> None:
    device = FakeDevice()
    pinned = PinnedArena(
        HOST,
        lambda: made.host.drop_oldest(),
        slab=SLAB,
        make=lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8),
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (arena, copies):
            patch.setattr(module, "PIECE", piece)
        with bench(BUDGET, loader(pinned), device) as made:
            world = World(made, device, rows)
            patch.setattr(made.pool._pipeline._copies, "_make_views", partial(views_on, device))
            for move in moves:
                match move:
                    case "step":
                        world.step()
                    case "load":
                        made.wait_for_loads()
                    case "views":
                        made.wait_for_views()
                        device.views.advance()
                    case "copies":
                        device.copies.advance()
                    case "steps":
                        device.steps.advance()
                    case "fail":
                        device.copies.failures[:] = [RuntimeError("boom")]
                    case "fail views":
                        device.views.failures[:] = [RuntimeError("boom")]
                    case "drop":
                        made.pool.drop("abc"[len(moves) % 3])
            world.end(lag)
            assert world.num_read
