"""What operators ask of the device: load, unload, forget. Step thread only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from lorastack.adapters.memory.pool import DevicePool
from lorastack.errors import InternalError, LorastackError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Load:
    """digests: the adapter's, and of what it needs beside it."""

    digest: str
    digests: tuple[str, ...]
    pin: bool
    future: Future[None]


@dataclass(slots=True, kw_only=True)
class _Leaving:
    """An adapter that goes when no row uses it. forgotten: all that is kept of it goes as well."""

    forgotten: bool = False
    futures: list[Future[None]] = field(default_factory=list)


class Residency:
    """Orders that wait. A load asks the pool once a step, as a row would, until all is there."""

    def __init__(
        self,
        pool: DevicePool,
        *,
        in_use: Callable[[str], bool],
        on_forgotten: Callable[[str], None],
    ) -> None:
        """in_use: True if a row, running or not, uses this digest.

        on_forgotten: called after `forget`, once no row uses the digest any more.
        """
        self._pool = pool
        self._in_use = in_use
        self._on_forgotten = on_forgotten
        self._loads: list[_Load] = []
        self._leaving: dict[str, _Leaving] = {}

    def load(self, digest: str, pin: bool, future: Future[None], needs: Sequence[str] = ()) -> None:
        """future: done when it is on the device with all that it needs beside it, or has the error.

        Undoes `unload` and `forget`.
        """
        load = _Load(digest, tuple(dict.fromkeys((digest, *needs))), pin, future)
        self._loads.append(load)
        for each in load.digests:
            if leaving := self._leaving.pop(each, None):
                _finish(leaving)

    def unload(self, digest: str, future: Future[None]) -> None:
        """Unpins at once; future: done when no row uses it any more and all copies are gone."""
        self._pool.unpin(digest)
        self._leaving.setdefault(digest, _Leaving()).futures.append(future)

    def forget(self, digest: str) -> None:
        """As `unload`; then `on_forgotten` drops all else that the engine keeps of it."""
        self._pool.unpin(digest)
        self._leaving.setdefault(digest, _Leaving()).forgotten = True

    def step(self) -> None:
        """Carry out what can be done now. Called between two calls of the pool's `poll`."""
        self._loads = [load for load in self._loads if not self._try_load(load)]
        wanted = {digest for load in self._loads for digest in load.digests}
        for digest, leaving in list(self._leaving.items()):
            if digest in wanted or self._in_use(digest) or not self._pool.drop(digest):
                continue
            del self._leaving[digest]
            try:
                if leaving.forgotten:
                    self._on_forgotten(digest)
            finally:
                _finish(leaving)

    def end(self, error: LorastackError) -> None:
        """End all orders that still wait with `error`."""
        futures = [load.future for load in self._loads]
        futures += [future for leaving in self._leaving.values() for future in leaving.futures]
        self._loads, self._leaving = [], {}
        for future in futures:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _try_load(self, load: _Load) -> bool:
        """True if the order is settled, one way or the other."""
        future = load.future
        if future.cancelled():
            return True
        try:
            if self._pool.acquire(load.digests) is None:
                return False
        except Exception as error:
            if not isinstance(error, LorastackError):
                log.error("loading %s failed", load.digest, exc_info=error)
                error = InternalError("the server failed to load it; its log says why")
            if future.set_running_or_notify_cancel():
                future.set_exception(error)
            return True
        self._pool.release(load.digests)
        if future.set_running_or_notify_cancel():
            if load.pin:
                self._pool.pin(load.digest, load.digests)
            future.set_result(None)
        return True


def _finish(leaving: _Leaving) -> None:
    for future in leaving.futures:
        if future.set_running_or_notify_cancel():
            future.set_result(None)
