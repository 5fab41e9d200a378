"""Memory for adapters that is made once: on the device one arena, on the host page-locked slabs.

So an adapter that comes or goes allocates nothing, and the bytes that are counted are the bytes
that are taken.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from weakref import finalize

import torch
from torch import Tensor

from lorastack.adapters.memory.space import Move, Slice, Space
from lorastack.adapters.memory.stream import Event, Streams
from lorastack.config import MIB
from lorastack.errors import DeviceLostError

PIECE = 16 * MIB  # bytes that are copied at once
SLAB = 256 * MIB  # bytes; a power of two, which is what torch's allocator rounds to

log = logging.getLogger(__name__)


class DeviceArena:
    """Bytes on a device, given out in slices. Step thread only; nothing waits.

    A slice that is given back may still be read by steps under way: whoever takes its bytes writes
    them in the stream of copies, which waits for those steps first.
    """

    def __init__(self, nbytes: int, device: torch.device, streams: Streams) -> None:
        self._streams = streams
        self._space = Space(nbytes)
        self._bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        # What moves by less than its length goes through here.
        self._scratch = torch.empty(min(PIECE, nbytes), dtype=torch.uint8, device=device)
        self._busy: list[tuple[int, int, Event]] = []  # start, end, and when steps have left them

    def bytes_of(self, taken: Slice) -> Tensor:
        """uint8 [nbytes], until the slice moves or is given back."""
        return self._bytes[taken.start : taken.end]

    def take(self, nbytes: int) -> Slice | None:
        """Bytes to write in the stream of copies; None if no hole is large enough."""
        taken = self._space.take(nbytes)
        if taken is not None:
            self._prune()
            for start, end, event in self._busy:
                if start < taken.end and taken.start < end:
                    self._streams.copies.wait(event)
        return taken

    def give(self, taken: Slice) -> None:
        """Gives back what no step uses that begins from now on."""
        self._prune()
        self._busy.append((taken.start, taken.end, self._streams.steps.record()))
        self._space.give(taken)

    def plan(self, nbytes: int, movable: Callable[[Slice], bool]) -> list[Move]:
        """What `move` can do for a hole of `nbytes`; [] if that is nothing.

        movable: True for slices whose copies are done and that only steps use.
        """
        return self._space.plan(nbytes, movable)

    def move(self, moves: Sequence[Move]) -> None:
        """Carries out what `plan` gives now.

        Slices move in the stream of steps: behind all that read them at their old places, before
        any that reads them at the new ones. What is moved takes steps as long as it takes to read
        and write it. Raises DeviceLostError if it fails: what slices hold is not known then.
        """
        first, last = moves[0], moves[-1]
        left = first.target, last.slice.end
        try:
            for move in moves:
                self._move(move.slice, move.target)
        except Exception as error:
            raise DeviceLostError(
                f"adapters could not be moved on the device: {error}; restart the server"
            ) from error
        self._space.move(moves)
        self._busy.append((*left, self._streams.steps.record()))

    def _move(self, taken: Slice, target: int) -> None:
        """Down to `target`, in pieces that overwrite nothing that is still to be read."""
        distance = taken.start - target
        whole = distance >= taken.nbytes
        size = taken.nbytes if whole else len(self._scratch)
        new = self.bytes_of(Slice(target, taken.nbytes))
        pieces = zip(torch.split(self.bytes_of(taken), size), torch.split(new, size), strict=True)
        for piece, place in pieces:
            if distance < len(piece):
                between = self._scratch[: len(piece)]
                self._streams.steps.run(partial(between.copy_, piece))
                piece = between
            self._streams.steps.run(partial(place.copy_, piece))

    def _prune(self) -> None:
        self._busy = [each for each in self._busy if not each[2].done()]


class PinnedArena:
    """Page-locked buffers on the host, cut from slabs. For the thread that loads adapters.

    A buffer's bytes are free again when nobody refers to it any more, in whichever thread that is.
    What fits in no slab, or comes when the system gives no more slabs, is pageable.
    """

    def __init__(
        self,
        nbytes: int,
        drop_oldest: Callable[[], bool],
        *,
        slab: int = SLAB,
        make: Callable[[int], Tensor] | None = None,
    ) -> None:
        """nbytes: of all slabs. drop_oldest: lets go of a buffer nobody needs; False: none is left.

        make: bytes of a slab -> uint8; None for page-locked memory.
        """
        self._slab = min(slab, nbytes)
        self._num_missing = nbytes // slab if self._slab == slab else 1
        self._drop_oldest = drop_oldest
        self._make = make or _page_locked
        self._slabs: list[tuple[Tensor, Space]] = []
        self._given: deque[tuple[Space, Slice]] = deque()  # by any thread

    def grow(self) -> bool:
        """Makes one more slab, which takes a while; False if there are all."""
        if not self._num_missing:
            return False
        try:
            made = self._make(self._slab)
        except RuntimeError as error:
            log.warning(
                "the system gives no more page-locked memory after %d MiB: other adapters are "
                "copied to the device more slowly; a smaller --host-adapter-memory avoids that: %s",
                len(self._slabs) * self._slab // MIB,
                error,
            )
            self._num_missing = 0
            return False
        self._slabs.append((made, Space(self._slab)))
        self._num_missing -= 1
        return True

    def empty(self, count: int, dtype: torch.dtype) -> Tensor:
        """A buffer of `count` elements, pageable if it must be."""
        nbytes = count * dtype.itemsize
        while nbytes <= self._slab:
            if (found := self._take(nbytes)) is not None:
                buffer, place = found[0].view(dtype), found[1:]
                finalize(buffer, self._given.append, place).atexit = False
                return buffer
            if not self.grow() and not self._drop_oldest():
                break
        return torch.empty(count, dtype=dtype)

    def _take(self, nbytes: int) -> tuple[Tensor, Space, Slice] | None:
        while self._given:
            space, taken = self._given.popleft()
            space.give(taken)
        for slab, space in self._slabs:
            if (found := space.take(nbytes)) is not None:
                return slab[found.start : found.end], space, found
        return None


def _page_locked(nbytes: int) -> Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
