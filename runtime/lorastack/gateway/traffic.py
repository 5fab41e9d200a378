"""What all exchanges share: how much of their bodies is held at once, and their end with us."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

from starlette.datastructures import Headers
from starlette.types import Receive

from lorastack.config import KIB, MIB
from lorastack.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError

BODY_PATIENCE = 30.0  # seconds until a request's body must be there
SMALL_BODY = 64 * KIB  # is always read; what bodies have beyond counts
MAX_HELD = 256 * MIB  # of what counts, of all bodies that are being read

T = TypeVar("T")


class Gone(Exception):
    """The caller has gone before all was said."""


class Traffic:
    """The open exchanges of one gateway. stopping: they are being ended, as it stops."""

    def __init__(self, max_body: int) -> None:
        """max_body: bytes of a request."""
        self._max_body = max_body
        self._held = 0
        self._open: set[asyncio.Task[None]] = set()
        self.stopping = False

    @property
    def num_open(self) -> int:
        """Requests that are being answered."""
        return len(self._open)

    def add(self, working: asyncio.Task[None]) -> None:
        """Counts a request until its task ends."""
        self._open.add(working)
        working.add_done_callback(self._open.discard)

    def stop(self) -> None:
        """Ends what is open; each tells its caller why."""
        self.stopping = True
        for working in list(self._open):
            working.cancel()

    async def read(self, headers: Headers, receive: Receive, use: Callable[[bytearray], T]) -> T:
        """Reads a request's body and gives what `use` makes of it.

        Raises InvalidArgumentError when it is too long, ResourceExhaustedError when too many long
        ones are read, DeadlineExceededError when it takes too long, Gone, and what `use` raises.
        """
        length = headers.get("content-length", "0")
        if len(length) > 20 or (length.isdecimal() and int(length) > self._max_body):
            raise self._too_large()
        raw = bytearray()
        counted = 0
        try:
            async with asyncio.timeout(BODY_PATIENCE):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    raw += message.get("body", b"")
                    if len(raw) > self._max_body:
                        raise self._too_large()
                    counted += self._hold(max(0, len(raw) - SMALL_BODY) - counted)
                    more = message.get("more_body", False)
            return use(raw)
        except TimeoutError:
            raise DeadlineExceededError(
                f"the request's body did not come within {BODY_PATIENCE:.0f} s; send it again"
            ) from None
        finally:
            self._held -= counted

    def _hold(self, size: int) -> int:
        if size and self._held + size > MAX_HELD:
            raise ResourceExhaustedError(
                "too many long requests are being read; try again in a moment", retry_after=1.0
            )
        self._held += size
        return size

    def _too_large(self) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the body has more than {self._max_body} bytes; send a shorter one", field="body"
        )
