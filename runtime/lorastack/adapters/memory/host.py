"""Host copies of adapters: packed flat buffers under a budget of bytes, least recently used out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock

from torch import Tensor

from lorastack.layout import AdapterLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAdapter:
    """An adapter ready for one copy to a device. buffer: flat, on the CPU, read-only by custom."""

    digest: str
    buffer: Tensor
    layout: AdapterLayout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


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
                self._nbytes -= entry.nbytes

    def _keep(self, loaded: PackedAdapter) -> None:
        if loaded.digest in self._entries or loaded.nbytes > self._budget:
            return
        while self._nbytes + loaded.nbytes > self._budget:
            _, oldest = self._entries.popitem(last=False)
            self._nbytes -= oldest.nbytes
        self._entries[loaded.digest] = loaded
        self._nbytes += loaded.nbytes

    def snapshot(self) -> dict[str, int]:
        """Digest -> bytes of every host copy, least recently used first."""
        with self._lock:
            return {digest: entry.nbytes for digest, entry in self._entries.items()}
