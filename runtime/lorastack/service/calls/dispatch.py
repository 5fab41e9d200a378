"""From the engine's step thread to asyncio: one wake-up a step, one bounded buffer a row.

`Dispatcher.deliver` runs in the step thread and does nothing but one call_soon_threadsafe, and that
only for a step that somebody waits for; all other state belongs to the event loop. A reader that
falls behind parks its own row only, and one that takes nothing for long loses it.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from lorastack.errors import InvalidArgumentError, Reason, ResourceExhaustedError
from lorastack.request import Request, RowEvent
from lorastack.service.calls.readers import WaitingReaders

logger = logging.getLogger(__name__)


class Rows(Protocol):
    """What this module asks of the engine. All four return at once, from any thread."""

    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def park(self, request_id: str) -> None: ...
    def resume(self, request_id: str) -> None: ...


class RowStream:
    """One request's events, in order. Made by Dispatcher.open; event loop only.

    max_buffered: events that may lie unread before the row is parked; None: its reader wants them
    all at once, when the row has ended.
    """

    def __init__(
        self,
        request_id: str,
        engine: Rows,
        max_buffered: int | None,
        waiting: WaitingReaders[RowStream],
    ) -> None:
        self.request_id = request_id
        self._engine = engine
        self._max_buffered = max_buffered
        self._waiting = waiting
        self._too_slow = False
        self._buffer: list[RowEvent] = []
        self._filled = asyncio.Event()
        self._parked = False
        self.request: Request | None = None  # once submitted
        self.abandoned = False  # the reader left before the row's last event
        self.ended = asyncio.Event()  # the row's last event arrived, or it never ran

    def submit(self, request: Request) -> None:
        """Hands the row to the engine, whose refusal is raised here."""
        self._engine.submit(request)
        self.request = request

    async def take(self) -> list[RowEvent]:
        """All events that wait, at least one: a slow reader gets fewer, larger parts."""
        await self._filled.wait()
        events, self._buffer = self._buffer, []
        self._filled.clear()
        if self._parked:
            self._parked = False
            self._engine.resume(self.request_id)
        return events

    async def hand_over(self, writing: Awaitable[None]) -> None:
        """Waits until the reader has taken a part of the reply.

        Raises ResourceExhaustedError READER_TOO_SLOW when that took too long: `give_up` ended the
        row then, but no status can overtake the part, so it comes when the reader goes on.
        """
        self._waiting.add(self)
        try:
            await writing
        finally:
            self._waiting.remove(self)
        if self._too_slow:
            raise ResourceExhaustedError(
                "the reply was not read for too long, or too many others were not either, and the "
                "request was ended; read it as it comes",
                reason=Reason.READER_TOO_SLOW,
            )

    def give_up(self) -> None:
        """Ends the row of a reader that takes nothing, and drops what waits for it."""
        logger.info(
            "the reader takes nothing: its request ends (--reader-timeout, --max-parked)",
            extra={"request_id": self.request_id},
        )
        self._too_slow = self.abandoned = True
        self._buffer.clear()
        if not self.ended.is_set():
            self._engine.cancel(self.request_id)

    def push(self, event: RowEvent) -> None:
        """Adds an event; parks the row when its reader has left too many unread."""
        if self.ended.is_set():
            return
        if event.last:
            self.ended.set()
        if self.abandoned:
            return
        self._buffer.append(event)
        if event.last:
            self._filled.set()
        elif self._max_buffered is not None:
            self._filled.set()
            if not self._parked and len(self._buffer) >= self._max_buffered:
                self._parked = True
                self._engine.park(self.request_id)

    def close(self) -> None:
        """The reader leaves: a row that still runs is cancelled and its events dropped."""
        if self.request is None:
            self.ended.set()
        elif not self.ended.is_set():
            self.abandoned = True
            self._buffer.clear()
            self._engine.cancel(self.request_id)


class Dispatcher:
    """Routes events to their streams. Give `deliver` and `fail` to the engine, then attach it."""

    def __init__(self, *, max_buffered: int, max_parked: int, reader_timeout: float) -> None:
        """max_buffered: events a row; reader_timeout: seconds; see EngineConfig."""
        self._max_buffered = max_buffered
        self._waiting = WaitingReaders[RowStream](max_parked, reader_timeout, self._give_up)
        self._streams: dict[str, RowStream] = {}
        self._whole: set[str] = set()  # requests whose readers want everything at the end
        self._held: list[RowEvent] = []  # step thread: events that nobody waits for yet
        self._engine: Rows | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self.failed = asyncio.Event()  # the engine has ended every row and will take no more

    def attach(self, engine: Rows, loop: asyncio.AbstractEventLoop) -> None:
        """Called before the first request, on the loop that serves."""
        self._engine, self._loop = engine, loop

    def deliver(self, events: Sequence[RowEvent]) -> None:
        """Step thread: one call a step wakes the loop once, however many rows it served."""
        assert self._loop is not None, "attach() comes before the first request"
        self._held.extend(events)
        if all(event.request_id in self._whole and not event.last for event in events):
            return
        held, self._held = self._held, []
        with suppress(RuntimeError):  # the loop is closed: nobody is left to read
            self._loop.call_soon_threadsafe(self._route, held)

    def digests_in_use(self) -> Counter[str]:
        """Requests that have not ended, by digest of their LoRAs and heads. For any thread."""
        streams = list(self._streams.values())  # atomic: other threads call this
        requests = [stream.request for stream in streams if stream.request]
        return Counter(digest for request in requests for digest in request.digests)

    def fail(self, error: BaseException) -> None:
        """Any thread: the step loop cannot go on. Whoever calls this has logged the error."""
        if self._loop is None:
            self.failed.set()  # the server is still being made
            return
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.failed.set)

    @asynccontextmanager
    async def open(self, request_id: str, *, whole: bool = False) -> AsyncIterator[RowStream]:
        """A stream for one request; leaving the block early cancels its row.

        whole: nobody reads before the row's end, so its reader is not woken for single tokens.

        Raises InvalidArgumentError when a request with this id is alive. One whose caller has gone
        is waited for instead (it ends within a step), so that a retry may use the same id.
        """
        while (old := self._streams.get(request_id)) is not None:
            if not old.abandoned:
                raise InvalidArgumentError(
                    f"request_id {request_id!r} is in use by a running request; choose another or "
                    "leave it empty."
                )
            await old.ended.wait()
        assert self._engine is not None, "attach() comes before the first request"
        max_buffered = None if whole else self._max_buffered
        stream = RowStream(request_id, self._engine, max_buffered, self._waiting)
        self._streams[request_id] = stream
        if whole:
            self._whole.add(request_id)
        try:
            yield stream
        finally:
            self._whole.discard(request_id)
            stream.close()
            self._drop_if_ended(stream)

    def _route(self, events: Sequence[RowEvent]) -> None:
        for event in events:
            stream = self._streams.get(event.request_id)
            if stream is None:
                continue
            stream.push(event)
            if stream.abandoned:
                self._drop_if_ended(stream)

    def _give_up(self, stream: RowStream) -> None:
        stream.give_up()
        self._drop_if_ended(stream)

    def _drop_if_ended(self, stream: RowStream) -> None:
        """Forgets an ended stream, unless another one has its id by now."""
        if stream.ended.is_set() and self._streams.get(stream.request_id) is stream:
            del self._streams[stream.request_id]
