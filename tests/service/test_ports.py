"""Ports are had before anything else, and by nobody else until the server listens."""

from __future__ import annotations

import asyncio
import logging
import socket

import grpc
import pytest

from lorastack.config import ServiceConfig
from lorastack.errors import InvalidArgumentError
from lorastack.service.edge.ports import Ports


def reserved(ports: Ports) -> int:
    return int(ports._address.rsplit(":", 1)[1])


def test_a_reserved_port_is_kept_and_refuses_callers() -> None:
    ports = Ports(ServiceConfig(port=0))
    port = reserved(ports)
    with pytest.raises(InvalidArgumentError, match=f":{port}.*another process.*--port"):
        Ports(ServiceConfig(port=port))
    with socket.socket() as caller:
        assert caller.connect_ex(("127.0.0.1", port)) != 0
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
    ports.close()
    Ports(ServiceConfig(port=port)).close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_server_listens_on_what_was_reserved(host: str) -> None:
    async def serve() -> None:
        ports = Ports(ServiceConfig(host=host, port=0))
        port = reserved(ports)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        assert ports.listen(server) == f"{host}:{port}"
        await server.start()
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(InvalidArgumentError, match="another process"):
            Ports(ServiceConfig(port=port))
        await server.stop(None)

    asyncio.run(serve())


def test_whoever_takes_the_port_in_between_is_told_of() -> None:
    async def listen() -> None:
        ports = Ports(ServiceConfig(port=0))
        port = reserved(ports)
        ports.close()
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        with (
            socket.create_server(("127.0.0.1", port)),
            pytest.raises(InvalidArgumentError, match="choose another --port"),
        ):
            ports.listen(server)
        await server.stop(None)

    asyncio.run(listen())


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "\x00", "x" * 300])
def test_what_is_no_address_of_ours_is_refused(host: str) -> None:
    with pytest.raises(InvalidArgumentError, match="--host"):
        Ports(ServiceConfig(host=host, port=0))


def test_metrics_have_a_port_of_their_own() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        number = taken.getsockname()[1]
        with pytest.raises(InvalidArgumentError, match="--metrics-port"):
            Ports(ServiceConfig(port=0, metrics_port=number))


def test_other_machines_are_worth_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    async def listen(host: str) -> None:
        server = grpc.aio.server()
        Ports(ServiceConfig(host=host, port=0)).listen(server)
        await server.stop(None)

    with caplog.at_level(logging.WARNING):
        asyncio.run(listen("127.0.0.1"))
        assert caplog.text == ""
        asyncio.run(listen("0.0.0.0"))
    assert len(caplog.records) == 1
    assert "no authentication" in caplog.text
