"""Few seats, many callers: those who wait are served round robin by caller."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Iterable
from typing import Generic, TypeVar

from lorastack.errors import LorastackError, ResourceExhaustedError

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Hands out seats, the last used first, round robin by caller. Event loop only.

    When the queue is full, the caller with most places in it loses its last one, so that nobody can
    fill it for the others.
    """

    def __init__(self, seats: Iterable[T], max_waiting: int) -> None:
        self._free = list(seats)
        self._max_waiting = max_waiting
        self._waiting: OrderedDict[str, deque[asyncio.Future[T]]] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        """Calls of `take` that wait for a seat."""
        return sum(map(len, self._waiting.values()))

    async def take(self, caller: str) -> T:
        """A seat, to be given back. Raises ResourceExhaustedError if too many wait."""
        if self._free:
            return self._free.pop()
        if self.num_waiting >= self._max_waiting:
            self._make_room(caller)
        place: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(place)
        try:
            return await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._leave(caller, place)
            elif place.exception() is None:  # a seat came in the same moment
                self.give(place.result())
            raise

    def give(self, seat: T) -> None:
        """Takes a seat back, for the next in the queue."""
        while self._waiting:
            caller, places = self._waiting.popitem(last=False)
            place = places.popleft()
            if places:
                self._waiting[caller] = places  # behind the others
            if not place.done():  # else its caller has left a moment ago, and `take` does not know
                place.set_result(seat)
                return
        self._free.append(seat)

    def fail(self, error: LorastackError) -> None:
        """Ends all waiting with an error."""
        waiting, self._waiting = self._waiting, OrderedDict()
        for places in waiting.values():
            for place in places:
                _refuse(place, error)

    def _make_room(self, caller: str) -> None:
        error = ResourceExhaustedError(
            f"{self._max_waiting} calls wait already for work that takes long (grammars, chat "
            "templates of adapters, long texts); try again later"
        )
        greedy = max(self._waiting, key=lambda name: len(self._waiting[name]))
        if len(self._waiting[greedy]) <= len(self._waiting.get(caller, ())) + 1:
            raise error
        place = self._waiting[greedy][-1]
        self._leave(greedy, place)
        _refuse(place, error)

    def _leave(self, caller: str, place: asyncio.Future[T]) -> None:
        places = self._waiting.get(caller)
        if places is not None and place in places:
            places.remove(place)
            if not places:
                del self._waiting[caller]


def _refuse(place: asyncio.Future[T], error: LorastackError) -> None:
    if not place.done():
        place.set_exception(error)
