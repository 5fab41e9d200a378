"""What paging asks of a device: queues of work, and events that say how far one has come.

Steps, copies and what is made beside them have a stream each. Nothing here waits on the host: a
stream can wait for an event of another one, and whoever wants to know asks an event now and then.
Tests have streams whose events happen when the test says so.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch


class Event(Protocol):
    """A place in a stream's work."""

    def done(self) -> bool:
        """True once all work before it is done. Never waits; raises what broke the device."""
        ...


class Stream(Protocol):
    """Work that a device does in order."""

    def run(self, work: Callable[[], object]) -> None:
        """Adds work, by calling what starts it."""
        ...

    def current(self) -> AbstractContextManager[object]:
        """Within it, what the calling thread asks of the device is added here."""
        ...

    def record(self) -> Event:
        """An event behind all work so far."""
        ...

    def wait(self, event: Event) -> None:
        """What is added from now on begins after an event of another stream."""
        ...


@dataclass(frozen=True, slots=True)
class Streams:
    """steps: where steps run, for the step thread alone. Any thread adds to the others. copies: the
    bytes of adapters. views: what is made beside them, which must not wait for others' bytes."""

    steps: Stream
    copies: Stream
    views: Stream


@dataclass(frozen=True, slots=True)
class CudaEvent:
    """See `Event`."""

    event: torch.cuda.Event

    def done(self) -> bool:
        """See `Event`."""
        return bool(self.event.query())  # type: ignore[no-untyped-call]


class CudaStream:
    """See `Stream`."""

    def __init__(self, device: torch.device, stream: torch.cuda.Stream | None = None) -> None:
        """stream: None for the one that is current in the calling thread when work is added."""
        self._device = device
        self._stream = stream

    def run(self, work: Callable[[], object]) -> None:
        """See `Stream`."""
        with self.current():
            work()

    def current(self) -> AbstractContextManager[object]:
        """See `Stream`."""
        return torch.cuda.stream(self._current())

    def record(self) -> CudaEvent:
        """See `Stream`."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._current())
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        """See `Stream`."""
        assert isinstance(event, CudaEvent)
        self._current().wait_event(event.event)

    def _current(self) -> torch.cuda.Stream:
        return self._stream or torch.cuda.current_stream(self._device)


def device_streams(device: torch.device) -> Streams | None:
    """A CUDA device's streams. None on a CPU: there the host copy itself serves."""
    if device.type == "cpu":
        return None
    copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    views = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return Streams(CudaStream(device), CudaStream(device, copies), CudaStream(device, views))
