"""Who starts first: fairness between stacks of LoRAs, age, and what waits for adapters."""

from __future__ import annotations

import time
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from lorastack.engine.admission import LOOK_AHEAD, OVERDUE, PATIENCE, admission_order
from lorastack.engine.row import Row
from lorastack.request import HeadsUse, LoraUse
from tests.engine.made_up import World, make_request, make_row

NOW = 100.0


def row(name: str, lora: str = "", age: float = 0.0, started: bool = False) -> Row:
    loras = (LoraUse(lora_id=lora, digest=lora),) if lora else ()
    made = make_row(make_request(name, [1, 1], 4, loras=loras, ignore_eos=True), NOW - age)
    made.admitted = NOW if started else None
    return made


def names(rows: Sequence[Row]) -> list[str]:
    return [each.request.request_id for each in rows]


def test_stacks_take_turns() -> None:
    waiting = [row("a1", "a"), row("a2", "a"), row("a3", "a"), row("b1", "b"), row("base")]
    assert names(admission_order(waiting, [], NOW)) == ["a1", "b1", "base", "a2", "a3"]


def test_rows_that_run_count() -> None:
    running = [row("r1", "a"), row("r2", "a"), row("r3", "b")]
    waiting = [row("a1", "a"), row("b1", "b"), row("b2", "b"), row("c1", "c")]
    assert names(admission_order(waiting, running, NOW)) == ["c1", "b1", "a1", "b2"]


def test_rows_that_ran_before_go_first() -> None:
    waiting = [row("young", "b"), row("preempted", "a", started=True)]
    assert names(admission_order(waiting, [row("r", "a")] * 9, NOW)) == ["preempted", "young"]


def test_age_makes_up_for_company() -> None:
    running = [row("r1", "a"), row("r2", "a")]
    waiting = [row("old", "a", age=3 * PATIENCE), row("other", "b", age=0.9 * PATIENCE)]
    assert names(admission_order(waiting, running, NOW)) == ["old", "other"]
    waiting = [row("old", "a", age=2.8 * PATIENCE), row("other", "b", age=0.9 * PATIENCE)]
    assert names(admission_order(waiting, running, NOW)) == ["other", "old"]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.lists(st.sampled_from("abc"), max_size=6))
def test_the_next_row_is_always_one_of_the_least_served(
    waiting: list[str], running: list[str]
) -> None:
    rows = [row(f"{place}", lora) for place, lora in enumerate(waiting)]
    counts = {lora: running.count(lora) for lora in "abc"}
    order = admission_order(rows, [row("r", lora) for lora in running], NOW)
    for place, each in enumerate(order):
        left = {other.lora_digests[0] for other in order[place:]}
        lora = each.lora_digests[0]
        assert counts[lora] == min(counts[other] for other in left)
        counts[lora] += 1
    for lora in "abc":
        same = [each for each in order if each.lora_digests == (lora,)]
        assert same == [each for each in rows if each.lora_digests == (lora,)]


# -- in the scheduler -----------------------------------------------------------------------------


def crowd(world: World, num_running: int) -> None:
    """Rows that fill slots for good."""
    for number in range(num_running):
        request = make_request(f"crowd{number}", [1], 200, ignore_eos=True)
        world.scheduler.add(make_row(request, time.monotonic()))
    world.step()


def add(world: World, name: str, lora: str, age: float = 0.0, max_new: int = 2) -> None:
    loras = (LoraUse(lora_id=lora, digest=lora),)
    heads = HeadsUse(medusa_id="heads1", digest="heads1")
    request = make_request(name, [1, 1], max_new, loras=loras, heads=heads, ignore_eos=True)
    world.scheduler.add(make_row(request, time.monotonic() - age))


def started(world: World) -> set[str]:
    return {name for name in world.tokens if world.tokens[name]}


class AskingWorld(World):
    """Nothing is missing by chance; the digests that were asked for in the last step."""

    def __init__(self, **config: int) -> None:
        super().__init__(256, **config)
        self.pool.chance = type("Never", (), {"random": lambda self: 1.0})()

    def asked(self) -> set[str]:
        self.pool.asked.clear()
        self.pool.prefetched.clear()
        self.step()
        return self.pool.asked


def test_rows_without_a_slot_have_their_adapters_fetched() -> None:
    world = AskingWorld(max_rows=2)
    crowd(world, 2)
    for number in range(LOOK_AHEAD + 6):
        add(world, f"row{number}", f"lora{number}")
    assert not world.asked()
    ahead = {f"lora{number}" for number in range(LOOK_AHEAD)}
    assert world.pool.prefetched == ahead | {"heads1"}


def test_no_more_rows_ask_than_could_start() -> None:
    world = AskingWorld(max_rows=4)
    crowd(world, 2)
    world.pool.missing = {"p", "q", "r", "s"}
    for lora in "pqrs":
        add(world, lora, lora)
    assert world.asked() == {"p", "q"}
    assert world.pool.prefetched == {"r", "s", "heads1"}
    assert world.asked() == {"p", "q"}, "they keep asking, or they lose their place"


def test_resident_ones_pass_those_that_wait_for_adapters() -> None:
    world = AskingWorld(max_rows=3)
    crowd(world, 2)
    world.pool.missing = {"p"}
    add(world, "waits", "p")
    for number in range(LOOK_AHEAD):
        add(world, f"missing{number}", "p")
    add(world, "here", "q")
    world.step()
    assert "here" in started(world)
    assert "waits" not in started(world)


def test_an_overdue_row_keeps_a_slot_for_its_adapter() -> None:
    world = AskingWorld(max_rows=3)
    crowd(world, 2)
    world.pool.missing = {"p"}
    add(world, "overdue", "p", age=OVERDUE)
    add(world, "here", "q")
    for _ in range(3):
        assert world.asked() == {"p"}
    assert not started(world) & {"here", "overdue"}
    world.pool.missing.clear()
    world.step()
    assert "overdue" in started(world)


def test_rows_ask_even_when_the_step_is_full() -> None:
    world = AskingWorld(max_rows=4, max_step_tokens=4)
    world.scheduler.add(make_row(make_request("long", [2] * 40, 1), time.monotonic()))
    world.step()
    add(world, "waits", "p")
    assert world.asked() == {"p"}
    assert "waits" not in started(world)
