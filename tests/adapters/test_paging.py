"""The pool under pressure: turns, the queue, heads, loading ahead."""

from __future__ import annotations

import threading

import pytest

from lorastack.adapters.memory.host import PackedAdapter
from lorastack.adapters.memory.turns import QUANTUM
from lorastack.errors import FailedPreconditionError, Reason
from tests.adapters.pools import WAIT, Bench, bench, step
from tests.adapters.test_host import packed
from tests.helpers.streams import FakeDevice

# -- turns ----------------------------------------------------------------------------------------


def test_an_adapter_in_use_leaves_when_its_turn_is_over(ten: Bench) -> None:
    step(ten, "d", "e")
    assert step(ten, "d", "e", "c") == [True, True, False]  # c is on the host now
    assert ten.pool.blocked
    assert step(ten, "d", "e", "c") == [True, True, False]
    ten.now += QUANTUM
    step(ten, "d", "e", "c")
    assert step(ten, "d", "e", "c") == [False, True, True]
    assert step(ten, "d", "e", "c") == [True, False, True]  # e's turn was over too
    assert step(ten, "d", "e", "c") == [True, False, True]


def test_what_nobody_uses_leaves_at_once(ten: Bench) -> None:
    step(ten, "d", "e")
    step(ten, "e", "c")
    assert step(ten, "e", "c") == [True, True]
    assert set(ten.resident) == {"e", "c"}


def test_a_turn_begins_anew_when_a_set_got_what_it_waited_for(ten: Bench) -> None:
    step(ten, "b", "e")
    step(ten, "b", "e")
    ten.now += QUANTUM
    step(ten, "b", "e", "bd")  # b's turn is over too, but it is part of the stack
    assert step(ten, "b", "e", "bd") == [True, False, True]
    assert step(ten, "b", "e", "bd") == [True, False, True]
    ten.now += QUANTUM
    step(ten, "b", "e", "bd")
    assert step(ten, "b", "e", "bd") == [False, True, False]


def test_the_queue_is_in_order_and_nobody_slips_past_its_head(ten: Bench) -> None:
    step(ten, "d", "b")  # 4 left
    step(ten, "d", "b", "e")
    step(ten, "d", "b", "e", "a")  # a would fit, but e was first
    assert step(ten, "d", "b", "e", "a") == [True, True, False, False]
    ten.now += QUANTUM
    step(ten, "d", "b", "e", "a")
    assert step(ten, "d", "b", "e", "a") == [False, True, True, True]


def test_a_set_that_stops_asking_leaves_the_queue(ten: Bench) -> None:
    step(ten, "d", "b")
    step(ten, "d", "b", "e")
    step(ten, "d", "b", "e", "a")
    step(ten, "d", "b", "a")
    assert step(ten, "d", "b", "a") == [True, True, True]


def test_one_that_loads_lets_others_pass() -> None:
    gate = threading.Event()

    def load(digest: str) -> PackedAdapter:
        assert digest != "e" or gate.wait(WAIT)
        return packed(digest, 5)

    with bench(load=load) as made:
        step(made, "a")
        assert made.pool.acquire("e") is None
        assert made.pool.acquire("ab") is None  # b loads behind e
        gate.set()
        made.settle()
        assert step(made, "e", "ab") == [True, False]


def test_what_was_placed_stays_until_nobody_asks() -> None:
    device = FakeDevice()
    with bench(2, lambda digest: packed(digest, 1), device=device) as made:
        step(made, "xy")
        made.pool.acquire("xy")
        device.copies.advance()
        made.wait_for_views()
        device.views.finish()
        made.wait_for(lambda: made.resident.keys() == {"x"}, "xy", "v")
        for _ in range(3):
            made.now += QUANTUM
            made.pool.acquire("v")
            made.pool.acquire("xy")
            made.pool.poll()
            assert made.resident.keys() == {"x"}

        def v_came() -> bool:
            device.settle()
            return made.resident.keys() == {"v", "y"}

        made.wait_for(v_came, "v")


def test_a_stack_is_placed_whole(ten: Bench) -> None:
    step(ten, "d")
    step(ten, "d", "e")
    ten.now += QUANTUM / 2
    step(ten, "d", "e", "bc")
    for _ in range(3):
        assert step(ten, "d", "e", "bc") == [True, True, False]
        assert set(ten.resident) == {"d", "e"}
    ten.now += QUANTUM / 2
    step(ten, "d", "e", "bc")
    assert set(ten.resident) == {"b", "c", "e"}


# -- heads and loading ahead ----------------------------------------------------------------------


def test_heads_take_nothing_from_anybody(ten: Bench) -> None:
    step(ten, "e", "c")
    for _ in range(3):
        ten.now += QUANTUM
        assert step(ten, "e", "c", heads="d") == [True, True, False]
    step(ten, "c", heads="d")
    assert step(ten, "c", heads="d") == [True, True]


def test_heads_leave_for_loras_before_loras_do(ten: Bench) -> None:
    step(ten, "d", heads="e")
    step(ten, "d", "c", heads="e")
    assert step(ten, "d", "c", heads="e") == [True, True, False]  # at once, they have no turn


def test_heads_larger_than_the_budget_are_refused(ten: Bench) -> None:
    assert ten.pool.try_acquire(["too-large"]) is None
    ten.settle()
    with pytest.raises(FailedPreconditionError) as refusal:
        ten.pool.try_acquire(["too-large"])
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE


def test_a_private_part_and_what_it_corrects_come_both_or_neither(ten: Bench) -> None:
    step(ten, "c")
    for _ in range(3):
        ten.now += QUANTUM
        assert step(ten, "c", heads="ed") == [True, False]
        assert set(ten.resident) == {"c"}
    step(ten, heads="ed")
    assert step(ten, heads="ed") == [True]
    assert set(ten.resident) == {"e", "d"}


def test_halves_of_heads_do_not_keep_each_other_away(ten: Bench) -> None:
    """e and d are there; with either of them the other part needs the room of the other one."""
    step(ten, heads="e d")
    assert step(ten, heads="e d") == [True, True]
    step(ten, heads="eb dc")
    for _ in range(3):
        assert step(ten, heads="eb dc") == [True, False]
    step(ten, heads="dc")
    assert step(ten, heads="dc") == [True]


def test_plain_heads_and_a_part_of_them_share_one_copy(ten: Bench) -> None:
    step(ten, heads="e")
    assert step(ten, heads="e ec") == [True, False]
    assert step(ten, heads="e ec ea") == [True, True, False]
    assert step(ten, heads="e ec ea") == [True, True, True]
    assert ten.loads == ["e", "c", "a"]


def test_heads_that_are_on_their_way_keep_what_they_correct() -> None:
    """e waits for c, whose copy takes long: nothing that can do without drives it out."""
    device = FakeDevice()
    with bench(device=device) as made:
        while made.pool.try_acquire("e") is None:
            made.settle()
        made.pool.release("e")
        while "c" not in made.pool._pipeline.copying:
            made.pool.try_acquire("ec")
            made.wait_for_loads()
            made.pool.poll()
        for _ in range(3):
            made.pool.try_acquire("d")
            made.pool.try_acquire("ec")
            made.wait_for_loads()
            made.pool.poll()
            assert "e" in made.resident
        made.settle()
        assert made.pool.try_acquire("ec") is not None


def test_a_part_and_heads_that_fit_only_apart_are_refused(ten: Bench) -> None:
    assert ten.pool.try_acquire("edb") is None
    ten.settle()
    ten.pool.try_acquire("edb")
    ten.settle()
    with pytest.raises(FailedPreconditionError) as refusal:
        ten.pool.try_acquire("edb")
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    assert refusal.value.metadata == {"digests": "b,d,e"}


def test_loading_ahead_takes_spare_room_in_order(ten: Bench) -> None:
    step(ten, "d", "e")
    for _ in range(3):
        ten.now += QUANTUM
        ten.pool.prefetch("abc")
        step(ten, "d")
    assert set(ten.resident) == {"d", "a", "b", "c"}  # e was idle
    ten.pool.prefetch("e")
    step(ten, "d", "abc")
    assert set(ten.resident) == {"d", "a", "b", "c"}


def test_loading_ahead_takes_nothing_from_what_is_loaded_ahead(ten: Bench) -> None:
    ten.use("e")
    ten.pool.pin("e")
    for _ in range(3):
        ten.pool.prefetch("dc")
        ten.settle()
        assert set(ten.resident) == {"e", "d"}


def test_what_is_loaded_ahead_outlives_the_idle(ten: Bench) -> None:
    ten.use("c")
    ten.use("d")
    for _ in range(2):
        ten.pool.prefetch("c")
        step(ten, "e")
    assert set(ten.resident) == {"c", "e"}


def test_a_copy_made_ahead_is_kept_for_who_wants_it() -> None:
    device = FakeDevice()
    with bench(1, lambda digest: packed(digest, 1), device=device) as made:
        made.pool.prefetch("xy")
        made.settle()
        for _ in range(3):
            made.pool.prefetch("xy")
            made.settle()
            assert made.resident.keys() == {"x"}


def test_few_copies_are_made_ahead() -> None:
    device = FakeDevice()
    with bench(device=device) as made:
        for _ in range(3):
            made.pool.prefetch("abcd")
            while made.pool._pipeline.loading:
                made.pool.prefetch("abcd")
                made.pool.poll()
        assert made.pool._pipeline.copying.keys() == {"a", "b"}


def test_loading_ahead_holds_up_no_row() -> None:
    """At most two loads are under way for rows that only might run."""
    gate = threading.Event()

    def load(digest: str) -> PackedAdapter:
        assert gate.wait(WAIT)
        return packed(digest, 1)

    with bench(load=load) as made:
        made.pool.prefetch("abcdefgh")
        made.pool.acquire("z")
        gate.set()
        made.settle()
        assert made.loads == ["a", "b", "z"]


def test_no_more_is_loaded_ahead_than_could_be_placed() -> None:
    with bench(5, lambda digest: packed(digest, 5)) as made:
        step(made, "z")
        for _ in range(5):
            made.pool.prefetch("abcdefgh")
            step(made, "z")
        assert made.loads == ["z", "a", "b"]


# -- copies ---------------------------------------------------------------------------------------


def test_a_slow_copy_holds_up_no_load() -> None:
    device = FakeDevice()
    loaded = threading.Event()

    def load(digest: str) -> PackedAdapter:
        if digest == "b":
            loaded.set()
        return packed(digest, 1)

    with bench(load=load, device=device) as made:
        made.pool.acquire("a")
        made.settle()
        made.pool.acquire("a")
        made.pool.poll()
        made.pool.acquire("b")
        assert loaded.wait(WAIT)


def test_running_rows_give_up_room_for_one_copy_at_a_time() -> None:
    device = FakeDevice()
    with bench(2, lambda digest: packed(digest, 1), device=device) as made:
        for _ in range(3):
            step(made, "x", "y")
        assert step(made, "x", "y") == [True, True]
        made.now += QUANTUM
        step(made, "x", "y", "v", "w")
        for _ in range(3):
            held = [made.pool.acquire(name) for name in "xyvw"]
            assert [each is not None for each in held] in ([True] * 2 + [False] * 2,) or (
                len(made.resident) == 1
            )
            made.pool.release([name for name, each in zip("xyvw", held, strict=True) if each])
            made.pool.poll()
        assert len(made.resident) == 1
        assert made.pool._pipeline.copying == {"v": 1}


def test_stats(ten: Bench) -> None:
    for digest in "cda":
        ten.use(digest)
    ten.hold("e")  # c goes
    ten.pool.pin("e")
    ten.use("c")  # d goes; c is on the host still
    ten.pool.acquire("d")
    stats = ten.pool.stats()
    assert [(a.digest, a.nbytes, a.in_use, a.pinned) for a in stats.adapters] == [
        ("a", 1, 0, False),
        ("e", 5, 1, True),
        ("c", 3, 0, False),
    ]
    assert stats.last_used.keys() == set("acde")
    assert (stats.num_waiting, stats.evictions) == (1, 2)
    assert list(ten.pool.sizes().items()) == [("a", 1), ("e", 5), ("c", 3)]
    assert ten.pool.awaited() == {"d"}
    ten.settle()
    stats = ten.pool.stats()
    assert (stats.disk_loads, stats.host_hits) == (4, 2)
    assert stats.load_seconds > 0
