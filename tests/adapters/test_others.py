"""Devices that share the base model: an adapter is there when all have it, and no row before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from lorastack.adapters.memory import arena, copies
from lorastack.errors import DeviceLostError, InternalError
from lorastack.layout import AdapterLayout
from tests.adapters.pools import Bench, bench
from tests.adapters.test_copies import SIZES, packed
from tests.helpers.streams import FakeDevice


@dataclass
class Arrival:
    """An event that happens when the test says so."""

    happened: bool = False
    error: Exception | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.happened


@dataclass
class FakeOthers:
    """log: what they were asked for, "+" and "-"; their bytes are what the host has."""

    log: list[str] = field(default_factory=list)
    arrivals: dict[str, Arrival] = field(default_factory=dict)
    seen: dict[str, list[int]] = field(default_factory=dict)

    def hand_over(self, digest: str, buffer: Tensor, layout: AdapterLayout) -> Arrival:
        self.log.append(f"+{digest}")
        self.seen[digest] = buffer.tolist()
        self.arrivals[digest] = Arrival()
        return self.arrivals[digest]

    def take_back(self, digest: str) -> None:
        self.log.append(f"-{digest}")
        del self.arrivals[digest]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arena, copies):
        monkeypatch.setattr(module, "PIECE", 4)


@pytest.fixture
def others() -> FakeOthers:
    return FakeOthers()


@pytest.fixture(params=["copied to the device", "host copies serve"])
def device(request: pytest.FixtureRequest) -> FakeDevice | None:
    return FakeDevice() if request.param == "copied to the device" else None


@pytest.fixture
def made(device: FakeDevice | None, others: FakeOthers) -> Iterator[Bench]:
    """Room for 12 bytes."""
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device, others) as made:
        yield made


def ask(made: Bench, digest: str) -> bool:
    """A row asks until all that this machine can do is done; whether it may run."""
    for _ in range(3):
        if made.pool.acquire([digest]) is not None:
            made.pool.release([digest])
            return True
        made.settle()
    return False


def test_rows_may_use_it_when_all_have_it(made: Bench, others: FakeOthers) -> None:
    assert not ask(made, "e")
    assert others.log == ["+e"] and made.pool.copying
    assert others.seen["e"] == packed("e", 9).buffer.tolist()
    assert not made.pool.drop("e")
    others.arrivals["e"].happened = True
    assert made.pool.poll() and not made.pool.copying
    assert ask(made, "e")
    assert others.log == ["+e"]


def test_others_that_are_done_first_wait_for_this_device(others: FakeOthers) -> None:
    device = FakeDevice()
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device, others) as made:
        for _ in range(2):
            assert made.pool.acquire(["e"]) is None
            made.wait_for_loads()
            made.pool.poll()
        others.arrivals["e"].happened = True
        made.pool.poll()
        assert made.pool.acquire(["e"]) is None
        device.settle()
        made.pool.poll()
        assert made.pool.acquire(["e"]) is not None


def test_what_goes_is_taken_back_before_the_next_is_handed_over(
    made: Bench, others: FakeOthers
) -> None:
    for digest in ("a", "e", "a"):
        assert not ask(made, digest)
        others.arrivals[digest].happened = True
        made.pool.poll()
        assert ask(made, digest)
    assert others.log == ["+a", "-a", "+e", "-e", "+a"]
    assert made.pool.drop("a")
    assert others.log[-1] == "-a"


def test_one_that_moves_on_this_device_stays_where_it_is_on_the_others(others: FakeOthers) -> None:
    device = FakeDevice()
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device, others) as made:
        for digest in ("a", "b", "c"):  # 4 bytes each
            ask(made, digest)
            others.arrivals[digest].happened = True
            made.pool.poll()
        for digest in ("a", "c"):
            made.pool.drop(digest)
        (old,) = made.pool.acquire(["b"]) or ()
        made.pool.release(["b"])
        made.pool.pin("b")
        ask(made, "d")  # 6 bytes, between two holes of 4
        (moved,) = made.pool.acquire(["b"]) or ()
        made.pool.release(["b"])
        assert moved is not old
    assert others.log == ["+a", "+b", "+c", "-a", "-c", "+d"]


def test_a_copy_that_fails_here_is_taken_back(others: FakeOthers) -> None:
    device = FakeDevice()
    device.copies.failures.append(ValueError("no such memory"))
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device, others) as made:
        with pytest.raises(InternalError, match="no such memory"):
            ask(made, "e")
        assert others.log == ["+e", "-e"]
        assert made.pool.drop("e") and not made.pool.copying


def test_a_device_that_is_lost_meanwhile_ends_the_loop(made: Bench, others: FakeOthers) -> None:
    ask(made, "e")
    others.arrivals["e"].error = DeviceLostError("shard 1 of 2 is gone")
    with pytest.raises(DeviceLostError):
        made.pool.poll()
