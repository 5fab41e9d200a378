"""A TCP proxy that breaks connections, as networks do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

_ABORT = struct.pack("ii", 1, 0)  # SO_LINGER: close with a reset


class CuttingProxy:
    """Forwards to a server; each connection in turn breaks after so many bytes from the client.

    Connections beyond the list last. before_cut is called when the bytes are through.
    """

    def __init__(
        self, server: str, cuts: Sequence[int], before_cut: Callable[[], None] = lambda: None
    ) -> None:
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._cuts = list(cuts)
        self._before_cut = before_cut
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.num_cut = 0
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for each in self._open:
            each.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._server)
            self._open += [near, far]
            left = self._cuts.pop(0) if self._cuts else None
            for source, sink, budget in ((near, far, left), (far, near, None)):
                threading.Thread(
                    target=self._forward, args=(source, sink, budget), daemon=True
                ).start()

    def _forward(self, source: socket.socket, sink: socket.socket, left: int | None) -> None:
        try:
            while data := source.recv(1 << 16):
                sink.sendall(data if left is None else data[:left])
                if left is not None and (left := left - len(data)) <= 0:
                    self._before_cut()
                    self.num_cut += 1
                    break
        except OSError:
            pass
        for each in (source, sink):
            try:
                each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
                each.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
