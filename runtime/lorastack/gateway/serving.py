"""HTTP on a port: in this process, or on a thread of its own beside the gRPC server."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any, cast

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorastack.config import KIB, GatewayConfig
from lorastack.errors import InvalidArgumentError, UnavailableError
from lorastack.gateway.app import make_app

HEAD_PATIENCE = 10.0  # seconds from a connection, or from the last reply, to a whole head
MAX_HEAD = 32 * KIB  # of a request
STOP_GRACE = 2  # seconds for open replies when it stops


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose callers must end a request's head within HEAD_PATIENCE of beginning it.

    uvicorn itself waits forever for the first request of a connection, and for one that trickles.
    """

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_PATIENCE, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bind(config: GatewayConfig) -> socket.socket:
    """The port, not listening yet. Raises InvalidArgumentError when it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except OSError as error:
        bound.close()
        raise InvalidArgumentError(
            f"cannot listen on {config.host}:{config.port} ({error.strerror}): choose another port "
            "for HTTP"
        ) from error
    return bound


def serve(config: GatewayConfig, bound: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. on_ready: gets the address when it listens."""
    server = _Server(_uvicorn(config), lambda: on_ready(address(bound)))
    asyncio.run(server.serve([bound]))


class GatewayThread:
    """The gateway on a thread and an event loop of its own."""

    def __init__(self, config: GatewayConfig, bound: socket.socket) -> None:
        """Listens when this returns. Raises UnavailableError if it cannot."""
        self.address = address(bound)
        self._started = threading.Event()
        self._server = _Server(_uvicorn(config), self._started.set)
        self._bound = bound
        self._thread = threading.Thread(target=self._run, name="lorastack-http", daemon=True)
        self._thread.start()
        self._started.wait()
        if not self._server.started:
            raise UnavailableError("the HTTP gateway did not start; the log says why")

    def close(self) -> None:
        """Stops listening and ends the thread; open replies get STOP_GRACE seconds."""
        self._server.should_exit = True
        self._thread.join()
        self._bound.close()

    def _run(self) -> None:
        try:
            asyncio.run(self._server.serve([self._bound]))
        finally:
            self._started.set()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()


def address(bound: socket.socket) -> str:
    """host:port of a bound socket."""
    host, port = cast(tuple[str, int], bound.getsockname()[:2])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _uvicorn(config: GatewayConfig) -> uvicorn.Config:
    return uvicorn.Config(
        make_app(config),
        http=PatientProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=STOP_GRACE,
    )
