"""Bounds the readers that keep a part of their reply waiting, in number and in time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

GRACE = 1.0  # seconds for which nobody counts as waiting: many parts may go out at once

T = TypeVar("T", bound=Hashable)


class WaitingReaders(Generic[T]):
    """Readers and since when they wait. Event loop only. One timer: parts mostly go out at once."""

    def __init__(self, most: int, patience: float, on_late: Callable[[T], None]) -> None:
        """on_late: called with a reader that no longer counts, as it has waited for `patience`
        seconds; or for GRACE, if more than `most` wait and none has waited longer."""
        self._most = most
        self._patience = patience
        self._on_late = on_late
        self._since: dict[T, float] = {}  # in order of time
        self._timer: asyncio.TimerHandle | None = None

    def add(self, reader: T) -> None:
        """Counts a reader as waiting from now on."""
        loop = asyncio.get_running_loop()
        now = self._since[reader] = loop.time()
        while len(self._since) > self._most:
            oldest, since = next(iter(self._since.items()))
            if now - since < GRACE:
                break
            self._give_up(oldest)
        if self._timer is None:
            self._timer = loop.call_later(self._patience, self._look)

    def remove(self, reader: T) -> None:
        """Counts a reader no more: it reads, or it left."""
        self._since.pop(reader, None)

    def _look(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        late = [r for r, since in self._since.items() if since + self._patience <= loop.time()]
        for reader in late:
            self._give_up(reader)
        if self._since:
            oldest = next(iter(self._since.values()))
            self._timer = loop.call_at(oldest + self._patience, self._look)

    def _give_up(self, reader: T) -> None:
        del self._since[reader]
        self._on_late(reader)
