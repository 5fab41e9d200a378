"""Which bytes of an arena are taken: slices, the holes between them, and what moves to join holes.

Pure: no tensor, no device, no thread.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

Hole = tuple[int, int]  # first byte, and the one behind the last


@dataclass(slots=True, eq=False)
class Slice:
    """Bytes that somebody has. start: changes when `Space.move` moves it."""

    start: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class Move:
    """A slice that is to begin at `target`, which is lower than where it begins."""

    slice: Slice
    target: int


class Space:
    """Bytes 0 to `nbytes`."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._holes: list[Hole] = [(0, nbytes)] if nbytes else []
        self._slices: dict[int, Slice] = {}  # by start

    @property
    def free(self) -> int:
        """Bytes of all holes."""
        return sum(end - start for start, end in self._holes)

    def take(self, nbytes: int) -> Slice | None:
        """A slice of the smallest hole that holds it; None if none does. nbytes: at least 1."""
        fitting = [hole for hole in self._holes if hole[1] - hole[0] >= nbytes]
        if not fitting:
            return None
        hole = min(fitting, key=lambda hole: hole[1] - hole[0])
        start, end = hole
        self._holes.remove(hole)
        if start + nbytes < end:
            insort(self._holes, (start + nbytes, end))
        taken = self._slices[start] = Slice(start, nbytes)
        return taken

    def give(self, taken: Slice) -> None:
        """Gives a slice back; its hole joins those beside it."""
        assert self._slices.pop(taken.start) is taken
        start, end = taken.start, taken.end
        beside = [hole for hole in self._holes if hole[1] == start or hole[0] == end]
        for hole in beside:
            self._holes.remove(hole)
            start, end = min(start, hole[0]), max(end, hole[1])
        insort(self._holes, (start, end))

    def plan(self, nbytes: int, movable: Callable[[Slice], bool]) -> list[Move]:
        """How neighbouring holes become one of `nbytes` or more, moving as few bytes as it can.

        The slices between them move down to the first hole, in the order of the moves: each goes to
        bytes that are free or its own by then. [] if it cannot be done, as too much lies between
        slices that are not movable. Nothing changes yet, see `move`.
        """
        window = min(self._windows(nbytes, movable), default=None)
        if window is None:
            return []
        _, target, end = window
        moves = []
        for start in sorted(at for at in self._slices if target <= at < end):
            moves.append(Move(self._slices[start], target))
            target += self._slices[start].nbytes
        return moves

    def move(self, moves: Sequence[Move]) -> None:
        """Carries out what `plan` gives now."""
        for move in moves:
            del self._slices[move.slice.start]
            move.slice.start = move.target
            self._slices[move.target] = move.slice
        ends = [0, *(self._slices[start].end for start in sorted(self._slices))]
        starts = [*sorted(self._slices), self._nbytes]
        self._holes = [hole for hole in zip(ends, starts, strict=True) if hole[0] < hole[1]]

    def _windows(
        self, nbytes: int, movable: Callable[[Slice], bool]
    ) -> Iterator[tuple[int, int, int]]:
        """(bytes to move, start, end) from a hole to a later one whose joint hole is enough."""
        for holes in self._runs(movable):
            first, room = 0, 0
            for start, end in holes:
                room += end - start
                while room - (holes[first][1] - holes[first][0]) >= nbytes:
                    room -= holes[first][1] - holes[first][0]
                    first += 1
                if room >= nbytes:
                    yield end - holes[first][0] - room, holes[first][0], end

    def _runs(self, movable: Callable[[Slice], bool]) -> Iterator[list[Hole]]:
        """Holes with nothing but movable slices between them."""
        fixed = sorted(at for at, taken in self._slices.items() if not movable(taken))
        run: list[Hole] = []
        for hole in self._holes:
            while fixed and fixed[0] < hole[0]:
                fixed.pop(0)
                if run:
                    yield run
                run = []
            run.append(hole)
        if run:
            yield run
