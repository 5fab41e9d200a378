"""What other threads want of the step thread."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any, NamedTuple

from lorastack.errors import InternalError

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """What the step thread shall do, and who wants to know."""

    call: Callable[[], None]
    future: Future[Any] | None = None

    def carry_out(self) -> None:
        """One that fails is nobody's but its own."""
        try:
            self.call()
        except Exception as error:
            log.error("an order to the engine failed", exc_info=error)
            if self.future is not None:
                with suppress(InvalidStateError):  # it has ended, or nobody waits any more
                    self.future.set_exception(InternalError("the server failed; its log says why"))
