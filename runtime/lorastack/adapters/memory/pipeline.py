"""Adapters on their way: one thread loads from disk to the host, `copies` bring them to the device.

Where several devices share the base model, `others` brings each adapter to the rest of them at the
same time; it has arrived when all have it.

All methods are for the step thread and never wait; `seconds` is for any thread.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container
from functools import partial
from typing import Protocol

from torch import Tensor

from lorastack.adapters.memory.copies import Copies
from lorastack.adapters.memory.device import DeviceAdapter, MakeViews, no_views
from lorastack.adapters.memory.host import HostCache, PackedAdapter
from lorastack.adapters.memory.stream import Event
from lorastack.adapters.memory.threads import Failure, JobThread
from lorastack.errors import LorastackError
from lorastack.layout import AdapterLayout


class Others(Protocol):
    """The other devices that share the base model. Nothing here waits."""

    def hand_over(self, digest: str, buffer: Tensor, layout: AdapterLayout) -> Event:
        """Begins to bring them an adapter's LoRA. The event: all have it."""
        ...

    def take_back(self, digest: str) -> None:
        """They let go of it. No step that begins from now on uses it."""
        ...


class Pipeline:
    """Loads and copies under way, host copies that wait for room on the device, and failures."""

    def __init__(
        self,
        host: HostCache,
        copies: Copies | None,
        on_finished: Callable[[], None],
        idle: Callable[[], bool] | None = None,
        others: Others | None = None,
        make_views: MakeViews = no_views,
    ) -> None:
        """copies: None if host copies serve as they are. on_finished: from the loads' thread.

        idle: what that thread does while it has nothing to load, see `JobThread`. others: None if
        there are none. make_views: of host copies that serve, see `DeviceAdapter`.
        """
        self.loading: set[str] = set()
        self.packed: dict[str, PackedAdapter | DeviceAdapter] = {}  # the latter if it serves
        self.copying: dict[str, int] = {}  # digest -> bytes it will take on the device
        self._failed: dict[str, LorastackError] = {}
        self._told: set[str] = set()  # failures that were raised since `keep_only`
        self._host = host
        self._on_finished = on_finished
        self._copies = copies
        self._others = others
        self._handed: dict[str, Event] = {}  # of what is under way: all others have it
        self._here: dict[str, DeviceAdapter] = {}  # of what is under way: is on this device
        self._make_views = make_views
        self._loads: JobThread[PackedAdapter | DeviceAdapter] = JobThread(
            "adapter-loads", on_finished, idle
        )
        # For host copies that serve and were there already: they wait for nobody's load.
        self._hits: JobThread[PackedAdapter | DeviceAdapter] = JobThread(
            "adapter-views", on_finished
        )

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
        """Starts the load of an adapter for which `has` is false. A host copy is taken as it is."""
        packed = self._host.find(digest)
        if packed is not None and self._copies is not None:
            self.packed[digest] = packed
            self._on_finished()
            return
        self.loading.add(digest)
        if packed is None:
            self._loads.submit(digest, lambda: self._served(self._host.get(digest)))
        else:
            self._hits.submit(digest, partial(self._served, packed))

    def copy(self, digest: str) -> DeviceAdapter | None:
        """Has what waits in `packed` copied; the adapter itself if no copy is needed."""
        packed = self.packed.pop(digest)
        if self._others is not None:
            self._handed[digest] = self._others.hand_over(digest, packed.buffer, packed.layout)
        elif isinstance(packed, DeviceAdapter):
            return packed
        self.copying[digest] = packed.nbytes
        if isinstance(packed, DeviceAdapter):
            self._here[digest] = packed
        else:
            assert self._copies is not None
            self._copies.start(packed)
        return None

    def advance(
        self, urgent: Container[str], movable: Callable[[], Collection[str]]
    ) -> list[DeviceAdapter]:
        """See `Copies`."""
        return [] if self._copies is None else self._copies.advance(urgent, movable)

    def release(self, digest: str) -> None:
        """Gives back the room of an adapter that arrived."""
        if self._copies is not None:
            self._copies.release(digest)
        if self._others is not None:
            self._others.take_back(digest)

    def take_finished(self) -> tuple[bool, list[DeviceAdapter]]:
        """True if a load or a copy ended since the last call, and what arrived.

        Raises what broke the device.
        """
        loaded = [*self._loads.finished(), *self._hits.finished()]
        copied = [] if self._copies is None else list(self._copies.finished())
        for result in loaded:
            self.loading.discard(result.digest)
            if isinstance(result, Failure):
                self._note(result)
            else:
                self.packed[result.digest] = result
        for copy in copied:
            if isinstance(copy, Failure):
                self._note(copy)
                del self.copying[copy.digest]
                if self._handed.pop(copy.digest, None) and self._others is not None:
                    self._others.take_back(copy.digest)
            else:
                self._here[copy.digest] = copy
        arrived = [each for digest, each in self._here.items() if self._is_everywhere(digest)]
        for adapter in arrived:
            for place in (self._here, self._handed, self.copying):
                place.pop(adapter.digest, None)
        return bool(loaded or copied or arrived), arrived

    def _is_everywhere(self, digest: str) -> bool:
        """True for what is here if the others have it too."""
        event = self._handed.get(digest)
        return event is None or event.done()

    def _note(self, failure: Failure) -> None:
        if failure.cause is not None:
            raise failure.cause
        self._failed[failure.digest] = failure.error

    def _served(self, packed: PackedAdapter) -> PackedAdapter | DeviceAdapter:
        """In a thread: a host copy as it goes on from here."""
        if self._copies is not None:
            return packed
        views = self._make_views(packed.digest, packed.buffer, packed.layout)
        return DeviceAdapter(
            digest=packed.digest, buffer=packed.buffer, layout=packed.layout, views=views
        )

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
        return self._loads.seconds + (0.0 if self._copies is None else self._copies.seconds)

    def close(self) -> None:
        """Ends the threads after what they are at."""
        self._loads.close()
        self._hits.close()
        if self._copies is not None:
            self._copies.close()
