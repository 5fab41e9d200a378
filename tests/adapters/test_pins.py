"""Pins of operators: what stays, what is refused beside them, and letting go of everything."""

from __future__ import annotations

import threading

import pytest

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.turns import QUANTUM
from lorastack.errors import Reason, ResourceExhaustedError
from tests.adapters.pools import WAIT, Bench, bench, step
from tests.adapters.test_host import packed


def test_a_pinned_adapter_stays(ten: Bench) -> None:
    ten.use("e")
    ten.pool.pin("e")
    for _ in range(3):
        ten.now += QUANTUM
        step(ten, "d", "c")
    assert ten.pool.holds("e")
    ten.pool.unpin("e")
    step(ten, "d", "c")
    assert step(ten, "d", "c") == [True, True]
    assert not ten.pool.holds("e")


def test_what_cannot_fit_beside_pinned_ones_is_refused_by_name(ten: Bench) -> None:
    for digest in "de":
        ten.use(digest)
        ten.pool.pin(digest)
    assert ten.pool.acquire("c") is None  # its size is not known yet
    ten.settle()
    with pytest.raises(ResourceExhaustedError) as refusal:
        ten.pool.acquire("c")
    assert refusal.value.reason is Reason.DEVICE_MEMORY_PINNED
    assert refusal.value.metadata == {"digests": "d,e"}
    ten.use("a")
    ten.pool.unpin("d")
    ten.pool.poll()
    ten.use("c")


def test_a_pin_keeps_what_the_adapter_needs(ten: Bench) -> None:
    ten.use("c", "d")
    ten.pool.pin("c", needs=["d"])
    ten.use("b")
    assert {each.digest for each in ten.pool.stats().adapters if each.pinned} == {"c", "d"}
    for _ in range(3):
        step(ten, "a")
        step(ten, "b")
        assert ten.pool.holds("cd")
    assert ten.pool.acquire("e") is None
    ten.settle()
    with pytest.raises(ResourceExhaustedError) as refusal:
        ten.pool.acquire("e")
    assert refusal.value.metadata == {"digests": "c,d"}
    ten.pool.pin("d")
    ten.pool.unpin("c")
    assert {each.digest for each in ten.pool.stats().adapters if each.pinned} == {"d"}


def test_a_stack_of_pinned_ones_counts_them_once(ten: Bench) -> None:
    ten.use("e")
    ten.pool.pin("e")
    ten.use("e", "d")


def test_drop_lets_go_of_every_copy() -> None:
    gate = threading.Event()

    def load(digest: str) -> PackedAdapter:
        assert gate.wait(WAIT)
        return packed(digest, 1)

    with bench(load=load) as made:
        assert made.pool.drop("a"), "nothing to drop"
        made.pool.acquire("a")
        assert not made.pool.drop("a"), "it is still loading"
        gate.set()
        made.use("a")
        made.pool.pin("a")
        assert made.pool.drop("a")
        assert not made.resident
        assert not made.host.snapshot()
        assert not made.pool.stats().last_used
        made.use("a")
        assert made.loads == ["a", "a"]
        assert not made.pool.stats().adapters[0].pinned
