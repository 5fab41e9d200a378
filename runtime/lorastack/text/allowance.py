"""How long a grammar may keep the step thread busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Common grammars take half a millisecond a token, all in all, with a vocabulary of 49,152.
MOST_SECONDS = 0.1  # at once: for a row's first masks, and the longest that others wait for it
SECONDS_PER_TOKEN = 0.003


class Clock:
    """The clock that the rows of one grammar share.

    too_slow: one answer took more than MOST_SECONDS. It would for the next row too, so none asks
    again.
    """

    def __init__(self, seconds: Callable[[], float] = time.thread_time) -> None:
        """seconds: the calling thread's processor time, so that a busy machine ends no row."""
        self.seconds = seconds
        self.too_slow = False


class Allowance:
    """Seconds of grammar work that one row has left: tokens add to them, work takes from them.

    Masks of drafts are work too, but only tokens that the row keeps add SECONDS_PER_TOKEN each, up
    to MOST_SECONDS.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._left = MOST_SECONDS

    @property
    def used_up(self) -> bool:
        """True if nothing is left, or an answer of any row took too long."""
        return self._left < 0 or self._clock.too_slow

    def add(self, num_tokens: int) -> None:
        """Counts tokens that the row keeps."""
        self._left = min(self._left + num_tokens * SECONDS_PER_TOKEN, MOST_SECONDS)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Subtracts the time of the block, which is one answer."""
        began = self._clock.seconds()
        try:
            yield
        finally:
            taken = self._clock.seconds() - began
            self._left -= taken
            self._clock.too_slow |= taken > MOST_SECONDS
