"""Adapters on their way: one thread loads from disk to the host, others copy to the device.

A slow copy holds up no load, a slow load no copy, and copies that are slow to begin overlap. All
methods are for the step thread and never wait; `seconds` is for any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from functools import partial

from lorastack.adapters.memory.device import Copy, DeviceAdapter
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.threads import Failure, JobThreads
from lorastack.errors import LorastackError

COPIES = 8  # under way at once


class Pipeline:
    """Loads and copies under way, host copies that wait for room on the device, and failures."""

    def __init__(self, host: HostCache, copy: Copy | None, on_finished: Callable[[], None]) -> None:
        """copy: None if host copies serve as they are. on_finished: called from their threads."""
        self.loading: set[str] = set()
        self.packed: dict[str, PackedAdapter] = {}
        self.copying: dict[str, int] = {}  # digest -> bytes it will take on the device
        self._failed: dict[str, LorastackError] = {}
        self._told: set[str] = set()  # failures that were raised since `keep_only`
        self._host = host
        self._on_finished = on_finished
        self._copy = copy
        self._loads: JobThreads[PackedAdapter] = JobThreads("adapter-loads", 1, on_finished)
        self._copies: JobThreads[DeviceAdapter] = JobThreads("adapter-copies", COPIES, on_finished)

    def has(self, digest: str) -> bool:
        """True if it is on its way, or its load failed."""
        places = (self.loading, self.packed, self.copying, self._failed)
        return any(digest in place for place in places)

    def size(self, digest: str) -> int | None:
        """Bytes of an adapter that is on the host; None before."""
        packed = self.packed.get(digest)
        return self.copying.get(digest) if packed is None else packed.nbytes

    def raise_failure(self, digests: Collection[str]) -> None:
        """Raises what the load of one of them ended with."""
        for digest in digests:
            if error := self._failed.get(digest):
                self._told.add(digest)
                raise error

    def load(self, digest: str) -> None:
        """Starts the load of an adapter for which `has` is false. A host copy is taken at once."""
        if (packed := self._host.find(digest)) is not None:
            self.packed[digest] = packed
            self._on_finished()
            return
        self.loading.add(digest)
        self._loads.submit(digest, partial(self._host.get, digest))

    def copy(self, digest: str) -> DeviceAdapter | None:
        """Starts the copy of what waits in `packed`; the adapter itself if none is needed."""
        packed = self.packed.pop(digest)
        if self._copy is None:
            return DeviceAdapter.of(packed, packed.buffer)
        self.copying[digest] = packed.nbytes
        self._copies.submit(digest, partial(self._copy, packed))
        return None

    def take_finished(self) -> tuple[bool, list[DeviceAdapter]]:
        """True if a load or a copy ended since the last call, and what arrived on the device.

        Raises what broke the device.
        """
        loaded, copied = list(self._loads.finished()), list(self._copies.finished())
        arrived: list[DeviceAdapter] = []
        for result in (*loaded, *copied):
            self.loading.discard(result.digest)
            self.copying.pop(result.digest, None)
            match result:
                case Failure():
                    if result.cause is not None:
                        raise result.cause
                    self._failed[result.digest] = result.error
                case PackedAdapter():
                    self.packed[result.digest] = result
                case DeviceAdapter():
                    arrived.append(result)
        return bool(loaded or copied), arrived

    def keep_only(self, asked: Container[str]) -> None:
        """Lets go of what nobody asks for any more, and of failures that were raised."""
        told, self._told = self._told, set()
        self.packed = {digest: packed for digest, packed in self.packed.items() if digest in asked}
        self._failed = {
            digest: error
            for digest, error in self._failed.items()
            if digest in asked and digest not in told
        }

    def drop(self, digest: str) -> bool:
        """Lets go of the host copy; False while a load or a copy is under way."""
        if digest in self.loading or digest in self.copying:
            return False
        self.packed.pop(digest, None)
        self._host.drop(digest)
        return True

    @property
    def seconds(self) -> float:
        """Total run time of loads and copies. Any thread."""
        return self._loads.seconds + self._copies.seconds

    def close(self) -> None:
        """Ends the threads after the jobs that are queued."""
        self._loads.close()
        self._copies.close()
