"""Between the step thread and all others: commands one way, the last step's state the other."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorastack.errors import InternalError, ResourceExhaustedError, UnavailableError

LONGEST_REST = 3600.0  # seconds; a condition cannot wait for any length of time

log = logging.getLogger(__name__)


class Command(NamedTuple):
    """A call for the step thread. future: ended with an error if the call raises."""

    call: Callable[[], None]
    future: Future[Any] | None = None

    def carry_out(self) -> None:
        """Make the call. What it raises is logged and goes no further."""
        try:
            self.call()
        except Exception as error:
            log.error("an order to the engine failed", exc_info=error)
            if self.future is not None:
                with suppress(InvalidStateError):  # it has ended, or nobody waits any more
                    self.future.set_exception(InternalError("the server failed; its log says why"))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineState:
    """What other threads may read of the engine, as of its last step. It never changes.

    num_pages: KV pages that are held by rows, cached for later ones, and free. heads_failures: by
    heads digest, the steps in which they gave NaN or infinity.
    """

    num_rows: int = 0
    num_waiting: int = 0
    num_parked: int = 0
    num_preemptions: int = 0
    num_pages: Mapping[str, int] = field(default_factory=dict)
    heads_failures: Mapping[str, int] = field(default_factory=dict)


class Inbox:
    """Thread-safe. One lock guards commands and state, so that every request is counted once.

    A request counts as submitted until the step thread adds it, then as part of the state.
    """

    def __init__(self, max_queue: int) -> None:
        """max_queue: requests that may wait to start."""
        self._max_queue = max_queue
        self._changed = threading.Condition()
        self._commands: deque[Command] = deque()
        self._num_submitted = 0  # requests among the commands
        self._state = EngineState()
        self._woken = False
        self._draining = False
        self._closed = False

    # -- any thread -------------------------------------------------------------------------------

    def submit(self, call: Callable[[], None]) -> None:
        """Queue the command that adds a request.

        Raises UnavailableError once `drain` was called, ResourceExhaustedError if too many wait.
        """
        with self._changed:
            if self._draining or self._closed:
                raise UnavailableError("the server is shutting down; try another one")
            if self._num_submitted + self._state.num_waiting >= self._max_queue:
                raise ResourceExhaustedError(
                    f"{self._max_queue} requests are waiting already; try again later",
                    retry_after=1.0,
                )
            self._num_submitted += 1
            self._commands.append(Command(call))
            self._changed.notify()

    def post(self, call: Callable[[], None], future: Future[Any] | None = None) -> bool:
        """Queue any other command; False: the step thread takes no more."""
        with self._changed:
            if not self._closed:
                self._commands.append(Command(call, future))
                self._changed.notify()
            return not self._closed

    def wake(self) -> None:
        """End the step thread's rest."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    @property
    def closed(self) -> bool:
        """True once `close` was called."""
        return self._closed

    @property
    def state(self) -> EngineState:
        """The last step's; requests that were submitted since are not in it."""
        return self._state

    @property
    def num_rows(self) -> int:
        """Requests that wait or run."""
        with self._changed:
            return self._num_submitted + self._state.num_rows

    @property
    def num_waiting(self) -> int:
        """Requests that have not started."""
        with self._changed:
            return self._num_submitted + self._state.num_waiting

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait up to `timeout` seconds for the others; True: all ended."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(
                lambda: self._closed or self._num_submitted + self._state.num_rows == 0,
                min(timeout, threading.TIMEOUT_MAX),
            )

    def close(self) -> None:
        """Take no more commands; the step thread sees `closed`."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()

    # -- step thread ------------------------------------------------------------------------------

    def carry_out(self, look: Callable[[], EngineState]) -> None:
        """Carry out all commands, and publish the state that they lead to."""
        with self._changed:
            commands, self._commands = self._commands, deque()
            for command in commands:
                command.carry_out()
            self._num_submitted = 0
            self._state = look()

    def publish(self, state: EngineState) -> None:
        """Replace the state that other threads read, and wake those that wait for it to change."""
        with self._changed:
            self._state = state
            self._changed.notify_all()

    def rest(self, timeout: float | None) -> None:
        """Sleep until a command, `wake` or `close`, at most `timeout` seconds."""
        with self._changed:
            if not (self._woken or self._commands or self._closed):
                self._changed.wait(None if timeout is None else min(timeout, LONGEST_REST))
            self._woken = False
