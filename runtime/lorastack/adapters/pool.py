"""Device copies of adapters: loaded beside the step loop, pinned by running rows, evicted by age.

The step thread calls `poll`, then `acquire` for every row that wants to run, and `release`; it
never waits. A loader thread at the lowest priority fills host copies and copies them over; finished
ones are taken in by `poll`. On a CPU the host copy itself serves as the device copy, so nothing is
stored twice.

Progress: an adapter that was just placed is there for the acquires of the same step, so somebody
always runs. A stack needs more: the oldest set that waits is the claim, and while its rows keep
asking, its members are not evicted for others, so that it comes together whole.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from threading import Lock

import torch
from torch import Tensor

from lorastack.adapters.host import HostCache, PackedAdapter
from lorastack.adapters.loader import Failure, LoaderThread
from lorastack.errors import FailedPreconditionError, LorastackError, Reason
from lorastack.layout import AdapterLayout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class DeviceAdapter:
    """An adapter's flat buffer on the device. Valid while pinned.

    Compared by identity, so that views of the buffer can be kept for as long as it lives.
    """

    digest: str
    buffer: Tensor
    layout: AdapterLayout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


@dataclass(slots=True)
class _Resident:
    adapter: DeviceAdapter
    pins: int = 0


class DevicePool:
    """Adapters on one device under a budget of bytes. For the step thread, `resident` for any."""

    def __init__(
        self,
        budget: int,
        device: torch.device,
        host: HostCache,
        on_loaded: Callable[[], None] = lambda: None,
    ) -> None:
        """budget: bytes. on_loaded: called from the loader thread when `poll` has something."""
        self._budget = budget
        self._device = device
        self._host = host
        self._loader: LoaderThread[PackedAdapter | DeviceAdapter] = LoaderThread(on_loaded)
        self._lock = Lock()  # guards _residents against `resident` from other threads
        self._residents: OrderedDict[str, _Resident] = OrderedDict()  # oldest use first
        self._packed: dict[str, PackedAdapter] = {}  # on the host, waiting for room here
        self._copying: dict[str, int] = {}  # digest -> bytes reserved for a copy under way
        self._loading: set[str] = set()
        self._failed: dict[str, LorastackError] = {}
        self._asked: set[str] = set()  # missed since the last poll
        self._claim: frozenset[str] = frozenset()

    def acquire(self, digests: Sequence[str]) -> tuple[DeviceAdapter, ...] | None:
        """Pins all of them; or none, returns None and has them loaded: ask again after `poll`.

        A digest that is named twice is pinned twice. Raises once the LorastackError that its load
        ended with; FailedPreconditionError ADAPTER_TOO_LARGE if they cannot fit together.
        """
        wanted = dict.fromkeys(digests)
        for digest in wanted:
            if error := self._failed.pop(digest, None):
                raise error
        missing = [digest for digest in wanted if digest not in self._residents]
        if missing:
            self._check_size(wanted)
            self._ask(wanted, missing)
            return None
        if self._claim == wanted.keys():
            self._claim = frozenset()
        with self._lock:
            for digest in digests:
                self._residents[digest].pins += 1
                self._residents.move_to_end(digest)
            return tuple(self._residents[digest].adapter for digest in digests)

    def release(self, digests: Sequence[str]) -> None:
        """Gives back what `acquire` pinned."""
        with self._lock:
            for digest in digests:
                resident = self._residents[digest]
                assert resident.pins > 0, digest
                resident.pins -= 1

    def poll(self) -> bool:
        """Takes in what the loader finished and evicts for it; True if anything changed."""
        changed = False
        arrived: set[str] = set()
        for result in self._loader.finished():
            changed = True
            arrived.add(result.digest)
            self._loading.discard(result.digest)
            match result:
                case Failure():
                    self._copying.pop(result.digest, None)
                    self._failed[result.digest] = result.error
                case PackedAdapter():
                    self._packed[result.digest] = result
                case DeviceAdapter():
                    del self._copying[result.digest]
                    self._take_in(result)
        self._forget_unasked(arrived)
        for digest in sorted(self._packed, key=lambda digest: digest not in self._claim):
            changed |= self._place(self._packed[digest])
        self._asked.clear()
        return changed

    def resident(self) -> list[tuple[str, int, int]]:
        """(digest, bytes, pins) of every device copy, least recently used first. Any thread."""
        with self._lock:
            return [
                (digest, resident.adapter.nbytes, resident.pins)
                for digest, resident in self._residents.items()
            ]

    def close(self) -> None:
        """Ends the loader thread after the loads that are queued."""
        self._loader.close()

    def _ask(self, wanted: Collection[str], missing: Sequence[str]) -> None:
        self._asked.update(wanted)
        if not self._claim and len(wanted) > 1:
            self._claim = frozenset(wanted)
        with self._lock:
            for digest in wanted:
                if digest in self._residents:
                    self._residents.move_to_end(digest)
        for digest in missing:
            known = self._packed.keys() | self._copying.keys() | self._loading
            if digest not in known:
                self._loading.add(digest)
                self._loader.submit(digest, partial(self._host.get, digest))

    def _check_size(self, wanted: Collection[str]) -> None:
        """Refuses a set whose known members cannot be on the device together."""
        sizes = {digest: packed.nbytes for digest, packed in self._packed.items()}
        sizes |= {digest: resident.adapter.nbytes for digest, resident in self._residents.items()}
        total = sum(sizes.get(digest, 0) for digest in wanted)
        if total > self._budget:
            raise FailedPreconditionError(
                f"the request's adapters need {total} bytes on the device, but only "
                f"{self._budget} are set aside: raise --device-adapter-memory",
                reason=Reason.ADAPTER_TOO_LARGE,
                digests=",".join(sorted(wanted)),
            )

    def _forget_unasked(self, arrived: set[str]) -> None:
        """Drops what nobody has asked for since the last poll: its rows are gone."""
        keep = self._asked | arrived
        for digest in self._packed.keys() - keep:
            del self._packed[digest]
        for digest in self._failed.keys() - keep:
            del self._failed[digest]
        if not self._claim <= self._asked:
            self._claim = frozenset()

    def _place(self, packed: PackedAdapter) -> bool:
        """Brings a host copy onto the device if room can be made."""
        if packed.nbytes > self._budget:
            return False  # `acquire` tells whoever asks
        if not self._make_room(packed.nbytes):
            return False
        del self._packed[packed.digest]
        if self._device.type == "cpu":
            self._take_in(
                DeviceAdapter(digest=packed.digest, buffer=packed.buffer, layout=packed.layout)
            )
        else:
            self._copying[packed.digest] = packed.nbytes
            self._loader.submit(packed.digest, partial(self._copy, packed))
        return True

    def _make_room(self, nbytes: int) -> bool:
        """Evicts the least recently used until there is room; nothing if that would not help."""
        used = sum(resident.adapter.nbytes for resident in self._residents.values())
        excess = used + sum(self._copying.values()) + nbytes - self._budget
        victims: list[str] = []
        for digest, resident in self._residents.items():
            if excess <= 0:
                break
            if resident.pins == 0 and digest not in self._claim:
                victims.append(digest)
                excess -= resident.adapter.nbytes
        if excess > 0:
            return False
        with self._lock:
            for digest in victims:
                del self._residents[digest]
        return True

    def _take_in(self, adapter: DeviceAdapter) -> None:
        if adapter.buffer.is_cuda:
            # It was allocated on the loader's stream; freeing it must wait for this one's work.
            adapter.buffer.record_stream(torch.cuda.current_stream(adapter.buffer.device))
        with self._lock:
            self._residents[adapter.digest] = _Resident(adapter)

    def _copy(self, packed: PackedAdapter) -> DeviceAdapter:
        """Runs in the loader thread: one contiguous copy on a stream of its own."""
        if self._device.type == "cuda":
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                buffer = packed.buffer.to(self._device, non_blocking=True)
            stream.synchronize()
        else:
            buffer = packed.buffer.to(self._device)
        return DeviceAdapter(digest=packed.digest, buffer=buffer, layout=packed.layout)
