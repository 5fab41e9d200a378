"""Host copies of adapters: packed flat buffers under a budget of bytes, least recently used out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from lorastack.layout import AdapterLayout

HeadRows = Callable[[Sequence[int], Tensor], None]  # see `model.backends.base`


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """An adapter ready for its copy to a device. buffer: flat, on the CPU, read-only by custom.

    It may lack the rows of the base's lm_head at its end, which the device has itself. pinned: it
    is page-locked.
    """

    digest: str
    buffer: Tensor
    layout: AdapterLayout
    pinned: bool = False

    @property
    def nbytes(self) -> int:
        """On the device."""
        return self.layout.nbytes

    @property
    def lacks_rows(self) -> bool:
        """True if the copy has to bring the rows of a draft vocabulary."""
        return self.buffer.nbytes < self.nbytes and bool(self.layout.draft_vocabulary)


class HostCache:
    """Packed adapters by digest. Any thread may call anything.

    `load` runs in the caller's thread, outside the lock; two callers that miss the same digest at
    once may both load it, and one of the equal results stays.
    """

    def __init__(self, budget: int, load: Callable[[str], PackedAdapter]) -> None:
        """budget: bytes."""
        self._budget = budget
        self._load = load
        self._lock = Lock()
        self._entries: OrderedDict[str, PackedAdapter] = OrderedDict()  # oldest use first
        self._nbytes = 0
        self.num_hits = 0  # look-ups that found a copy
        self.num_misses = 0  # loads that ended well

    def find(self, digest: str) -> PackedAdapter | None:
        """The host copy, if there is one. Never waits for a load."""
        with self._lock:
            entry = self._entries.get(digest)
            if entry is not None:
                self._entries.move_to_end(digest)
                self.num_hits += 1
            return entry

    def get(self, digest: str) -> PackedAdapter:
        """The host copy, loaded if need be. Raises what `load` raises.

        An adapter larger than the whole budget is returned but not kept.
        """
        if (entry := self.find(digest)) is not None:
            return entry
        loaded = self._load(digest)
        with self._lock:
            self.num_misses += 1
            self._keep(loaded)
        return loaded

    def drop(self, digest: str) -> None:
        """Lets go of a copy, if there is one."""
        with self._lock:
            if entry := self._entries.pop(digest, None):
                self._nbytes -= entry.buffer.nbytes

    def drop_oldest(self) -> bool:
        """Lets go of the copy that was used least recently; False if there is none."""
        with self._lock:
            return self._drop_oldest()

    def _drop_oldest(self) -> bool:
        if not self._entries:
            return False
        _, oldest = self._entries.popitem(last=False)
        self._nbytes -= oldest.buffer.nbytes
        return True

    def _keep(self, loaded: PackedAdapter) -> None:
        nbytes = loaded.buffer.nbytes
        if loaded.digest in self._entries or nbytes > self._budget:
            return
        while self._nbytes + nbytes > self._budget:
            self._drop_oldest()
        self._entries[loaded.digest] = loaded
        self._nbytes += nbytes

    def snapshot(self) -> dict[str, int]:
        """Digest -> bytes of every host copy, least recently used first."""
        with self._lock:
            return {digest: entry.buffer.nbytes for digest, entry in self._entries.items()}
