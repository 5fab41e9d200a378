"""How long a grammar may keep the step thread busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Common grammars take half a millisecond a token, all in all, with a vocabulary of 49,152.
MOST_SECONDS = 0.1  # at once: what first masks may cost, and the longest anybody waits for a row
SECONDS_PER_TOKEN = 0.003


class Clock:
    """What the rows of one grammar share.

    too_slow: one answer took more than a row may have at once. It would take as long for the next
    row, so nobody asks again.
    """

    def __init__(self, seconds: Callable[[], float] = time.thread_time) -> None:
        """seconds: that the calling thread has computed for, so that a busy machine ends nobody."""
        self.seconds = seconds
        self.too_slow = False


class Allowance:
    """Seconds that one row has left: every token adds some, up to a limit; work takes from it.

    All work counts: a row with many drafts asks for many masks, but only tokens that it keeps add
    to the allowance.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left = MOST_SECONDS

    @property
    def used_up(self) -> bool:
        return self._left < 0 or self._clock.too_slow

    def add(self, num_tokens: int) -> None:
        self._left = min(self._left + num_tokens * SECONDS_PER_TOKEN, MOST_SECONDS)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Takes off what the block takes: one answer."""
        began = self._clock.seconds()
        try:
            yield
        finally:
            taken = self._clock.seconds() - began
            self._left -= taken
            self._clock.too_slow |= taken > MOST_SECONDS
