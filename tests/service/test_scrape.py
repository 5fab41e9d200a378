"""The metrics port answers /metrics, and nobody can take its threads or its time."""

from __future__ import annotations

import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from prometheus_client import CollectorRegistry, Counter

from lorastack.errors import InvalidArgumentError
from lorastack.service.watch import scrape
from lorastack.service.watch.exposition import Exposition
from lorastack.service.watch.scrape import MAX_CONNECTIONS, MAX_HEAD, MetricsServer

PATIENCE = 30.0


def exposition(registry: CollectorRegistry) -> Exposition:
    return Exposition(registry, CollectorRegistry())


@pytest.fixture
def port() -> Iterator[int]:
    registry = CollectorRegistry()
    Counter("seen", "A counter.", registry=registry).inc(3)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = int(listener.getsockname()[1])
    server = MetricsServer("127.0.0.1", number, exposition(registry))
    yield number
    server.close()
    with pytest.raises(OSError):
        connect(number)


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def answer(port: int, request: bytes) -> bytes:
    with connect(port) as caller:
        caller.sendall(request)
        got = b""
        while data := caller.recv(1 << 16):
            got += data
        return got


def scraped(port: int, accept: str = "*/*") -> tuple[str, bytes]:
    url = f"http://127.0.0.1:{port}/metrics?x=1"
    request = urllib.request.Request(url, headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=PATIENCE) as reply:
        return reply.headers["Content-Type"], reply.read()


def test_both_formats_of_prometheus(port: int) -> None:
    kind, text = scraped(port)
    assert kind.startswith("text/plain")
    assert b"seen_total 3.0" in text
    kind, text = scraped(port, "application/openmetrics-text; version=1.0.0")
    assert kind.startswith("application/openmetrics-text")
    assert text.endswith(b"# EOF\n")


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        (b"GET /nope HTTP/1.1", b"404"),
        (b"GET / HTTP/1.1", b"404"),
        (b"GET /metrics/../x HTTP/1.1", b"404"),
        (b"POST /metrics HTTP/1.1", b"405"),
        (b"HEAD /metrics HTTP/1.1", b"200"),
        (b"GET /metrics", b"400"),
        (b"\xff\x00\xfe", b"400"),
        (b"", b"400"),
        (b"GET /" + b"a" * MAX_HEAD, b"431"),
    ],
)
def test_what_else_is_asked(port: int, request_line: bytes, status: bytes) -> None:
    reply = answer(port, request_line + b"\r\n\r\n")
    assert reply.split(b" ")[1] == status
    assert b"seen_total" not in reply


def test_silent_connections_take_no_thread_and_no_turn(port: int) -> None:
    before = threading.active_count()
    silent = [connect(port) for _ in range(3 * MAX_CONNECTIONS)]
    assert b"seen_total" in scraped(port)[1]
    assert threading.active_count() <= before
    silent[0].settimeout(PATIENCE)
    assert silent[0].recv(1) == b""  # the oldest made way
    for each in silent:
        each.close()
    assert b"seen_total" in scraped(port)[1]


def test_connections_that_come_at_once_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "PATIENCE", 2 * PATIENCE)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        number = int(listener.getsockname()[1])
    server = MetricsServer("127.0.0.1", number, exposition(CollectorRegistry()))
    listens = threading.Event()
    server._loop.call_soon_threadsafe(listens.set)
    assert listens.wait(PATIENCE)
    busy = threading.Event()
    server._loop.call_soon_threadsafe(busy.wait)
    with ExitStack() as stack:
        stack.callback(server.close)
        silent = [stack.enter_context(connect(number)) for _ in range(2 * MAX_CONNECTIONS)]
        busy.set()
        for oldest in silent[:MAX_CONNECTIONS]:
            assert oldest.recv(1) == b""
        assert len(server._exchanges) <= MAX_CONNECTIONS


def test_a_silent_connection_ends(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "PATIENCE", 0.01)
    with connect(port) as silent:
        assert silent.recv(1) == b""


def test_a_taken_port_is_refused(port: int) -> None:
    with pytest.raises(InvalidArgumentError, match="--metrics-port"):
        MetricsServer("127.0.0.1", port, exposition(CollectorRegistry()))
