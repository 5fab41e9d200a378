"""How many transfers run at once, of everybody and of one caller, and how long one may stand still.

Until callers have keys, a caller is an address: everybody behind one proxy is one caller.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import TypeVar
from urllib.parse import unquote

from lorastack.config import KIB
from lorastack.errors import AbortedError, Reason, ResourceExhaustedError
from lorastack.service.edge.status import Context

STALLED = 10.0  # seconds of waiting for PACE bytes, after which a transfer makes way for a new one
PACE = 64 * KIB  # bytes
RETRY_SECONDS = 5.0  # what a refused caller is told to wait

T = TypeVar("T")


def caller_of(context: Context) -> str:
    """Who calls, as well as it is known: the address without its port; for IPv6 the network."""
    kind, _, rest = unquote(context.peer()).partition(":")
    address = rest.rpartition(":")[0].strip("[]").partition("%")[0]
    if kind == "ipv6":
        try:
            return f"ipv6:{ipaddress.ip_network((address, 64), strict=False)}"
        except ValueError:
            pass
    return f"{kind}:{address}"


class Place:
    """One transfer's place; it measures how long the transfer waits for its caller."""

    def __init__(self, caller: str, idle: float) -> None:
        self.caller = caller
        self.displaced = False
        self.limit = asyncio.timeout(None)
        self._idle = idle
        self._silent = 0.0  # seconds waited since the last byte
        self._stalled = 0.0  # seconds waited since the last PACE bytes
        self._num_bytes = 0
        self._since: float | None = None  # time.monotonic() when its wait began

    async def waits(self, answer: Awaitable[T]) -> T:
        """Waits for the caller's `answer`. Only this time counts, not the server's own."""
        self._since = time.monotonic()
        self._set_limit(asyncio.get_running_loop().time() + self._idle - self._silent)
        result = await answer
        waited, self._since = time.monotonic() - self._since, None
        self._silent += waited
        self._stalled += waited
        self._set_limit(None)
        return result

    def _set_limit(self, when: float | None) -> None:
        if not self.displaced:  # else it ends soon, whatever comes meanwhile
            self.limit.reschedule(when)

    def passed(self, num_bytes: int) -> None:
        """Counts bytes that have come or gone."""
        if num_bytes:
            self._silent = 0.0
        self._num_bytes += num_bytes
        if self._num_bytes >= PACE:
            self._num_bytes, self._stalled = 0, 0.0

    def stalled(self) -> float:
        """Seconds it has waited for PACE bytes; 0 if it does not wait for its caller now."""
        return 0.0 if self._since is None else self._stalled + time.monotonic() - self._since

    def displace(self) -> None:
        """Ends the transfer, so that another one has the place."""
        if not self.limit.expired():  # else it ends already
            self.displaced = True
            self.limit.reschedule(asyncio.get_running_loop().time())


class Places:
    """The places of one kind of transfer. Event loop only."""

    def __init__(self, kind: str, *, together: int, per_caller: int, idle: float) -> None:
        """kind: its name in messages. together, per_caller: places at a time.

        idle: seconds that a transfer may wait for its caller without a byte.
        """
        self._kind = kind
        self._together = together
        self._per_caller = per_caller
        self._idle = idle
        self._taken: list[Place] = []

    @asynccontextmanager
    async def take(self, caller: str) -> AsyncIterator[Place]:
        """A place for the block, which ends when its caller is idle for too long.

        Raises ResourceExhaustedError when all are taken, or when this one stalls and another
        transfer needs it; AbortedError for an idle caller.
        """
        self._make_way(caller)
        place = Place(caller, self._idle)
        self._taken.append(place)
        try:
            async with place.limit:
                yield place
        except TimeoutError:
            if not place.limit.expired():
                raise
            raise self._ended(place) from None
        finally:
            if place in self._taken:
                self._taken.remove(place)

    def _make_way(self, caller: str) -> None:
        theirs = [place for place in self._taken if place.caller == caller]
        if len(theirs) >= self._per_caller:
            self._displace(theirs, f"{self._per_caller} {self._kind}s of your address run already")
        if len(self._taken) >= self._together:
            self._displace(self._taken, f"{self._together} {self._kind}s run already")

    def _displace(self, places: list[Place], why: str) -> None:
        slowest = max(places, key=Place.stalled)
        if slowest.stalled() < STALLED:
            raise ResourceExhaustedError(
                f"{why}: try again when one has ended",
                reason=Reason.TOO_MANY_TRANSFERS,
                retry_after=RETRY_SECONDS,
            )
        slowest.displace()
        self._taken.remove(slowest)

    def _ended(self, place: Place) -> AbortedError | ResourceExhaustedError:
        if place.displaced:
            return ResourceExhaustedError(
                f"this {self._kind} stood still and made way for another one: try again",
                reason=Reason.TOO_MANY_TRANSFERS,
                retry_after=RETRY_SECONDS,
            )
        return AbortedError(
            f"this {self._kind} waited {self._idle:g} seconds for its caller: try again",
            reason=Reason.TRANSFER_IDLE,
        )
