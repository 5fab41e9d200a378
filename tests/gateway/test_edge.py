"""What every route shares: health, limits, ids, disconnects, hostile callers."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lorastack.config import GatewayConfig
from lorastack.errors import ResourceExhaustedError
from lorastack.gateway import serving, traffic
from lorastack.gateway.serving import GatewayThread, bind
from tests.gateway.small import connect, post, read_all, small_gateway
from tests.helpers.live import wait_until
from tests.service import fakes
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

MAX_BODY = 200_000


@pytest.fixture
def gateway(fake: RunningServer) -> Iterator[GatewayThread]:
    with small_gateway(fake.address, max_body=MAX_BODY) as gateway:
        yield gateway


@pytest.fixture
def plain(gateway: GatewayThread) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{gateway.address}", timeout=120) as client:
        yield client


def num_open(gateway: GatewayThread) -> int:
    return gateway._server._traffic.num_open


# Health, ids, unknown paths


def test_health_says_that_requests_are_served(plain: httpx.Client) -> None:
    for path in ("/health", "/ping", "/startup"):
        assert plain.get(path).status_code == 200
        assert plain.head(path).content == b""
    assert plain.post("/ping").status_code == 200
    assert plain.get("/version").json()["version"]


def test_metrics_are_the_servers(plain: httpx.Client) -> None:
    reply = plain.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert "vllm:num_requests_waiting" in reply.text
    asked = plain.get("/metrics", headers={"Accept": "application/openmetrics-text"})
    assert asked.headers["content-type"].startswith("application/openmetrics-text")


def test_metrics_in_the_servers_process_need_no_call() -> None:
    def scrape(accept: str) -> tuple[str, bytes]:
        return "text/plain; version=0.0.4", accept.encode()

    config = GatewayConfig(target="127.0.0.1:1", port=0)
    gateway = GatewayThread(config, bind(config), scrape)
    try:
        reply = httpx.get(f"http://{gateway.address}/metrics", headers={"Accept": "any"})
        assert (reply.status_code, reply.text) == (200, "any")
        assert reply.headers["content-type"] == "text/plain; version=0.0.4"
        assert httpx.get(f"http://{gateway.address}/health").status_code == 503
    finally:
        gateway.close()


def test_a_server_that_drains_is_503(fake: RunningServer, plain: httpx.Client) -> None:
    fake.server._guard.draining = True
    for path in ("/health", "/metrics"):
        reply = plain.get(path)
        assert reply.status_code == 503
        assert "shutting down" in reply.json()["error"]


def test_a_server_that_is_gone_is_503_and_one_that_comes_back_is_found(
    start_fake: StartFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_fake()
    with small_gateway(first.address) as gateway:
        url = f"http://{gateway.address}"
        assert httpx.get(f"{url}/health").status_code == 200
        first.stop()
        gone = httpx.get(f"{url}/health", timeout=120)
        assert gone.status_code == 503
        assert "lorastack serve" in gone.json()["error"]
        start_at(first.address, start_fake, monkeypatch)
        wait_until(lambda: httpx.get(f"{url}/health").status_code == 200, "it is found")


def start_at(address: str, start_fake: StartFake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server at an address that another one had."""
    port = int(address.rpartition(":")[2])
    made = fakes.ServiceConfig
    monkeypatch.setattr(fakes, "ServiceConfig", lambda **fields: made(**{**fields, "port": port}))
    start_fake()


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nowhere", 404),
        ("POST", "/health/", 404),
        ("GET", "//evil.example/", 404),
        ("GET", "/whole", 405),
        ("DELETE", "/whole", 405),
        ("OPTIONS", "/whole", 405),
        ("POST", "/health", 405),
        ("BREW", "/ping", 405),
    ],
)
def test_what_is_not_served_is_told_as_json(
    plain: httpx.Client, method: str, path: str, status: int
) -> None:
    reply = plain.request(method, f"{plain.base_url}{path}".replace("//evil", "/evil"))
    assert reply.status_code == status
    assert reply.json()["error"]["code"] == status
    assert reply.headers["x-request-id"]
    if status == 405:
        expected = {"/whole": "POST", "/health": "GET, HEAD", "/ping": "GET, HEAD, POST"}
        assert reply.headers["allow"] == expected[path]


def test_a_reply_carries_the_callers_request_id(plain: httpx.Client) -> None:
    for path in ("/health", "/nowhere", "/openapi.json"):
        reply = plain.get(path, headers={"X-Request-Id": "mine-1"})
        assert reply.headers["x-request-id"] == "mine-1"
    first = plain.get("/health").headers["x-request-id"]
    assert first != plain.get("/health").headers["x-request-id"]


@pytest.mark.parametrize("given", ["a b", "x" * 65, "é", "", "a\tb"])
def test_an_id_that_could_hurt_a_log_is_replaced(gateway: GatewayThread, given: str) -> None:
    head = f"GET /health HTTP/1.1\r\nHost: h\r\nX-Request-Id: {given}\r\nConnection: close\r\n\r\n"
    with connect(gateway.address) as connection:
        connection.sendall(head.encode("latin-1"))
        reply = read_all(connection)
    assert reply.startswith(b"HTTP/1.1 200")
    assert b"x-request-id: req-" in reply


# Bodies

WRONG: dict[str, bytes] = {
    "nothing": b"",
    "no JSON": b"{",
    "no UTF-8": b'{"prompt": "\xff"}',
    "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
    "a lone surrogate": b'{"prompt": "\\ud800"}',
    "deep": b'{"prompt": "a", "anything": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
    "deep objects": b'{"prompt": "a", "anything": ' + b'{"a":' * 30_000 + b"1" + b"}" * 30_000,
    "twice": b'{"prompt": "a", "prompt": "b"}',
    "twice inside": b'{"prompt": "a", "anything": {"x": 1, "x": 2}}',
    "NaN": b'{"prompt": "a", "number": NaN}',
    "infinite": b'{"prompt": "a", "number": -Infinity}',
    "a long integer": b'{"prompt": "a", "anything": ' + b"9" * 50_000 + b"}",
    "a list": b"[]",
    "two values": b'{"prompt": "a"} {}',
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_body_is_400(plain: httpx.Client, name: str) -> None:
    reply = plain.post("/whole", content=WRONG[name])
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]


def test_a_long_body_is_refused_before_it_is_read(gateway: GatewayThread) -> None:
    with connect(gateway.address) as connection:
        connection.sendall(
            post("/whole", raw=b"")[:-4].replace(b": 0", b": 999999999999") + b"\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 400"
    with connect(gateway.address) as connection:  # in chunks of unknown number
        connection.sendall(b"POST /whole HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
        for _ in range(MAX_BODY // 0x10000 + 1):
            connection.sendall(chunk)
        assert connection.recv(12) == b"HTTP/1.1 400"


def test_long_bodies_share_a_bound_and_short_ones_do_not(
    gateway: GatewayThread, plain: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic, "SMALL_BODY", 1000)
    monkeypatch.setattr(traffic, "MAX_HELD", 5000)
    shared = gateway._server._traffic
    with connect(gateway.address) as slow:
        slow.sendall(post("/whole", raw=b"x" * 10_000)[:-5000])
        wait_until(lambda: shared._held > 3000, "the slow body is held")
        long = {"prompt": "a", "anything": "x" * 4000}
        reply = plain.post("/whole", json=long)
        assert reply.status_code == 429
        assert int(reply.headers["retry-after"]) >= 1
        assert plain.post("/whole", json={"prompt": "a"}).status_code == 200
    wait_until(lambda: shared._held == 0, "what it sent is let go")
    assert plain.post("/whole", json=long).status_code == 200


def test_our_bugs_show_nothing_of_us(plain: httpx.Client) -> None:
    reply = plain.post("/whole", json={"prompt": "a bug"})
    assert reply.status_code == 500
    assert "secret" not in reply.text and "Traceback" not in reply.text
    assert reply.headers["x-request-id"]
    reply = plain.post("/stream", json={"prompt": "a late bug"})
    assert reply.status_code == 200
    assert "its log says how" in reply.text and "secret" not in reply.text


def test_a_full_queue_is_429_with_the_time_to_wait(
    fake: RunningServer,
    plain: httpx.Client,
) -> None:
    for path in ("/whole", "/stream"):
        fake.engine.refusal = ResourceExhaustedError("the queue is full", retry_after=2.5)
        reply = plain.post(path, json={"prompt": "a"})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] == "3"


# Connections


def test_heads_are_bounded(gateway: GatewayThread) -> None:
    for head in (
        b"GET /" + b"a" * 40_000,
        b"GET / HTTP/1.1\r\nHost: h\r\nX: " + b"a" * 40_000,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nHost: i\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: h\r\nContent-Length: " + b"9" * 4000 + b"\r\n\r\n",
    ):
        with connect(gateway.address) as connection:
            connection.sendall(head)
            assert read_all(connection).startswith(b"HTTP/1.1 400")


def test_a_slow_head_and_a_slow_body_end(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_PATIENCE", 0.2)
    monkeypatch.setattr(traffic, "BODY_PATIENCE", 0.2)
    for begun in (b"", b"GET /health HT"):
        with connect(gateway.address) as connection:
            connection.sendall(begun)
            assert read_all(connection) == b""
    with connect(gateway.address) as connection:
        connection.sendall(post("/whole", raw=b"x" * 100)[:-50])
        assert connection.recv(12) == b"HTTP/1.1 504"


def test_a_body_that_nobody_wants_is_not_read_forever(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "HEAD_PATIENCE", 0.2)
    with connect(gateway.address) as connection:
        connection.sendall(post("/whole", raw=b"x" * (MAX_BODY + 1))[:1000])
        assert connection.recv(12) == b"HTTP/1.1 400"
        connection.sendall(b"x")
        assert b"more than" in read_all(connection)  # and then it is closed


def test_too_many_connections_are_told(fake: RunningServer) -> None:
    with small_gateway(fake.address, max_connections=2) as gateway:
        with connect(gateway.address) as first:
            first.sendall(b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n")
            assert first.recv(12) == b"HTTP/1.1 200"
            reply = httpx.get(f"http://{gateway.address}/health")
            assert reply.status_code == 503
        wait_until(lambda: httpx.get(f"http://{gateway.address}/health").status_code == 200, "room")


def test_connections_far_beyond_the_bound_are_closed(
    fake: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "SPARE", 1)
    with small_gateway(fake.address, max_connections=2) as gateway:
        held = [connect(gateway.address) for _ in range(6)]
        wait_until(lambda: len(gateway._server.server_state.connections) == 3, "the rest is closed")
        for connection in held:
            connection.close()


def test_small_replies_leave_at_once(
    gateway: GatewayThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head and its body are two writes: held back, the second waits 40 ms for the caller."""
    served: list[socket.socket] = []
    made = serving.PatientProtocol.connection_made

    def connection_made(protocol: serving.PatientProtocol, transport: Any) -> None:
        served.append(transport.get_extra_info("socket"))
        made(protocol, transport)

    monkeypatch.setattr(serving.PatientProtocol, "connection_made", connection_made)
    with connect(gateway.address) as connection:
        connection.sendall(b"GET /version HTTP/1.1\r\nHost: here\r\n\r\n")
        assert connection.recv(1)
        assert served[0].getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_requests_in_one_packet_are_answered_in_their_order(gateway: GatewayThread) -> None:
    paths = ("/health", "/nowhere", "/version")
    packet = "".join(f"GET {path} HTTP/1.1\r\nHost: h\r\n\r\n" for path in paths)
    with connect(gateway.address) as connection:
        connection.sendall(
            packet.encode() + post("/whole", {"prompt": "a"}, head="Connection: close\r\n")
        )
        replies = read_all(connection)
    statuses = re.findall(rb"HTTP/1.1 (\d+)", replies)
    assert statuses == [b"200", b"404", b"200", b"200"]


def test_pages_of_other_origins_are_not_let_in_unless_named(
    fake: RunningServer,
    plain: httpx.Client,
) -> None:
    asks = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    assert plain.options("/whole", headers=asks).status_code == 405
    assert "access-control-allow-origin" not in plain.get("/health", headers=asks).headers
    with small_gateway(fake.address, cors_origins=("https://a.example",)) as gateway:
        url = f"http://{gateway.address}"
        assert httpx.options(f"{url}/whole", headers=asks).status_code == 200
        reply = httpx.get(f"{url}/health", headers=asks)
        assert reply.headers["access-control-allow-origin"] == "https://a.example"
        assert "x-request-id" in reply.headers["access-control-expose-headers"].lower()
        other = httpx.get(f"{url}/health", headers={"Origin": "https://b.example"})
        assert "access-control-allow-origin" not in other.headers


# Callers who go, who do not read, and our own end


@pytest.mark.parametrize("path", ["/whole", "/stream"])
@pytest.mark.parametrize("num_tokens", [0, 2])
def test_a_row_ends_with_its_caller(
    fake: RunningServer,
    gateway: GatewayThread,
    path: str,
    num_tokens: int,
) -> None:
    fake.engine.hold(num_tokens)
    connection = connect(gateway.address)
    connection.sendall(post(path, {"prompt": "hello there", "max_new_tokens": 100}))
    fake.engine.wait(lambda: len(fake.engine.submitted) == 1)
    if path == "/stream" and num_tokens:
        assert b"200 OK" in connection.recv(4096)
    connection.close()
    fake.engine.wait(lambda: any(call == "cancel" for call, _ in fake.engine.calls))
    wait_until(lambda: num_open(gateway) == 0, "the exchange ends")


def test_who_does_not_read_is_left(
    gateway: GatewayThread,
    plain: httpx.Client,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "READ_PATIENCE", 0.5)
    host, _, port = gateway.address.rpartition(":")
    lazy = socket.socket()
    lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    lazy.connect((host, int(port)))
    body = {"prompt": "hello there", "max_new_tokens": 0, "padding": 50_000}
    lazy.sendall(post("/stream", body))
    wait_until(lambda: num_open(gateway) == 1, "it is answered")
    assert plain.post("/whole", json={"prompt": "a"}).status_code == 200  # others go on
    wait_until(lambda: num_open(gateway) == 0, "the exchange ends")
    lazy.close()


def test_a_stop_ends_open_replies_with_words(
    fake: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serving, "STOP_GRACE", 0.1)
    fake.engine.hold(1)
    with small_gateway(fake.address) as gateway:
        stream, whole = connect(gateway.address), connect(gateway.address)
        for connection, path in ((stream, "/stream"), (whole, "/whole")):
            connection.sendall(post(path, {"prompt": "hello there"}))
        fake.engine.wait(lambda: len(fake.engine.submitted) == 2)
        begun = stream.recv(4096)
        assert b"200 OK" in begun
        gateway.close()
        rest = begun + read_all(stream)
        assert b"the gateway stops" in rest
        assert rest.endswith(b"0\r\n\r\n")  # whole, as HTTP has it
        reply = read_all(whole)
        assert reply.startswith(b"HTTP/1.1 503")
        assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"].startswith("the gateway stops")
        stream.close()
        whole.close()
