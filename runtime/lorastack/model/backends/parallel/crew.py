"""The processes of the shards beside shard 0: started, told what to do, watched, ended.

Each has two sockets: one for what all shards do together, one for what they do beside steps.

Shards meet in collectives, so one that fails or dies while the others go on leaves them waiting.
Hence a rule: whatever goes wrong in what shards do together, on any of them, ends the server. A
process that dies closes its connections; the others' collectives fail by that at once. One that
merely hangs fails them when `TIMEOUT` is over.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import send_handle
from signal import Signals

from lorastack.errors import DeviceLostError
from lorastack.model.backends.parallel.orders import Order, Setup, Stop

TIMEOUT = 60.0  # seconds that a collective waits for another shard
GRACE = 5.0  # seconds: for a process to end, or for the cause of a failure to show
READY = b"ready"  # what a process sends once its weights are there; all else are last words
DONE = b"done"  # with what it was told beside steps
_END = 30.0  # seconds that a server gets to end after a failure before its process does
_MODULE = "lorastack.model.backends.parallel.worker"

log = logging.getLogger(__name__)


class Crew:
    """Processes of shards 1 and up. `send` is for one thread at a time, `tell` for `aside`.

    store: the number of an open file, the same in all of them, by which shards find each other. It
    is in memory and nobody else can open it. It stays open for good: torch asks it for news, and
    writes to it when its `FileStore` is collected, or to whatever has its number by then.
    """

    def __init__(self, setups: Sequence[Setup]) -> None:
        """Starts them; they read their weights meanwhile."""
        self.store = os.memfd_create("lorastack-shards")
        self._connections: list[Connection] = []
        self._sides: list[Connection] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lorastack-sides")
        self._processes: list[subprocess.Popen[bytes]] = []
        self._lock = threading.Lock()
        self._error: DeviceLostError | None = None
        self._broken = threading.Event()
        self._closing = threading.Event()
        self._abort: Callable[[], None] = lambda: None
        self._on_failure: Callable[[BaseException], None] | None = None
        self._watcher = threading.Thread(target=self._watch, name="lorastack-shards", daemon=True)
        for setup in setups:
            ours, theirs = socket.socketpair()
            our_aside, their_aside = socket.socketpair()
            # A process that hangs neither reads nor answers: this one gives up as collectives do.
            patience = struct.pack("ll", *divmod(int(setup.timeout * 1e6), 10**6))
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            our_aside.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)
            our_aside.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
            with theirs, their_aside:
                files = (their_aside.fileno(), self.store)
                process = subprocess.Popen(
                    # -P: what lies in the working directory is no module of ours.
                    [sys.executable, "-P", "-m", _MODULE, *map(str, files)],
                    stdin=theirs.fileno(),
                    pass_fds=files,
                )
            self._processes.append(process)
            self._connections.append(Connection(ours.detach()))
            self._sides.append(Connection(our_aside.detach()))
            with suppress(OSError):  # it has ended: `wait_ready` says how
                self._connections[-1].send_bytes(pickle.dumps(setup))

    @property
    def pids(self) -> list[int]:
        """Process ids, of shard 1 first."""
        return [process.pid for process in self._processes]

    def wait_ready(self) -> None:
        """Returns when all have read their weights. Raises DeviceLostError when one cannot."""
        for index, connection in enumerate(self._connections):
            words = _last_words(connection)
            if words != READY:
                raise DeviceLostError(self._how_it_ended(index, words))
        self._watcher.start()

    def send(self, order: Order) -> None:
        """To all of them, before this shard does the same."""
        message = pickle.dumps(order)
        for connection in self._connections:
            connection.send_bytes(message)

    def aside(self, job: Callable[[], None]) -> Future[None]:
        """Has a job done in a thread of its own, after those of earlier calls.

        Whatever goes wrong in it ends the server, as in `together`.
        """

        def done() -> None:
            with self.together():
                job()

        return self._thread.submit(done)

    def tell(self, order: Order, files: Sequence[int] = ()) -> None:
        """To all of them, with an open file for each if there are any; in a job of `aside`.

        Returns when all have done it, whatever steps do meanwhile.
        """
        message = pickle.dumps(order)
        for index, connection in enumerate(self._sides):
            connection.send_bytes(message)
            if files:
                send_handle(connection, files[index], self._processes[index].pid)
        for connection in self._sides:
            connection.recv_bytes()

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all shards do: raises DeviceLostError for whatever goes wrong in it."""
        if self._error is not None:
            raise self._error
        try:
            yield
        except Exception as error:
            self._broken.wait(GRACE)  # another shard's end tells more than what it caused here
            self._fail(f"shard 0 failed, or waited too long for another one: {error}")
        if self._error is not None:
            raise self._error

    def watch(self, on_failure: Callable[[BaseException], None]) -> None:
        """on_failure: called once, from any thread, when a shard is lost; the process should end.

        If it does not, it is ended.
        """
        with self._lock:
            self._on_failure = on_failure
            error = self._error
        if error is not None:
            on_failure(error)

    def abort_with(self, abort: Callable[[], None]) -> None:
        """abort: ends what this shard waits for when another one is lost."""
        self._abort = abort

    def close(self) -> None:
        """Ends the processes. May be called again."""
        self._closing.set()
        self._broken.set()
        self._thread.shutdown(wait=False, cancel_futures=True)
        with suppress(OSError):
            self.send(Stop())
        end = time.monotonic() + GRACE
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
            process.kill()
            process.wait()
        if self._watcher.is_alive():
            self._watcher.join()
        self._thread.shutdown()
        for connection in (*self._connections, *self._sides):
            connection.close()

    def _watch(self) -> None:
        wait(self._connections)
        time.sleep(0.1)  # a shard that dies takes others with it: name them all
        ended = wait(self._connections, 0)
        if self._closing.is_set():
            return
        self._fail(
            "; ".join(
                self._how_it_ended(index, _last_words(connection))
                for index, connection in enumerate(self._connections)
                if connection in ended
            )
        )
        if not self._closing.wait(_END):
            log.critical("the server does not end by itself; its process does")
            os._exit(1)

    def _fail(self, message: str) -> None:
        """Notes the first failure, and lets nobody wait for what will not come."""
        with self._lock:
            if self._error is not None:
                return
            self._error = DeviceLostError(f"{message}; the server ends: start it again")
            on_failure = self._on_failure
        if self._closing.is_set():
            return
        log.critical("%s", self._error)
        for process in self._processes:
            process.kill()
        # In a thread, as nobody promises that it returns.
        threading.Thread(target=self._abort, name="lorastack-abort", daemon=True).start()
        self._broken.set()
        if on_failure is not None:
            on_failure(self._error)

    def _how_it_ended(self, index: int, words: bytes) -> str:
        """index: of the process. words: its last ones, a traceback."""
        process = self._processes[index]
        name = f"shard {index + 1} of {len(self._processes) + 1} (process {process.pid})"
        if words:
            text = words.decode("utf-8", "replace")
            log.error("%s:\n%s", name, text)
            return f"{name} failed: {text.strip().splitlines()[-1]}"
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        code = process.returncode
        if code is not None and code < 0:
            return f"{name} was killed by {Signals(-code).name}"
        return f"{name} ended with {code}"


def _last_words(connection: Connection) -> bytes:
    """What a process says; b"" if it has ended."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return b""
