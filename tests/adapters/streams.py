"""A device whose work is done when a test says so, in the order that it chooses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from lorastack.adapters.memory.stream import Event, Streams


@dataclass(slots=True, eq=False)
class FakeEvent:
    """Happens when its stream gets to it."""

    happened: bool = False

    def done(self) -> bool:
        return self.happened


class FakeStream:
    """Work in a queue. It reads and writes real tensors, and only when it is its turn."""

    def __init__(self) -> None:
        self._queue: deque[Callable[[], object] | FakeEvent | tuple[FakeEvent]] = deque()
        self.failures: list[Exception] = []  # what the next calls of `run` raise

    def run(self, work: Callable[[], object]) -> None:
        if self.failures:
            raise self.failures.pop(0)
        self._queue.append(work)

    def record(self) -> FakeEvent:
        event = FakeEvent()
        self._queue.append(event)
        return event

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self._queue.append((event,))

    def advance(self) -> bool:
        """Does the next piece of work and tells of it; False if there is none, or it must wait."""
        if not self._queue:
            return False
        match self._queue[0]:
            case FakeEvent() as event:
                event.happened = True
            case (FakeEvent() as other,):
                if not other.happened:
                    return False
            case work:
                work()
                self._queue.popleft()
                self._tell()
                return True
        self._queue.popleft()
        return True

    def _tell(self) -> None:
        while self._queue and isinstance(self._queue[0], FakeEvent):
            self._queue.popleft().happened = True

    def finish(self, count: int = 1 << 30) -> None:
        """Does `count` pieces of work, or those that it can."""
        while count and self.advance():
            count -= 1

    def __len__(self) -> int:
        return len(self._queue)


class StepStream(FakeStream):
    """No step ever waits for a copy."""

    def wait(self, event: Event) -> None:
        raise AssertionError("a step would wait")


class FakeDevice:
    """Its two streams advance apart; `settle` lets both do all they can."""

    def __init__(self) -> None:
        self.steps, self.copies = StepStream(), FakeStream()
        self.streams = Streams(self.steps, self.copies)

    def settle(self) -> None:
        while self.steps.advance() or self.copies.advance():
            pass
