"""Waiting and running rows, and how they make room for each other."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from lorastack.engine.holds import Holds
from lorastack.engine.row import Row


class RowQueues:
    """Step thread only. Iterating gives the running rows, then the waiting ones.

    A row that is preempted gives up its pages and waits again, before all others.
    """

    def __init__(self, max_rows: int, holds: Holds) -> None:
        self.waiting: deque[Row] = deque()
        self.running: list[Row] = []  # in order of admission
        self.num_preemptions = 0
        self._max_rows = max_rows
        self._holds = holds

    def __iter__(self) -> Iterator[Row]:
        yield from self.running
        yield from self.waiting

    def __len__(self) -> int:
        return len(self.waiting) + len(self.running)

    def find(self, request_id: str) -> Row | None:
        return next((row for row in self if row.request.request_id == request_id), None)

    def uses(self, digest: str) -> bool:
        """True if any row, running or waiting, uses this adapter."""
        return any(row.uses(digest) for row in self)

    @property
    def num_waiting(self) -> int:
        """Parked rows are left out: one that gave up its pages waits for its reader."""
        return sum(not row.parked for row in self.waiting)

    @property
    def num_parked(self) -> int:
        return sum(row.parked for row in self)

    @property
    def num_active(self) -> int:
        """Rows that would run if the waiting ones started as well, as far as there are slots."""
        return min(len(self) - self.num_parked, self._max_rows)

    @property
    def num_slots(self) -> int:
        """How many rows may start; parked rows give way to them."""
        return self._max_rows - sum(not row.parked for row in self.running)

    def wake_time(self) -> float | None:
        """When the next deadline or time limit falls due."""
        times = [row.wake_time for row in self]
        return min((at for at in times if at is not None), default=None)

    # -- moves ------------------------------------------------------------------------------------

    def start(self, row: Row, now: float) -> bool:
        """Make a waiting row a running one, with pages for all its tokens; False: too few pages."""
        if len(self.running) >= self._max_rows:
            self._preempt_parked()
        if not self._holds.begin(row, now, self._preempt_parked):
            return False
        self.waiting.remove(row)
        self.running.append(row)
        return True

    def make_room(self, row: Row, num_slots: int) -> bool:
        """Pages for `num_slots` tokens, taken from later rows if need be; False: it was preempted.

        Rows are planned from the oldest on, so a victim, parked or younger, has no step planned.
        """
        while not self.grow(row, num_slots):
            victim = self.running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        return True

    def grow(self, row: Row, num_slots: int) -> bool:
        """Pages for `num_slots` tokens if there are enough, those of parked rows included."""
        while not self._holds.grow(row, num_slots):
            if not self._preempt_parked():
                return False
        return True

    def remove(self, row: Row) -> None:
        """The row has ended; all that it held is free."""
        if row in self.running:
            self.running.remove(row)
        elif row in self.waiting:
            self.waiting.remove(row)
        self._holds.free(row)

    def _preempt_parked(self) -> bool:
        """Take back the pages of the latest parked row; False: there is none."""
        parked = next((row for row in reversed(self.running) if row.parked), None)
        if parked is not None:
            self._preempt(parked)
        return parked is not None

    def _preempt(self, row: Row) -> None:
        """Back to the head of the queue, pages given up; its tokens stay and are computed again."""
        self.num_preemptions += 1
        self.running.remove(row)
        self._holds.free(row)
        row.preempt()
        self.waiting.appendleft(row)
