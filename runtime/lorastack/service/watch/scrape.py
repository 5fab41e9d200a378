"""The metrics port: GET /metrics over HTTP, on a thread and an event loop of its own."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress
from http import HTTPStatus

from lorastack.config import KIB
from lorastack.errors import InvalidArgumentError
from lorastack.service.watch.exposition import Exposition

PATIENCE = 5.0  # seconds for a whole exchange
MAX_CONNECTIONS = 32  # beyond them the oldest makes way
MAX_HEAD = 8 * KIB  # of a request


class MetricsServer:
    """One thread, however many connect; an exchange gets PATIENCE, even one that says nothing."""

    def __init__(self, host: str, port: int, exposition: Exposition) -> None:
        """Raises InvalidArgumentError when the address cannot be had."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family)
        except OSError as error:
            raise InvalidArgumentError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another --metrics-port"
            ) from error
        self._exposition = exposition
        self._exchanges: dict[asyncio.Task[None], None] = {}  # oldest first
        self._loop = asyncio.new_event_loop()
        self._closed = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="lorastack-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops listening and ends the thread, exchanges included."""
        self._loop.call_soon_threadsafe(self._closed.set)
        self._thread.join()

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        async with await asyncio.start_server(self._exchange, sock=self._socket, limit=MAX_HEAD):
            await self._closed.wait()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._exchanges) >= MAX_CONNECTIONS:
            oldest = next(iter(self._exchanges))
            del self._exchanges[oldest]  # now: more may come before it has ended
            oldest.cancel()
        self._exchanges[task] = None
        try:
            with suppress(OSError, TimeoutError, asyncio.CancelledError, EOFError):
                async with asyncio.timeout(PATIENCE):
                    writer.write(await self._reply(reader))
                    await writer.drain()
        finally:
            self._exchanges.pop(task, None)
            writer.close()

    async def _reply(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except asyncio.LimitOverrunError:
            return _response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        first, *lines = head.split("\r\n")
        method, _, target = first.partition(" ")
        if not first.rpartition(" ")[2].startswith("HTTP/1."):
            return _response(HTTPStatus.BAD_REQUEST)
        if target.partition(" ")[0].partition("?")[0] != "/metrics":
            return _response(HTTPStatus.NOT_FOUND)
        if method not in ("GET", "HEAD"):
            return _response(HTTPStatus.METHOD_NOT_ALLOWED)
        headers = (line.partition(":") for line in lines)
        accept = [value.strip() for name, _, value in headers if name.lower() == "accept"]
        content_type, body = self._exposition.render(",".join(accept))
        return _response(HTTPStatus.OK, body, content_type, with_body=method == "GET")


def _response(
    status: HTTPStatus,
    body: bytes | None = None,
    content_type: str = "text/plain; charset=utf-8",
    *,
    with_body: bool = True,
) -> bytes:
    if body is None:
        body = f"{status.value} {status.phrase}: the metrics are at /metrics\n".encode()
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {content_type}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
