"""Whom to evict: pure, so every rule is checked on drawn residents."""

from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.turns import Resident, Use, choose_victims
from tests.adapters.test_host import packed


def resident(name: str, nbytes: int, use: Use, since: float = 0.0, pins: int = 0) -> Resident:
    source = packed(name, nbytes)
    adapter = DeviceAdapter(digest=name, buffer=source.buffer, layout=source.layout)
    return Resident(adapter, since=since, use=use, pins=pins)


RESIDENTS = st.lists(
    st.tuples(st.integers(1, 9), st.sampled_from(list(Use)), st.integers(0, 5), st.integers(0, 4)),
    max_size=9,
).map(
    lambda drawn: [
        resident(str(index), nbytes, use, since, pins=int(pins == 0))
        for index, (nbytes, use, since, pins) in enumerate(drawn)
    ]
)


@given(
    residents=RESIDENTS,
    excess=st.integers(-3, 40),
    use=st.sampled_from([Use.SOFT, Use.HARD]),
    keep=st.sets(st.sampled_from("0123")),
    began_before=st.sampled_from([-inf, 1.0, 3.0]),
)
def test_victims_are_allowed_enough_and_not_too_many(
    residents: list[Resident], excess: int, use: Use, keep: set[str], began_before: float
) -> None:
    able = {
        each.adapter.digest: each.adapter.nbytes
        for each in residents
        if not each.pins
        and each.adapter.digest not in keep
        and (each.use < use or each.since <= began_before)
    }
    victims = choose_victims(residents, excess, use=use, keep=keep, began_before=began_before)
    if victims is None:
        assert sum(able.values()) < excess
        return
    assert len(set(victims)) == len(victims)
    assert set(victims) <= able.keys()
    assert sum(able[digest] for digest in victims) >= excess
    assert not victims or sum(able[digest] for digest in victims[:-1]) < excess


def test_idle_then_soft_then_the_oldest_turn() -> None:
    residents = [
        resident("hard-new", 1, Use.HARD, since=2),
        resident("soft-old", 1, Use.SOFT, since=9),
        resident("idle-old", 1, Use.IDLE, since=9),
        resident("hard-old", 1, Use.HARD, since=1),
        resident("soft-new", 1, Use.SOFT, since=0),
        resident("idle-new", 1, Use.IDLE, since=0),
    ]
    assert choose_victims(residents, 6, use=Use.HARD, keep=(), began_before=9) == [
        "idle-old",
        "idle-new",
        "soft-old",
        "soft-new",
        "hard-old",
        "hard-new",
    ]


@pytest.mark.parametrize(("use", "gained"), [(Use.SOFT, 1), (Use.HARD, 2)])
def test_each_use_takes_from_lower_ones_only(use: Use, gained: int) -> None:
    residents = [resident(level.name, 1, level) for level in Use]
    assert choose_victims(residents, gained, use=use, keep=()) is not None
    assert choose_victims(residents, gained + 1, use=use, keep=()) is None
