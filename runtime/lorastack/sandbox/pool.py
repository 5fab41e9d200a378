"""The server's side of the worker processes: a job in, its result out, and no thread waits.

Workers are started when first needed and replaced when they die.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from lorastack.errors import Reason, UnavailableError
from lorastack.sandbox.fair_queue import FairQueue
from lorastack.sandbox.wire import CANCEL, JOB, PREFIX, SETUP, Job, Outcome, setup_bytes

NUM_WORKERS = 2
MAX_WAITING = 256
# Libraries that start threads of their own would keep a worker from forking.
SINGLE_THREADED = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

logger = logging.getLogger(__name__)

Setup = Callable[[], Mapping[str, Any]]


class JobError(Exception):
    """A job that gave no result. message: the task's own words, if it has any."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(f"{outcome.name}: {message}")
        self.outcome = outcome
        self.message = message


class Pool:
    """Runs jobs in worker processes, round robin by caller. Event loop only.

    setups: by task, gives what workers are told before its first job; called in a thread.
    """

    def __init__(
        self,
        setups: Mapping[str, Setup],
        *,
        num_workers: int = NUM_WORKERS,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._setups = setups
        self._seats = [_Seat() for _ in range(num_workers)]
        self._queue = FairQueue(self._seats, max_waiting)
        self._serving: set[asyncio.Task[bytes]] = set()
        self._closed = False

    @property
    def num_running(self) -> int:
        """Jobs that workers have now."""
        return len(self._serving)

    @property
    def num_waiting(self) -> int:
        """Jobs that wait for a worker."""
        return self._queue.num_waiting

    @property
    def pids(self) -> list[int]:
        """Process ids of the running workers."""
        return [seat.process.pid for seat in self._seats if seat.process and seat.alive]

    async def run(
        self, job: Job, caller: str, known: Callable[[], bytes | None] | None = None
    ) -> bytes:
        """Runs a job and returns its result. Cancelling this frees the worker at once.

        known: asked when a worker is free, for a result that another job has given meanwhile.
        Raises JobError, ResourceExhaustedError if too many wait, UnavailableError if the worker
        died or the server ends.
        """
        if self._closed:
            raise _shutting_down()
        seat = await self._queue.take(caller)
        serving: asyncio.Task[bytes] | None = None
        try:
            if known is not None and (result := known()) is not None:
                return result
            serving = asyncio.create_task(self._serve(seat, job))
            self._serving.add(serving)
            serving.add_done_callback(self._served)
            return await asyncio.shield(serving)
        except asyncio.CancelledError:
            if serving is not None and not serving.done():
                seat.cancel()
            raise
        finally:
            # The next one wakes after our caller has gone on: its `known` sees what the result did.
            if serving is None or serving.done():
                self._queue.give(seat)
            else:
                serving.add_done_callback(lambda _: self._queue.give(seat))

    async def close(self) -> None:
        """Ends the workers; whoever waits gets UnavailableError."""
        self._closed = True
        self._queue.fail(_shutting_down())
        for seat in self._seats:
            seat.end()
        if self._serving:
            await asyncio.wait(self._serving)

    async def _serve(self, seat: _Seat, job: Job) -> bytes:
        try:
            try:
                outcome, payload = await self._attempt(seat, job)
            except (OSError, EOFError):  # the worker has ended, perhaps long ago
                outcome, payload = await self._attempt(seat, job)
        except (OSError, EOFError) as error:
            raise UnavailableError(
                "the worker process that had this request ended, twice; send the request again",
                reason=Reason.WORKER_ENDED,
            ) from error
        finally:
            seat.free()
        if outcome is not Outcome.DONE:
            raise JobError(outcome, payload.decode("utf-8", "replace"))
        return payload

    async def _attempt(self, seat: _Seat, job: Job) -> tuple[Outcome, bytes]:
        """Raises OSError or EOFError if the worker dies."""
        try:
            if self._closed:
                raise _shutting_down()
            if not seat.alive:
                await seat.start()
            if job.task not in seat.prepared:
                given = await asyncio.to_thread(self._setups[job.task])
                await seat.send(SETUP, setup_bytes(job.task, given))
                seat.prepared.add(job.task)
            return await seat.ask(job)
        except (OSError, EOFError):
            if not self._closed:
                logger.warning("a worker process ended and is replaced")
            seat.end()
            raise
        finally:
            if self._closed:
                seat.end()

    def _served(self, serving: asyncio.Task[bytes]) -> None:
        self._serving.discard(serving)
        if not serving.cancelled():
            serving.exception()  # read, as its caller may have gone


class _Seat:
    """One worker process, or none yet. prepared: tasks that it was told about."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[bytes] | None = None
        self.prepared: set[str] = set()
        self._busy = False
        self._abandoned = False
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    async def start(self) -> None:
        """Starts a worker, in place of one that died."""
        self.end()
        ours, theirs = socket.socketpair()
        self._reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        with theirs:
            self.process = await asyncio.to_thread(_start_process, theirs)

    async def ask(self, job: Job) -> tuple[Outcome, bytes]:
        """Runs a job, unless its caller has gone already. Raises as `send`."""
        if self._abandoned:
            return Outcome.CANCELLED, b""
        if (reader := self._reader) is None:
            raise EOFError
        self._busy = True
        await self.send(JOB, job.to_bytes())
        length, kind = PREFIX.unpack(await reader.readexactly(PREFIX.size))
        return Outcome(kind), await reader.readexactly(length)

    async def send(self, kind: int, payload: bytes) -> None:
        """Raises OSError or EOFError if the worker has ended, or was ended meanwhile."""
        if self._writer is None:
            raise EOFError
        self._writer.write(PREFIX.pack(len(payload), kind) + payload)
        await self._writer.drain()

    def cancel(self) -> None:
        """Stops the job, as its caller has gone."""
        self._abandoned = True
        if self._busy and self._writer is not None:
            self._writer.write(PREFIX.pack(0, CANCEL))

    def free(self) -> None:
        """Makes the seat ready for the next job."""
        self._busy = self._abandoned = False

    def end(self) -> None:
        """Ends the worker, and its child with it."""
        if self._writer is not None:
            self._writer.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = self._reader = self._writer = None
        self.prepared = set()


def _start_process(theirs: socket.socket) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "lorastack.sandbox.worker"],
        stdin=theirs.fileno(),
        stdout=subprocess.DEVNULL,
        env={**os.environ, **SINGLE_THREADED},
        start_new_session=True,  # a terminal's Ctrl-C is for the server
    )


def _shutting_down() -> UnavailableError:
    return UnavailableError("the server is shutting down; send the request to another one")
