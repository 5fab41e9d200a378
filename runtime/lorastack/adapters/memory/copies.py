"""Copies of adapters to a device of its own: into an arena, on one stream, told by events.

Step thread only. Adding a copy to the stream takes microseconds, so no thread does it. Two things
would keep the step thread waiting and run in a thread: pageable memory, and rows of the base's
lm_head, which the device gathers itself.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod

import torch
from torch import Tensor

from lorastack.adapters.memory.arena import PIECE, DeviceArena
from lorastack.adapters.memory.device import DeviceAdapter
from lorastack.adapters.memory.host import HeadRows, PackedAdapter
from lorastack.adapters.memory.space import Slice
from lorastack.adapters.memory.stream import Event, Streams
from lorastack.adapters.memory.threads import Failure, JobThread
from lorastack.errors import InternalError, LorastackError, breaks_device
from lorastack.layout import DRAFT_KEY

PIECES_AHEAD = 4  # under way at once for those that no row waits for; a row waits for them at most

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Copy:
    """One under way. place: None while it waits for one. left: pieces to add to the stream.

    event: behind all of it. error: what it failed with; the event still counts, as the stream may
    be writing until then.
    """

    packed: PackedAdapter
    place: Slice | None = None
    left: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)
    in_thread: bool = False
    event: Event | None = None
    error: LorastackError | None = None
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Written:
    """What the thread did is added to the stream."""

    digest: str
    event: Event


class Copies:
    """Everything between a host copy and its copy on the device, and their places there."""

    def __init__(
        self,
        arena: DeviceArena,
        streams: Streams,
        head_rows: HeadRows,
        on_finished: Callable[[], None],
    ) -> None:
        """head_rows: see `Backend`. on_finished: called from a thread when it has done its part."""
        self.seconds = 0.0  # total of all copies, from start to end
        self._arena = arena
        self._streams = streams
        self._head_rows = head_rows
        self._copies: dict[str, _Copy] = {}  # in order of start
        self._here: dict[str, tuple[DeviceAdapter, Slice]] = {}
        self._ahead: deque[Event] = deque()  # of pieces that no row waits for
        self._thread: JobThread[_Written] = JobThread("adapter-copies", on_finished)

    def start(self, packed: PackedAdapter) -> None:
        """A copy to begin with the next `advance`. Its bytes, with all others, fit in the arena."""
        self._copies[packed.digest] = _Copy(packed)

    def advance(
        self, urgent: Container[str], movable: Callable[[], Collection[str]]
    ) -> list[DeviceAdapter]:
        """Adds to the stream what may be added now; never waits. Between steps.

        urgent: those that rows wait for, which go first and at once. movable: adapters on the
        device that nobody has pinned. Returns what moved: these take the place of the same before.
        """
        moved: dict[str, DeviceAdapter] = {}
        room = True
        for digest in sorted(self._copies, key=lambda digest: digest not in urgent):
            copy = self._copies[digest]
            if copy.place is None and room:  # none passes one that waits for its place
                room = self._find_place(copy, movable, moved)
            if copy.place is not None and copy.event is None and not copy.in_thread:
                self._add(copy, urgent=digest in urgent)
        return list(moved.values())

    def finished(self) -> Iterator[DeviceAdapter | Failure]:
        """Copies that have ended since the last call. Never waits; raises what broke the device."""
        for written in self._thread.finished():
            copy = self._copies[written.digest]
            match written:
                case Failure():
                    self._fail(copy, written.error, written.cause)
                case _Written():
                    copy.event = written.event
        ended = [copy for copy in self._copies.values() if copy.event and copy.event.done()]
        for copy in ended:
            assert copy.place is not None
            packed = self._copies.pop(copy.packed.digest).packed
            self.seconds += time.monotonic() - copy.began
            if copy.error is not None:
                self._arena.give(copy.place)
                yield Failure(digest=packed.digest, error=copy.error)
                continue
            adapter = DeviceAdapter.of(packed, self._buffer(packed.buffer.dtype, copy.place))
            self._here[packed.digest] = adapter, copy.place
            yield adapter

    def release(self, digest: str) -> None:
        """Gives back the place of an adapter that arrived; steps under way may still read it."""
        _, place = self._here.pop(digest)
        self._arena.give(place)

    def close(self) -> None:
        """Ends the thread after what it has to do."""
        self._thread.close()

    # -- places -----------------------------------------------------------------------------------

    def _find_place(
        self,
        copy: _Copy,
        movable: Callable[[], Collection[str]],
        moved: dict[str, DeviceAdapter],
    ) -> bool:
        """False: copies under way, or pins, lie between the holes that would be enough."""
        nbytes = copy.packed.nbytes
        copy.place = self._arena.take(nbytes)
        if copy.place is None:
            digests = {self._here[digest][1]: digest for digest in movable()}
            for place in self._arena.compact(nbytes, digests.__contains__):
                old, _ = self._here[digests[place]]
                new = replace(old, buffer=self._buffer(old.buffer.dtype, place))
                self._here[new.digest] = new, place
                moved[new.digest] = new
            copy.place = self._arena.take(nbytes)
        if copy.place is None:
            return False
        source = copy.packed.buffer.view(torch.uint8)
        target = self._arena.bytes_of(copy.place)[: len(source)]
        pieces = zip(torch.split(target, PIECE), torch.split(source, PIECE), strict=True)
        copy.left.extend(pieces)
        return True

    def _buffer(self, dtype: torch.dtype, place: Slice) -> Tensor:
        return self._arena.bytes_of(place).view(dtype)

    # -- work -------------------------------------------------------------------------------------

    def _add(self, copy: _Copy, *, urgent: bool) -> None:
        try:
            while copy.packed.pinned and copy.left and (urgent or self._may_add_ahead()):
                self._add_piece(copy.left)
                if not urgent:
                    self._ahead.append(self._streams.copies.record())
            if copy.packed.pinned and copy.left:
                return
            if copy.left or copy.packed.lacks_rows:
                copy.in_thread = True
                self._thread.submit(copy.packed.digest, partial(self._add_rest, copy))
            else:
                copy.event = self._streams.copies.record()
        except Exception as error:
            self._fail(copy, _failed(copy.packed, error), error)

    def _may_add_ahead(self) -> bool:
        while self._ahead and self._ahead[0].done():
            self._ahead.popleft()
        return len(self._ahead) < PIECES_AHEAD

    def _add_piece(self, left: deque[tuple[Tensor, Tensor]]) -> None:
        target, source = left.popleft()
        self._streams.copies.run(partial(target.copy_, source, non_blocking=True))

    def _add_rest(self, copy: _Copy) -> _Written:
        """In the thread: what keeps its caller waiting."""
        try:
            while copy.left:
                self._add_piece(copy.left)
            if copy.packed.lacks_rows:
                self._add_rows(copy)
            return _Written(copy.packed.digest, self._streams.copies.record())
        except Exception as error:
            if breaks_device(error):
                raise
            raise _failed(copy.packed, error) from error

    def _add_rows(self, copy: _Copy) -> None:
        """The base's rows of a draft vocabulary, which are on the device."""
        packed = copy.packed
        assert copy.place is not None
        slot = packed.layout.slots[DRAFT_KEY]
        buffer = self._buffer(packed.buffer.dtype, copy.place)
        rows_NH = buffer[slot.offset : slot.offset + prod(slot.shape)].view(slot.shape)
        ids = packed.layout.draft_vocabulary
        self._streams.copies.run(partial(self._head_rows, ids, rows_NH))

    def _fail(self, copy: _Copy, error: LorastackError, cause: Exception | None) -> None:
        """This copy fails once the stream has left its place. Raises what broke the device."""
        if cause is not None and breaks_device(cause):
            raise cause
        log.error("%s", error, exc_info=cause)
        copy.error = error
        copy.event = self._streams.copies.record()


def _failed(packed: PackedAdapter, error: Exception) -> InternalError:
    return InternalError(
        f"copying adapter {packed.digest} to the device failed: {error}; send the request again, "
        "and restart the server if it fails again"
    )
