"""Copies of adapters to a device of its own: into an arena, on one stream, told by events.

Step thread only. Adding a copy to the stream takes microseconds, so no thread does it. Two things
would keep the step thread waiting and run in a thread: pageable memory, and rows of the base's
lm_head, which the device gathers itself. A second thread makes what steps read adapters by, for
their places: for a copy while its bytes are under way, for a move before it.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Container, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from math import prod

import torch
from torch import Tensor

from lorastack.adapters.memory.arena import PIECE, DeviceArena
from lorastack.adapters.memory.device import DeviceAdapter, MakeViews, no_views
from lorastack.adapters.memory.host import HeadRows, PackedAdapter
from lorastack.adapters.memory.space import Slice
from lorastack.adapters.memory.stream import Event, Streams
from lorastack.adapters.memory.threads import LOAD_NICENESS, Failure, JobThread, be_nice
from lorastack.errors import InternalError, LorastackError, breaks_device
from lorastack.layout import DRAFT_KEY, AdapterLayout

PIECES_AHEAD = 4  # under way at once for those that no row waits for; a row waits for them at most

log = logging.getLogger(__name__)

Made = Future[tuple[DeviceAdapter, Event]]  # an adapter that can be read behind the event


@dataclass(slots=True)
class _Copy:
    """One under way. place: None while it waits for one. left: pieces to add to the stream.

    made: what it will be, once it has a place. event: behind all of its bytes. error: what it
    failed with; the event still counts, as the stream may be writing until then.
    """

    packed: PackedAdapter
    place: Slice | None = None
    made: Made | None = None
    left: deque[tuple[Tensor, Tensor]] = field(default_factory=deque)
    in_thread: bool = False
    event: Event | None = None
    error: LorastackError | None = None
    began: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, slots=True)
class _Moves:
    """Neighbours that shall move for a copy's room: where each is to begin, what it will be."""

    targets: Mapping[str, int]
    made: Mapping[str, Made]


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
        make_views: MakeViews = no_views,
    ) -> None:
        """head_rows: see `Backend`. on_finished: called from a thread when it has done its part.

        make_views: see `DeviceAdapter`. Its thread's current stream is `Streams.views`.
        """
        self.seconds = 0.0  # total of all copies, from start to end
        self._arena = arena
        self._streams = streams
        self._head_rows = head_rows
        self._copies: dict[str, _Copy] = {}  # in order of start
        self._here: dict[str, tuple[DeviceAdapter, Slice]] = {}
        self._ahead: deque[Event] = deque()  # of pieces that no row waits for
        self._moves: _Moves | None = None
        self._make_views = make_views
        self._on_finished = on_finished
        self._thread: JobThread[_Written] = JobThread("adapter-copies", on_finished)
        self._making = ThreadPoolExecutor(
            1, "adapter-views", initializer=be_nice, initargs=(LOAD_NICENESS,)
        )

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
            if copy.event is not None or copy.in_thread:
                continue
            if copy.place is None and room:  # none passes one that waits for its place
                room = self._find_place(copy, movable, moved)
            if copy.place is not None:
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
        for copy in [copy for copy in self._copies.values() if self._has_ended(copy)]:
            digest = copy.packed.digest
            del self._copies[digest]
            self.seconds += time.monotonic() - copy.began
            if copy.error is not None:
                if copy.place is not None:
                    self._arena.give(copy.place)
                yield Failure(digest=digest, error=copy.error)
                continue
            assert copy.made is not None and copy.place is not None
            adapter, _ = copy.made.result()
            self._here[digest] = adapter, copy.place
            yield adapter

    def release(self, digest: str) -> None:
        """Gives back the place of an adapter that arrived; steps under way may still read it."""
        _, place = self._here.pop(digest)
        self._arena.give(place)

    def close(self) -> None:
        """Ends the threads after what they are at."""
        self._thread.close()
        self._making.shutdown(cancel_futures=True)

    # -- places -----------------------------------------------------------------------------------

    def _find_place(
        self,
        copy: _Copy,
        movable: Callable[[], Collection[str]],
        moved: dict[str, DeviceAdapter],
    ) -> bool:
        """False: not yet. Neighbours shall move first, or what lies between the holes that would
        be enough cannot: copies under way, or what is pinned."""
        packed = copy.packed
        copy.place = self._arena.take(packed.nbytes)
        if copy.place is None:
            moved |= self._make_room(copy, movable())
            copy.place = self._arena.take(packed.nbytes)
        if copy.place is None:
            return False
        copy.made = self._make(packed.digest, packed.layout, packed.buffer.dtype, copy.place)
        source = packed.buffer.view(torch.uint8)
        target = self._arena.bytes_of(copy.place)[: len(source)]
        pieces = zip(torch.split(target, PIECE), torch.split(source, PIECE), strict=True)
        copy.left.extend(pieces)
        return True

    def _make_room(self, copy: _Copy, movable: Collection[str]) -> dict[str, DeviceAdapter]:
        """Moves neighbours, if what they will be is made by now. Returns those that moved."""
        digests = {self._here[digest][1]: digest for digest in movable}
        plan = self._arena.plan(copy.packed.nbytes, digests.__contains__)
        targets = {digests[move.slice]: move.target for move in plan}
        if self._moves is None or self._moves.targets != targets:
            made = {digest: self._make_moved(digest, target) for digest, target in targets.items()}
            self._moves = _Moves(targets, made)
        try:
            if not plan or not all(map(_is_ready, self._moves.made.values())):
                return {}
        except Exception as error:
            self._moves = None
            self._fail(copy, _failed(copy.packed, error), error)
            return {}
        moved = {digest: made.result()[0] for digest, made in self._moves.made.items()}
        self._arena.move(plan)
        self._moves = None
        for move in plan:
            digest = digests[move.slice]
            self._here[digest] = moved[digest], move.slice
        return moved

    def _make_moved(self, digest: str, target: int) -> Made:
        old, _ = self._here[digest]
        return self._make(digest, old.layout, old.buffer.dtype, Slice(target, old.nbytes))

    def _make(self, digest: str, layout: AdapterLayout, dtype: torch.dtype, place: Slice) -> Made:
        buffer = self._buffer(dtype, place)

        def make() -> tuple[DeviceAdapter, Event]:
            with self._streams.views.current():
                views = self._make_views(digest, buffer, layout)
            adapter = DeviceAdapter(digest=digest, buffer=buffer, layout=layout, views=views)
            return adapter, self._streams.views.record()

        made = self._making.submit(make)
        made.add_done_callback(lambda _: self._on_finished())
        return made

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

    def _has_ended(self, copy: _Copy) -> bool:
        """True once it can be read, or has failed and the stream has left its place."""
        if copy.event is None or not copy.event.done():
            return False
        if copy.error is None:
            assert copy.made is not None
            try:
                return _is_ready(copy.made)
            except Exception as error:
                self._fail(copy, _failed(copy.packed, error), error)
                return False
        return True

    def _fail(self, copy: _Copy, error: LorastackError, cause: Exception | None) -> None:
        """This copy fails once the stream has left its place. Raises what broke the device."""
        if cause is not None and breaks_device(cause):
            raise cause
        log.error("%s", error, exc_info=cause)
        copy.error = error
        copy.event = self._streams.copies.record()


def _is_ready(made: Made) -> bool:
    """Raises what making it raised."""
    return made.done() and made.result()[1].done()


def _failed(packed: PackedAdapter, error: Exception) -> InternalError:
    return InternalError(
        f"copying adapter {packed.digest} to the device failed: {error}; send the request again, "
        "and restart the server if it fails again"
    )
