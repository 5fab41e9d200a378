"""Slices of an arena against a list of bytes."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.adapters.memory.space import Slice, Space


@dataclass
class Model:
    """Who has each byte: 0 for nobody."""

    owners: list[int]
    slices: dict[int, Slice] = field(default_factory=dict)

    def write(self, owner: int, taken: Slice) -> None:
        assert not any(self.owners[taken.start : taken.end]), "it is somebody's"
        self.owners[taken.start : taken.end] = [owner] * taken.nbytes
        self.slices[owner] = taken

    def clear(self, owner: int) -> Slice:
        self.owners = [0 if each == owner else each for each in self.owners]
        return self.slices.pop(owner)

    @property
    def free(self) -> int:
        return self.owners.count(0)

    @property
    def largest(self) -> int:
        text = "".join("x" if owner else "." for owner in self.owners)
        return max(map(len, text.split("x")))

    def largest_beside(self, fixed: set[int]) -> int:
        """The largest hole that moving all others could make."""
        text = "".join("x" if each in fixed else "." if not each else "m" for each in self.owners)
        return max(part.count(".") for part in text.split("x"))


@given(st.integers(1, 24), st.data())
def test_against_a_list_of_bytes(size: int, data: st.DataObject) -> None:
    space, model = Space(size), Model([0] * size)
    for owner in range(1, data.draw(st.integers(1, 20)) + 1):
        nbytes = data.draw(st.integers(1, 8))
        if model.slices and data.draw(st.booleans()):
            space.give(model.clear(data.draw(st.sampled_from(sorted(model.slices)))))
        if data.draw(st.booleans()):
            fixed = set(
                data.draw(st.lists(st.sampled_from(sorted(model.slices)))) if model.slices else []
            )
            compact(space, model, nbytes, fixed)
        taken = space.take(nbytes)
        assert (taken is None) == (model.largest < nbytes)
        if taken is not None:
            assert taken.nbytes == nbytes
            model.write(owner, taken)
        assert space.free == model.free


def compact(space: Space, model: Model, nbytes: int, fixed: set[int]) -> None:
    """Moves in order touch no byte of anybody else, and leave everything where the slices say."""
    names = {taken: owner for owner, taken in model.slices.items()}
    places = {owner: taken.start for owner, taken in model.slices.items()}
    moves = space.plan(nbytes, lambda taken: names[taken] not in fixed)
    for move in moves:
        owner = names[move.slice]
        assert owner not in fixed
        assert places[owner] == move.slice.start > move.target
        target = range(move.target, move.target + move.slice.nbytes)
        assert all(model.owners[place] in (0, owner) for place in target)
        model.clear(owner)
        model.write(owner, Slice(move.target, move.slice.nbytes))
        model.slices[owner] = move.slice
        places[owner] = move.target
    if moves:
        space.move(moves)
    assert all(taken.start == places[owner] for owner, taken in model.slices.items())
    if model.largest_beside(fixed) >= nbytes:
        assert model.largest >= nbytes
    else:
        assert not moves


def test_the_smallest_hole_that_is_enough() -> None:
    space = Space(10)
    first, _, third, _ = (space.take(nbytes) for nbytes in (4, 1, 2, 3))
    assert first and third
    space.give(first)
    space.give(third)
    taken = space.take(2)
    assert taken is not None and taken.start == 5


@pytest.mark.parametrize(("wanted", "expected"), [(3, ["e"]), (4, ["c", "e"])])
def test_as_little_as_possible_moves(wanted: int, expected: list[str]) -> None:
    """Holes of 1, 1 and 2 between c, which is large, and e, which is small."""
    space = Space(12)
    sizes = {"a": 1, "c": 5, "d": 1, "e": 3, "f": 2}
    slices = {name: space.take(nbytes) for name, nbytes in sizes.items()}
    names = {taken: name for name, taken in slices.items()}
    for name in "adf":
        taken = slices[name]
        assert taken is not None
        space.give(taken)
    moves = space.plan(wanted, lambda taken: True)
    assert [names[move.slice] for move in moves] == expected
