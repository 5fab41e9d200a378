"""Memory that is made once: places on the device, page-locked buffers on the host."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorastack.adapters.memory import arena as arena_module
from lorastack.adapters.memory.arena import DeviceArena, PinnedArena
from lorastack.adapters.memory.space import Slice
from tests.helpers.streams import FakeDevice

CPU = torch.device("cpu")


def fill(arena: DeviceArena, taken: Slice, first: int) -> list[int]:
    """Bytes that count up from `first`."""
    values = [(first + place) % 256 for place in range(taken.nbytes)]
    arena.bytes_of(taken).copy_(torch.tensor(values, dtype=torch.uint8))
    return values


# -- on the device --------------------------------------------------------------------------------


def test_bytes_in_use_are_overwritten_only_behind_the_steps_that_use_them() -> None:
    device = FakeDevice()
    arena = DeviceArena(8, CPU, device.streams)
    first, second = arena.take(4), arena.take(4)
    assert first and second
    seen: list[list[int]] = []
    expected = fill(arena, first, 1)
    old = arena.bytes_of(first)
    device.steps.run(lambda: seen.append(old.tolist()))
    arena.give(first)
    again = arena.take(3)
    assert again is not None and again.start == 0
    device.copies.run(lambda: arena.bytes_of(again).zero_())
    device.copies.finish()
    assert not seen and old.tolist() == expected, "the copy came before the step"
    device.settle()
    assert seen == [expected]
    assert arena.bytes_of(again).tolist() == [0, 0, 0]


def test_what_was_never_used_waits_for_no_step() -> None:
    device = FakeDevice()
    arena = DeviceArena(8, CPU, device.streams)
    first = arena.take(4)
    assert first is not None
    arena.give(first)
    device.steps.run(lambda: None)  # a step that has nothing to do with it
    other = arena.take(8)
    assert other is not None
    assert len(device.copies) == 1, "half of it was used"
    device.settle()
    arena.give(other)
    device.settle()
    assert arena.take(8) is not None
    assert len(device.copies) == 0, "its steps are done"


@pytest.mark.parametrize("piece", [1, 3, 4, 100])
@pytest.mark.parametrize("hole", [1, 2, 5, 9])
def test_what_moves_keeps_its_bytes(monkeypatch: pytest.MonkeyPatch, piece: int, hole: int) -> None:
    """By less than its length and by more, in pieces and whole."""
    monkeypatch.setattr(arena_module, "PIECE", piece)
    device = FakeDevice()
    arena = DeviceArena(hole + 7 + 3 + 2, CPU, device.streams)
    gap, large, small, end = (arena.take(nbytes) for nbytes in (hole, 7, 3, 2))
    assert gap and large and small and end
    expected = [fill(arena, large, 10), fill(arena, small, 100)]
    before = [arena.bytes_of(taken) for taken in (large, small)]
    seen: list[list[list[int]]] = []

    def step(views: list[Tensor]) -> None:
        device.steps.run(lambda: seen.append([view.tolist() for view in views]))

    step(before)  # runs after the move was ordered, on the old places
    arena.give(gap)
    arena.give(end)
    assert arena.take(hole + 2) is None
    moves = arena.plan(hole + 2, lambda taken: True)
    assert [move.slice for move in moves] == [large, small]
    arena.move(moves)
    step([arena.bytes_of(taken) for taken in (large, small)])
    joined = arena.take(hole + 2)
    assert joined is not None
    device.copies.run(lambda: arena.bytes_of(joined).zero_())
    device.copies.finish()
    device.settle()
    assert seen == [expected, expected]
    assert [arena.bytes_of(taken).tolist() for taken in (large, small)] == expected


# -- on the host ----------------------------------------------------------------------------------


def pinned(
    nbytes: int,
    slab: int = 8,
    drop_oldest: Callable[[], bool] = lambda: False,
    make: Callable[[int], Tensor] | None = None,
) -> PinnedArena:
    make = make or (lambda nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    return PinnedArena(nbytes, drop_oldest, slab=slab, make=make)


def same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_buffers_share_slabs() -> None:
    arena = pinned(16)
    a, b, c = (arena.empty(count, torch.bfloat16) for count in (3, 1, 1))
    assert [each.shape for each in (a, b, c)] == [(3,), (1,), (1,)]
    assert same_memory(a, b) and not same_memory(a, c)
    a.fill_(1)
    b.fill_(2)
    assert a.tolist() == [1, 1, 1]


def test_a_buffer_is_free_when_nobody_refers_to_it() -> None:
    """Not before: what a copy still reads must not change."""
    arena = pinned(8)
    a = arena.empty(8, torch.uint8)
    part = a[2:4]
    place = a.data_ptr()
    del a
    assert arena.empty(8, torch.uint8).data_ptr() != place, "a view of it is left"
    del part
    assert arena.empty(8, torch.uint8).data_ptr() == place


def test_what_fits_in_no_slab_is_pageable() -> None:
    arena = pinned(16)
    large = arena.empty(9, torch.uint8)
    whole = [arena.empty(8, torch.uint8) for _ in range(3)]
    assert large.untyped_storage().nbytes() == 9
    assert not same_memory(whole[0], whole[2]) and not same_memory(whole[1], whole[2])
    assert not arena.grow()


def test_old_buffers_make_room() -> None:
    kept: list[Tensor] = []

    def drop_oldest() -> bool:
        return bool(kept) and kept.pop(0) is not None

    arena = pinned(16, drop_oldest=drop_oldest)
    places = set()
    for _ in range(5):
        kept.append(arena.empty(6, torch.uint8))
        places.add(kept[-1].data_ptr())
    assert len(places) == 2 and len(kept) == 2


def test_slabs_are_made_in_time_and_no_more_than_allowed() -> None:
    made: list[int] = []

    def make(nbytes: int) -> Tensor:
        made.append(nbytes)
        return torch.zeros(nbytes, dtype=torch.uint8)

    arena = pinned(20, make=make)
    assert arena.grow() and arena.grow() and not arena.grow()
    assert made == [8, 8]
    small = pinned(3, make=make)
    assert small.grow() and not small.grow()
    assert made == [8, 8, 3]


def test_a_system_without_more_page_locked_memory(caplog: pytest.LogCaptureFixture) -> None:
    def make(nbytes: int) -> Tensor:
        if len(made) == 1:
            raise RuntimeError("CUDA error: out of memory")
        made.append(torch.zeros(nbytes, dtype=torch.uint8))
        return made[-1]

    made: list[Tensor] = []
    arena = pinned(24, make=make)
    buffers = [arena.empty(8, torch.uint8) for _ in range(2)]
    assert same_memory(buffers[0], made[0]) and not same_memory(buffers[1], made[0])
    assert "--host-adapter-memory" in caplog.text
    assert not arena.grow()
