"""HTTP on a port: in this process, or on a thread of its own beside the gRPC server."""

from __future__ import annotations

import asyncio
import math
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorastack.config import KIB, GatewayConfig
from lorastack.errors import InvalidArgumentError, UnavailableError
from lorastack.gateway.app import make_app
from lorastack.gateway.health import Scrape
from lorastack.gateway.traffic import Traffic
from lorastack.printable import error_line

HEAD_PATIENCE = 10.0  # seconds from a connection, or from the last reply, to a whole head
READ_PATIENCE = 60.0  # seconds for which a caller may take nothing of its reply
MAX_HEAD = 32 * KIB  # of a request
SPARE = 256  # connections beyond the limit that are told so; further ones are closed
STOP_GRACE = 2.0  # seconds for open replies when it stops; then they end with an error
LAST_WORDS = 2  # seconds more for these errors to go out


class PatientProtocol(H11Protocol):
    """HTTP/1.1 whose callers must go on: end a request's head, read a reply.

    uvicorn itself waits forever for the first request of a connection, for one that trickles, and
    for a caller who reads nothing.
    """

    _deadline: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        limit = self.limit_concurrency
        if limit is not None and len(self.connections) > limit + SPARE:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unwatch()
        self._taken()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self.loop.call_later(READ_PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        self._taken()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state is h11.IDLE:
            super().send_400_response(msg)
        else:  # a reply is on its way already: nothing can be said in its midst
            self.transport.abort()

    def _watch(self) -> None:
        """The deadline of what the caller is sending now: a head, or a body that nobody wants."""
        conn = self.conn
        unwanted = conn.our_state is h11.DONE and conn.their_state is h11.SEND_BODY
        if conn.their_state is not h11.IDLE and not unwanted:
            self._unwatch()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_PATIENCE, self.transport.close)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _taken(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None


def bind(config: GatewayConfig) -> socket.socket:
    """The port, not listening yet. Raises InvalidArgumentError when it cannot be had."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small writes at once (TCP_NODELAY) on sockets of this protocol only.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((config.host, config.port))
    except (OSError, TypeError, ValueError) as error:  # the last two: it cannot be a host's name
        bound.close()
        raise InvalidArgumentError(
            f"cannot listen on {config.host}:{config.port} for HTTP ({error_line(error)}); choose "
            "another port or host"
        ) from error
    return bound


def serve(config: GatewayConfig, bound: socket.socket, on_ready: Callable[[str], None]) -> None:
    """Serves until SIGTERM or SIGINT. on_ready: gets the address when it listens."""
    server = _Server(config, lambda: on_ready(address(bound)))
    asyncio.run(server.serve([bound]))


class GatewayThread:
    """The gateway on a thread and an event loop of its own."""

    def __init__(
        self, config: GatewayConfig, bound: socket.socket, scrape: Scrape | None = None
    ) -> None:
        """Listens when this returns. Raises UnavailableError if it cannot.

        scrape: the server's metrics, from any thread, where the server is in this process.
        """
        self.address = address(bound)
        self._started = threading.Event()
        self._server = _Server(config, self._started.set, scrape)
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
    def __init__(
        self, config: GatewayConfig, on_ready: Callable[[], None], scrape: Scrape | None = None
    ) -> None:
        app = make_app(config, scrape)
        super().__init__(_uvicorn(config, app))
        self._traffic: Traffic = app.state.traffic
        self._on_ready = on_ready

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn would send itself the signal again at the end, and die of it."""
        with super().capture_signals():
            yield
            self._captured_signals.clear()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().call_later(STOP_GRACE, self._traffic.stop)
        await super().shutdown(sockets)


def address(bound: socket.socket) -> str:
    """host:port of a bound socket."""
    host, port = cast(tuple[str, int], bound.getsockname()[:2])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _uvicorn(config: GatewayConfig, app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=PatientProtocol,
        ws="none",
        log_config=None,
        log_level="error",  # it warns of every malformed request
        access_log=False,
        server_header=False,
        lifespan="on",
        h11_max_incomplete_event_size=MAX_HEAD,
        limit_concurrency=config.max_connections,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(STOP_GRACE) + LAST_WORDS,
    )
