"""A worker process: prepares tasks once, and runs each job in a child that can be stopped.

Started as `python -m lorastack.sandbox.worker` with a socket as its standard input; it ends when
the server's end of that closes. It has one thread, so that it may fork. A child has limits on
processor time, memory and stack, writes its result to a pipe and is gone, so that nothing of one
job is left for the next, and a crash is a refusal.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import select
import signal
import socket
import time
from typing import NoReturn

from lorastack.sandbox.tasks import RefusalError, Run, prepare
from lorastack.sandbox.wire import JOB, PREFIX, SETUP, Job, Limits, Outcome

NICENESS = 10  # no row in the batch waits for a worker
MAX_DESCRIPTORS = 32  # enough to import a module
_PR_SET_PDEATHSIG = 1


class Supervisor:
    """The worker's one thread, which never runs a job itself."""

    def __init__(self, server: socket.socket) -> None:
        self._server = server
        self._tasks: dict[str, Run] = {}
        self._nowhere = os.open(os.devnull, os.O_RDWR)
        self._libc = ctypes.CDLL(None)

    def serve(self) -> None:
        """Serves jobs until the server is gone."""
        while (frame := self._receive()) is not None:
            kind, payload = frame
            if kind == SETUP:
                wanted = json.loads(payload)
                self._tasks[wanted["task"]] = prepare(wanted["task"], wanted["given"])
                gc.collect()
                gc.freeze()  # children touch fewer pages of what they share
            elif kind == JOB:
                job = Job.from_bytes(payload)
                outcome, result = self._run(job)
                self._server.sendall(PREFIX.pack(len(result), outcome) + result)

    def _receive(self) -> tuple[int, bytes] | None:
        head = self._read(PREFIX.size)
        if head is None:
            return None
        length, kind = PREFIX.unpack(head)
        payload = self._read(length)
        return None if payload is None else (kind, payload)

    def _read(self, length: int) -> bytes | None:
        """The next `length` bytes; None if the server has gone."""
        data = bytearray()
        while len(data) < length:
            part = self._server.recv(min(length - len(data), 1 << 20))
            if not part:
                return None
            data += part
        return bytes(data)

    def _run(self, job: Job) -> tuple[Outcome, bytes]:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            self._be_child(job, writing)
        os.close(writing)
        data = bytearray()
        stopped = self._collect(reading, data, job.limits)
        os.close(reading)
        if stopped is not None:
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        outcome = _ended(status, data) if stopped is None else stopped
        return outcome, bytes(data[1:]) if outcome <= Outcome.REFUSED else b""

    def _collect(self, reading: int, data: bytearray, limits: Limits) -> Outcome | None:
        """Reads what the child writes into `data`. Returns what cut it short, if anything did."""
        end = time.monotonic() + limits.wall
        while True:
            left = max(0.0, end - time.monotonic())
            ready, _, _ = select.select([reading, self._server.fileno()], [], [], left)
            if self._server.fileno() in ready:  # the caller gave up, or the server is gone
                return Outcome.CANCELLED
            if not ready:
                return Outcome.TOO_LATE
            part = os.read(reading, 1 << 16)
            if not part:
                return None
            data += part
            if len(data) > limits.output + 1:
                return Outcome.TOO_LONG

    def _be_child(self, job: Job, writing: int) -> NoReturn:
        status = 1
        try:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            # Closes the server's socket, and hides what a crash might print.
            for standard in (0, 1, 2):
                os.dup2(self._nowhere, standard)
            _confine(job.limits)
            reply = _reply(self._tasks[job.task], job.body)
            while reply:
                reply = reply[os.write(writing, reply) :]
            status = 0
        finally:
            os._exit(status)


def _confine(limits: Limits) -> None:
    """Sets what this process may take; there is no way back."""
    with open("/proc/self/statm", encoding="ascii") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    # SIGPROF ends the process to the millisecond, unless it ignores that; RLIMIT_CPU still does.
    signal.setitimer(signal.ITIMER_PROF, limits.cpu)
    for what, most in (
        (resource.RLIMIT_CPU, math.ceil(limits.cpu) + 1),
        (resource.RLIMIT_AS, size + limits.memory),
        (resource.RLIMIT_STACK, limits.stack),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, MAX_DESCRIPTORS),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def _reply(run: Run, body: bytes) -> bytes:
    try:
        return bytes([Outcome.DONE]) + run(body)
    except RefusalError as refusal:
        return bytes([Outcome.REFUSED]) + str(refusal).encode("utf-8", "replace")
    except MemoryError:
        return bytes([Outcome.TOO_MUCH_MEMORY])


def _ended(status: int, data: bytearray) -> Outcome:
    """The outcome, by a child's exit status and what it wrote."""
    if os.WIFSIGNALED(status):
        match os.WTERMSIG(status):
            case signal.SIGPROF | signal.SIGXCPU:
                return Outcome.TOO_SLOW
            case signal.SIGABRT | signal.SIGKILL:  # without memory Rust aborts, the system kills
                return Outcome.TOO_MUCH_MEMORY
        return Outcome.CRASHED
    return Outcome(data[0]) if data and os.WEXITSTATUS(status) == 0 else Outcome.CRASHED


def main() -> None:
    """The server decides when this ends, not whoever signals its group."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    Supervisor(socket.socket(fileno=0)).serve()


if __name__ == "__main__":
    main()
