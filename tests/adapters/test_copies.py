"""Copies to a device of its own: order, places, errors, and that no step and no row waits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch

from lorastack.adapters.memory import arena, copies
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.turns import QUANTUM
from lorastack.errors import DeviceLostError, InternalError
from lorastack.layout import DRAFT_KEY, AdapterLayout, TensorSlot
from tests.adapters.pools import Bench, Views, bench
from tests.helpers.streams import FakeDevice

SIZES = {"a": 4, "b": 4, "c": 4, "d": 6, "e": 9, "l": 24, "x": 1}
HIDDEN, IDS = 2, (3, 5, 8)  # of adapters with a draft vocabulary


def contents(digest: str, nbytes: int) -> list[int]:
    return [(ord(digest) + 7 * place) % 256 for place in range(nbytes)]


def packed(digest: str, nbytes: int, *, pinned: bool = True, rows: bool = False) -> PackedAdapter:
    """rows: the copy has to bring `len(IDS)` rows of the base's."""
    slots, end, ids = {}, nbytes, ()
    if rows:
        slots[DRAFT_KEY] = TensorSlot(nbytes, (len(IDS), HIDDEN))
        end, ids = nbytes + len(IDS) * HIDDEN, IDS
    layout = AdapterLayout(
        slots=slots, scales={}, num_elements=end, itemsize=1, num_heads=0, draft_vocabulary=ids
    )
    buffer = torch.tensor(contents(digest, nbytes), dtype=torch.uint8)
    return PackedAdapter(digest=digest, buffer=buffer, layout=layout, pinned=pinned)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (arena, copies):
        monkeypatch.setattr(module, "PIECE", 4)


@pytest.fixture
def device() -> FakeDevice:
    return FakeDevice()


@pytest.fixture
def made(device: FakeDevice) -> Iterator[Bench]:
    """Room for 12 bytes."""
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device) as made:
        yield made


def ask(made: Bench, *digests: str) -> None:
    """Rows ask, until what they ask for is on the host and its copy may begin."""
    for _ in range(2):
        for digest in digests:
            assert made.pool.acquire(digest) is None
        made.wait_for_loads()
        made.pool.poll()
    made.wait_for_views()


def held(made: Bench, digest: str) -> DeviceAdapter:
    (adapter,) = made.pool.acquire(digest) or (None,)
    assert adapter is not None, digest
    assert isinstance(adapter.views, Views)
    assert adapter.views.address == adapter.buffer.data_ptr(), "made for another place"
    assert adapter.views.thread.startswith("adapter-views")
    return adapter


# -- the stream -----------------------------------------------------------------------------------


def test_a_copy_is_there_when_its_event_is(made: Bench, device: FakeDevice) -> None:
    ask(made, "e")  # in three pieces
    for _ in range(2):
        assert device.copies.advance()
        made.pool.poll()
        assert made.pool.acquire("e") is None
    assert made.pool.copying
    device.bring()
    assert made.pool.poll()
    assert not made.pool.copying
    adapter = held(made, "e")
    assert adapter.buffer.tolist() == contents("e", 9)
    assert set(device.copies.threads) == {"MainThread"}


def test_what_a_row_waits_for_passes_what_is_loaded_ahead(device: FakeDevice) -> None:
    """Of a large one ahead, a few pieces are under way; the row's goes at once and whole."""
    with bench(40, lambda digest: packed(digest, SIZES[digest]), device) as made:
        for _ in range(2):
            made.pool.prefetch("l")
            made.wait_for_loads()
            made.pool.poll()
        assert len(device.copies.threads) == copies.PIECES_AHEAD < 6
        for _ in range(2):
            made.pool.prefetch("l")
            assert made.pool.acquire("e") is None
            made.wait_for_loads()
            made.pool.poll()
        assert len(device.copies.threads) == copies.PIECES_AHEAD + 3
        for _ in range(copies.PIECES_AHEAD + 3):
            device.copies.advance()
        made.wait_for_views()
        device.views.finish()
        made.pool.poll()
        assert made.resident.keys() == {"e"}
        while made.pool.copying:  # a piece is added for each that is done
            made.pool.prefetch("l")
            assert device.copies.advance()
            made.pool.poll()
        assert held(made, "l").buffer.tolist() == contents("l", 24)


def test_what_is_loaded_ahead_goes_at_once_when_a_row_asks(device: FakeDevice) -> None:
    with bench(40, lambda digest: packed(digest, SIZES[digest]), device) as made:
        for _ in range(2):
            made.pool.prefetch("l")
            made.wait_for_loads()
            made.pool.poll()
        assert made.pool.acquire("l") is None
        made.pool.poll()
        assert len(device.copies.threads) == 6
        device.bring()
        made.pool.poll()
        assert held(made, "l").buffer.tolist() == contents("l", 24)


@pytest.mark.parametrize(("pinned", "rows"), [(False, False), (True, True), (False, True)])
def test_what_keeps_its_caller_waiting_runs_in_a_thread(
    device: FakeDevice, pinned: bool, rows: bool
) -> None:
    """Pageable memory, and the base's rows of a draft vocabulary, which come from the device."""
    source = packed("a", 6, pinned=pinned, rows=rows)
    assert source.buffer.nbytes == 6 and source.nbytes == (12 if rows else 6)
    with bench(12, lambda digest: source, device) as made:
        ask(made, "a")

        def came() -> bool:
            device.settle()
            return bool(made.resident)

        made.wait_for(came, "a")
        expected = contents("a", 6) + [each for each in IDS for _ in range(HIDDEN)] * rows
        assert held(made, "a").buffer.tolist() == expected
    threads = ["MainThread" if pinned else "adapter-copies"] * 2 + ["adapter-copies"] * rows
    assert device.copies.threads == threads


def test_a_host_copy_stays_until_the_stream_has_read_it(device: FakeDevice) -> None:
    """Though the host cache lets go of it."""
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device) as made:
        ask(made, "a")
        assert made.host.drop_oldest()
        assert not made.host.snapshot()
        device.bring()
        made.pool.poll()
        assert held(made, "a").buffer.tolist() == contents("a", 4)


# -- errors ---------------------------------------------------------------------------------------


def test_an_error_in_a_copy_is_that_adapters_alone(made: Bench, device: FakeDevice) -> None:
    ask(made, "a")
    device.copies.failures.append(RuntimeError("boom"))
    for _ in range(2):
        for digest in "abc":
            made.pool.acquire(digest)
        made.wait_for_loads()
        made.pool.poll()
    for digest in "bc":
        made.pool.acquire(digest)
    made.settle()
    with pytest.raises(InternalError, match=r"copying adapter b .* boom; send the request again"):
        made.pool.acquire("b")
    for digest in "ac":
        assert held(made, digest).buffer.tolist() == contents(digest, 4)
    made.pool.poll()  # it was told
    ask(made, "b")
    made.settle()
    assert held(made, "b").buffer.tolist() == contents("b", 4)


def test_the_place_of_a_failed_copy_is_free_when_the_stream_has_left_it(
    device: FakeDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, calls = device.copies.run, []

    def fail_second(work: Callable[[], object]) -> None:
        calls.append(work)
        if len(calls) == 2:
            raise RuntimeError("boom")
        run(work)

    monkeypatch.setattr(device.copies, "run", fail_second)
    with bench(12, lambda digest: packed(digest, SIZES[digest]), device) as made:
        ask(made, "e")
        for _ in range(2):  # d fits only where e's first piece is being written
            made.pool.acquire("e")
            made.pool.acquire("d")
            made.wait_for_loads()
            made.pool.poll()
        assert made.pool._pipeline.copying.keys() == {"e"}
        assert len(calls) == 2
        device.bring()
        made.pool.acquire("d")
        made.pool.poll()
        made.pool.acquire("d")
        made.settle()
        assert held(made, "d").buffer.tolist() == contents("d", 6)


@pytest.mark.parametrize("pinned", [True, False])
def test_an_error_that_breaks_the_device_is_raised(device: FakeDevice, pinned: bool) -> None:
    device.copies.failures.append(torch.AcceleratorError("CUDA error: unspecified launch failure"))
    with bench(12, lambda digest: packed(digest, 4, pinned=pinned), device) as made:

        def poll() -> None:
            made.wait_for(lambda: False, "a")

        with pytest.raises(torch.AcceleratorError):
            poll()


def failing_views(monkeypatch: pytest.MonkeyPatch, made: Bench, error: Exception) -> None:
    """Of whatever is made from now on."""

    def fail(digest: str, buffer: torch.Tensor, layout: AdapterLayout) -> None:
        raise error

    monkeypatch.setattr(made.pool._pipeline._copies, "_make_views", fail)


def failure(made: Bench, digest: str) -> str:
    """What a row is told that waits for it."""
    for _ in range(9):
        try:
            assert made.pool.acquire(digest) is None
        except InternalError as error:
            return error.message
        made.settle()
    raise AssertionError(f"{digest} never fails")


def test_an_adapter_that_steps_could_not_read_leaves_its_place(
    made: Bench, device: FakeDevice
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        failing_views(patch, made, RuntimeError("boom"))
        assert re.match("copying adapter e .* boom", failure(made, "e"))
    assert not made.resident and not made.pool.copying
    made.pool.poll()  # it was told
    ask(made, "e")
    made.settle()
    assert held(made, "e").buffer.tolist() == contents("e", 9)


@pytest.mark.parametrize("moving", [False, True])
def test_views_that_break_the_device_are_raised(
    made: Bench, device: FakeDevice, monkeypatch: pytest.MonkeyPatch, moving: bool
) -> None:
    if moving:
        with_a_hole_beside(made, device)
        made.pool.release("b")
    broken = torch.AcceleratorError("CUDA error: unspecified launch failure")
    failing_views(monkeypatch, made, broken)
    with pytest.raises(torch.AcceleratorError):
        failure(made, "d")


# -- places ---------------------------------------------------------------------------------------


def with_a_hole_beside(made: Bench, device: FakeDevice) -> DeviceAdapter:
    """a, b and c fill the device; then a and c leave, and b stays in the middle."""
    ask(made, "a", "b", "c")
    made.settle()
    for digest in "ac":
        assert made.pool.drop(digest)
    return held(made, "b")


def test_a_neighbour_moves_for_a_hole_that_is_too_small(made: Bench, device: FakeDevice) -> None:
    before = with_a_hole_beside(made, device)
    seen: list[list[int]] = []
    device.steps.run(lambda: seen.append(before.buffer.tolist()))  # a step of before
    made.pool.release("b")
    ask(made, "d")
    assert held(made, "b") is before, "what steps need of it at its new place is on its way"
    made.pool.release("b")
    device.views.finish()
    made.pool.acquire("d")
    made.pool.poll()
    after = held(made, "b")
    assert after is not before and after.buffer.data_ptr() != before.buffer.data_ptr()
    device.steps.run(lambda: seen.append(after.buffer.tolist()))
    device.bring()
    assert made.pool.acquire("d") is None, "its place is written before b has left it"
    made.settle()
    assert held(made, "d").buffer.tolist() == contents("d", 6)
    assert seen == [contents("b", 4)] * 2


def test_a_neighbour_that_cannot_move_stays(made: Bench, device: FakeDevice) -> None:
    """The copy that it was to make room for ends; the next one moves it."""
    before = with_a_hole_beside(made, device)
    made.pool.release("b")
    with pytest.MonkeyPatch.context() as patch:
        failing_views(patch, made, RuntimeError("boom"))
        assert re.match("copying adapter d .* boom", failure(made, "d"))
    assert held(made, "b") is before
    made.pool.release("b")
    made.pool.poll()  # it was told
    ask(made, "d")
    for _ in range(2):
        made.pool.acquire("d")
        made.settle()
    assert held(made, "d").buffer.tolist() == contents("d", 6)
    assert held(made, "b").buffer.tolist() == contents("b", 4)


def test_a_move_that_fails_breaks_the_device(made: Bench, device: FakeDevice) -> None:
    """Nobody knows then what lies where: better no tokens than wrong ones."""
    with_a_hole_beside(made, device)
    made.pool.release("b")
    device.steps.failures.append(RuntimeError("boom"))
    with pytest.raises(DeviceLostError, match="boom; restart the server"):
        failure(made, "d")


def test_other_neighbours_move_if_those_that_were_to_leave(made: Bench, device: FakeDevice) -> None:
    """What was made for their new places is nobody's."""
    with_a_hole_beside(made, device)
    made.pool.release("b")
    ask(made, "d")
    assert made.pool.drop("b")
    made.pool.acquire("d")
    made.pool.poll()
    made.settle()
    assert held(made, "d").buffer.tolist() == contents("d", 6)
    assert made.resident == {"d": 1}


def test_what_is_pinned_does_not_move(made: Bench, device: FakeDevice) -> None:
    pinned = with_a_hole_beside(made, device)
    for _ in range(3):
        assert made.pool.acquire("d") is None
        made.settle()
    assert pinned.buffer.tolist() == contents("b", 4)
    for _ in range(3):
        made.pool.acquire("x")  # would fit beside it, but d was first
        made.pool.acquire("d")
        made.settle()
    assert made.resident == {"b": 1}
    assert made.pool._pipeline.copying.keys() == {"d", "x"}
    made.pool.release("b")
    for _ in range(3):
        made.pool.acquire("x")
        made.pool.acquire("d")
        made.settle()
    for digest in "dx":
        assert held(made, digest).buffer.tolist() == contents(digest, SIZES[digest])


def test_what_left_is_overwritten_behind_its_last_step(made: Bench, device: FakeDevice) -> None:
    ask(made, "e")
    made.settle()
    adapter = held(made, "e")
    seen: list[list[int]] = []
    device.steps.run(lambda: seen.append(adapter.buffer.tolist()))
    made.pool.release("e")  # the step has not run yet
    made.now += QUANTUM
    ask(made, "d")
    assert "e" not in made.resident
    device.bring()
    made.pool.poll()
    assert not seen and made.pool.acquire("d") is None
    made.settle()
    assert held(made, "d").buffer.tolist() == contents("d", 6)
    assert seen == [contents("e", 9)]
