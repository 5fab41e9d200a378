"""A device whose work is done when a test says so, in the order that it chooses."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from lorastack.adapters.memory.stream import Event, Streams

Work = Callable[[], object]


@dataclass(slots=True, eq=False)
class FakeEvent:
    """Happens when its stream gets to it."""

    stream: FakeStream
    happened: bool = False

    def done(self) -> bool:
        happened = self.happened
        if self.stream.lazy:
            self.stream.advance()
        return happened


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing behind it begins before the event."""

    event: FakeEvent


class FakeStream:
    """Work in a queue. It reads and writes real tensors, and only when it is its turn."""

    def __init__(self, lazy: bool = False) -> None:
        """lazy: it gets on by one piece of work after one of its events was asked."""
        self.lazy = lazy
        self.failures: list[Exception] = []  # what the next calls of `run` raise
        self.threads: list[str] = []  # who called `run`
        self._queue: deque[Work | FakeEvent | Wait] = deque()

    def run(self, work: Work) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self.threads.append(threading.current_thread().name)
        self._queue.append(work)

    def current(self) -> AbstractContextManager[None]:
        """What is made within it lies in no arena: it is there at once."""
        return nullcontext()

    def record(self) -> FakeEvent:
        event = FakeEvent(self)
        self._queue.append(event)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self._queue.append(Wait(event))

    def advance(self) -> bool:
        """Goes through the next piece of work and the events behind it; False if it cannot."""
        able = False
        while self._queue:
            item = self._queue[0]
            if isinstance(item, Wait):
                if not item.event.done():
                    break
            elif isinstance(item, FakeEvent):
                item.happened = True
            elif able:
                break
            else:
                item()
            self._queue.popleft()
            able = True
        return able

    def finish(self) -> None:
        """Does all that it can."""
        while self.advance():
            pass

    def __len__(self) -> int:
        """Pieces of work, events and waits in the queue."""
        return len(self._queue)


class StepStream(FakeStream):
    """No step ever waits for a copy."""

    def wait(self, event: Event) -> None:
        raise AssertionError("a step would wait")


class FakeDevice:
    """Its streams advance apart; `settle` lets all do what they can, steps last."""

    def __init__(self, lazy: bool = False) -> None:
        """lazy: see `FakeStream`."""
        self.steps = StepStream(lazy)
        self.copies, self.views = FakeStream(lazy), FakeStream(lazy)
        self.streams = Streams(self.steps, self.copies, self.views)

    def bring(self) -> None:
        """Copies and what is made beside them get on, steps do not."""
        while self.copies.advance() or self.views.advance():
            pass

    def settle(self) -> None:
        while self.copies.advance() or self.views.advance() or self.steps.advance():
            pass
