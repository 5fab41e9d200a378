"""A thread of low priority that works for a thread that must never wait."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from lorastack.errors import InternalError, LorastackError, breaks_device

ResultT = TypeVar("ResultT")
# A row waits for a load. At 19, beside a step on every core, a load of 2 MB takes half a second.
LOAD_NICENESS = 10
BACKGROUND_NICENESS = 19  # nobody waits: uploads, pulls
_log = logging.getLogger(__name__)


def be_nice(niceness: int = BACKGROUND_NICENESS) -> None:
    """Lowers the calling thread's priority, so that it yields to the step thread.

    Linux keeps niceness per thread; OpenMP threads started from it inherit it.
    """
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), niceness)


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A job for this digest raised. cause: what it raised, where that breaks the device."""

    digest: str
    error: LorastackError
    cause: Exception | None = None


class JobThread(Generic[ResultT]):
    """Runs jobs in the order they came. Results wait in a queue."""

    def __init__(
        self,
        name: str,
        on_finished: Callable[[], None],
        idle: Callable[[], bool] | None = None,
    ) -> None:
        """on_finished: called from the thread after each job.

        idle: called again and again while no job waits, until it returns False.
        """
        self.seconds = 0.0  # total run time of all jobs
        self._on_finished = on_finished
        self._idle = idle
        self._jobs: SimpleQueue[tuple[str, Callable[[], ResultT]] | None] = SimpleQueue()
        self._results: SimpleQueue[ResultT | Failure] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, digest: str, job: Callable[[], ResultT]) -> None:
        """Queues a job; its result, or a Failure for the digest, comes out of `finished`."""
        self._jobs.put((digest, job))

    def finished(self) -> Iterator[ResultT | Failure]:
        """Results that are there now. Never waits."""
        with contextlib.suppress(Empty):
            while True:
                yield self._results.get_nowait()

    def close(self) -> None:
        """Ends the thread after the job that it is at; those that wait are not begun."""
        with contextlib.suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self._jobs.put(None)
        self._thread.join()

    def _run(self) -> None:
        be_nice(LOAD_NICENESS)
        while (item := self._next()) is not None:
            began = time.monotonic()
            result = self._outcome(*item)
            self.seconds += time.monotonic() - began
            self._results.put(result)
            self._on_finished()

    def _next(self) -> tuple[str, Callable[[], ResultT]] | None:
        while self._idle is not None and self._jobs.empty() and self._idle():
            pass
        return self._jobs.get()

    def _outcome(self, digest: str, job: Callable[[], ResultT]) -> ResultT | Failure:
        try:
            return job()
        except Exception as error:
            shown = error
            if not isinstance(shown, LorastackError):
                _log.exception("loading adapter %s failed", digest)
                shown = InternalError(f"loading adapter {digest} failed: {error}")
            cause = error if breaks_device(error) else None
            return Failure(digest=digest, error=shown, cause=cause)
