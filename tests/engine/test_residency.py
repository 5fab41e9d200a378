"""Explicit loads, unloads and what is forgotten, on a real pool."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future

import pytest

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.engine.pages import Pages
from lorastack.engine.residency import Residency
from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    LorastackError,
    ResourceExhaustedError,
    UnavailableError,
)
from tests.adapters.pools import SIZES, Bench
from tests.adapters.test_host import packed


class World:
    """A pool of ten bytes and its orders; `rows` use the digests named there."""

    def __init__(self) -> None:
        self.rows: set[str] = set()
        self.pages = Pages(4, 4)
        self.bench = Bench(load=self._load)
        self.pool = self.bench.pool
        self.orders = Residency(
            self.pool, in_use=self.rows.__contains__, on_forgotten=self.pages.forget
        )

    @staticmethod
    def _load(digest: str) -> PackedAdapter:
        if digest == "broken":
            raise DataLossError("the blob is damaged")
        return packed(digest, SIZES[digest])

    def step(self) -> None:
        self.bench.settle()
        self.orders.step()

    def load(self, digest: str, pin: bool = False, needs: Sequence[str] = ()) -> Future[None]:
        future: Future[None] = Future()
        self.orders.load(digest, pin, future, needs)
        for _ in range(3):
            self.step()
        return future

    def unload(self, digest: str) -> Future[None]:
        future: Future[None] = Future()
        self.orders.unload(digest, future)
        self.step()
        return future


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.pool.close()


def test_a_load_is_done_when_the_adapter_is_there(world: World) -> None:
    future: Future[None] = Future()
    world.orders.load("a", False, future)
    world.orders.step()
    assert not future.done()
    world.step()
    future.result(0)
    assert world.bench.resident == {"a": 0}
    assert not world.pool.stats().adapters[0].pinned


def test_a_pinned_load_stays_under_pressure(world: World) -> None:
    world.load("d", pin=True).result(0)
    for digest in ("e", "c", "e"):
        world.load(digest).result(0)
    assert world.bench.resident == {"d": 0, "e": 0}


@pytest.mark.parametrize(
    ("digest", "error"), [("broken", DataLossError), ("too-large", FailedPreconditionError)]
)
def test_a_load_that_cannot_be_says_why(
    world: World, digest: str, error: type[LorastackError]
) -> None:
    assert isinstance(world.load(digest).exception(0), error)


def test_room_that_is_pinned_is_told_by_name(world: World) -> None:
    world.load("d", pin=True)
    world.load("e", pin=True)
    error = world.load("c").exception(0)
    assert isinstance(error, ResourceExhaustedError)
    assert error.metadata == {"digests": "d,e"}


def test_a_caller_that_left_pins_nothing(world: World) -> None:
    future: Future[None] = Future()
    world.orders.load("a", True, future)
    world.orders.step()
    future.cancel()
    world.step()
    world.load("d").result(0)
    assert not any(adapter.pinned for adapter in world.pool.stats().adapters)


def test_unload_unpins_at_once_and_drops_when_no_row_is_left(world: World) -> None:
    world.load("d", pin=True)
    world.rows.add("d")
    future = world.unload("d")
    assert not future.done()
    assert world.pool.holds("d")
    assert not world.pool.stats().adapters[0].pinned
    world.rows.clear()
    world.step()
    future.result(0)
    assert not world.bench.resident
    assert not world.bench.host.snapshot()


def test_a_load_undoes_an_unload(world: World) -> None:
    world.load("d")
    world.rows.add("d")
    unloaded = world.unload("d")
    world.load("d", pin=True).result(0)
    unloaded.result(0)
    world.rows.clear()
    world.step()
    assert world.pool.holds("d")


def test_unload_waits_for_the_load_before_it(world: World) -> None:
    loaded: Future[None] = Future()
    world.orders.load("d", True, loaded)
    unloaded = world.unload("d")
    for _ in range(3):
        world.step()
    loaded.result(0)
    unloaded.result(0)
    assert not world.bench.resident


def test_what_is_forgotten_leaves_the_prefix_cache_when_its_rows_end(world: World) -> None:
    world.load("a")
    mine, other = world.pages.allocate(2) or []
    world.pages.publish(mine, b"mine", ("a", "b"))
    world.pages.publish(other, b"other", ("b",))
    world.rows.add("a")
    world.orders.forget("a")
    world.step()
    assert world.pool.holds("a")
    world.pages.free([mine, other])
    world.rows.clear()
    world.step()
    assert not world.bench.resident
    assert world.pages.num_cached == 1
    assert world.pages.num_held == 0


def test_the_end_is_told_to_all_who_wait(world: World) -> None:
    futures: list[Future[None]] = [Future(), Future()]
    world.orders.load("a", False, futures[0])
    world.rows.add("b")
    world.orders.unload("b", futures[1])
    world.orders.end(UnavailableError("over"))
    assert all(isinstance(future.exception(0), UnavailableError) for future in futures)


def test_a_load_brings_and_pins_what_the_adapter_needs(world: World) -> None:
    world.load("c", pin=True, needs="dc").result(0)
    assert world.pool.holds("cd")
    pinned = [each.digest for each in world.pool.stats().adapters if each.pinned]
    assert sorted(pinned) == ["c", "d"]
    assert isinstance(world.load("e", needs=["broken"]).exception(0), DataLossError)
    world.unload("c").result(0)
    assert [each.digest for each in world.pool.stats().adapters if each.pinned] == []
    assert world.pool.holds("d")


def test_a_load_undoes_that_what_it_needs_was_forgotten(world: World) -> None:
    world.load("d").result(0)
    world.rows.add("d")
    world.orders.forget("d")
    world.step()
    world.load("c", needs="d").result(0)
    world.rows.clear()
    world.step()
    assert world.pool.holds("cd")
