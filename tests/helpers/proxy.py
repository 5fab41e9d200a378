"""A TCP proxy that cuts each connection after so many bytes from the caller."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from types import TracebackType
from typing import Self

PIECE = 1 << 16


class CuttingProxy:
    """Forwards connections to `target` (host:port), one thread a direction.

    budgets: bytes that each connection in turn may bring before it is cut; more connections are
    refused. before_cut: called with a connection's budget spent and the connection still there.
    passed: bytes that went to the target, of all connections.
    """

    def __init__(
        self,
        target: str,
        budgets: Iterable[int],
        before_cut: Callable[[], None] = lambda: None,
    ) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._budgets = budgets
        self._before_cut = before_cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.passed = 0
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # ends a waiting accept
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with self._listener, suppress(OSError):
            for budget in self._budgets:
                caller, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._start(self._forward, caller, server, budget)
                self._start(_copy, server, caller)

    def _start(self, work: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=work, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _forward(self, caller: socket.socket, server: socket.socket, budget: int) -> None:
        with caller, server:
            with suppress(OSError):
                while budget and (data := caller.recv(min(budget, PIECE))):
                    server.sendall(data)
                    budget -= len(data)
                    self.passed += len(data)
                if not budget:
                    self._before_cut()
            for end in (caller, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


def _copy(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(PIECE):
            target.sendall(data)
