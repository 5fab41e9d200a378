"""How long a row's grammar may keep the step thread busy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Common grammars take half a millisecond a token, all in all, with a vocabulary of 49,152.
MOST_SECONDS = 0.1  # at once: what first masks may cost, and the longest anybody waits for a row
SECONDS_PER_TOKEN = 0.003


class Allowance:
    """Processor time that is left: every token adds some, up to a limit; work takes from it.

    It is the thread's own time that counts, so that a busy machine ends nobody, and all of it: a
    row with many drafts asks for many masks, but only tokens that it keeps add to the allowance.
    """

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        """clock: seconds that the calling thread has computed for."""
        self._clock = clock
        self._left = MOST_SECONDS

    @property
    def used_up(self) -> bool:
        return self._left < 0

    def add(self, num_tokens: int) -> None:
        self._left = min(self._left + num_tokens * SECONDS_PER_TOKEN, MOST_SECONDS)

    @contextmanager
    def spending(self) -> Iterator[None]:
        """Takes off what the block takes."""
        began = self._clock()
        try:
            yield
        finally:
            self._left -= self._clock() - began
