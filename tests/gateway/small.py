"""A gateway with two operations of its own, in front of a server whose engine tests hold."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from pydantic import BaseModel

from lorastack.client import GenerateRequest
from lorastack.config import GatewayConfig
from lorastack.gateway import app
from lorastack.gateway.exchange import Call, Events, Operation, Reply, event
from lorastack.gateway.health import Scrape, refuse
from lorastack.gateway.selection import Selection, Selector
from lorastack.gateway.serving import GatewayThread, bind
from lorastack.gateway.upstream import Upstream, row_id

PATIENCE = 120.0
HOST = "127.0.0.1"


class Body(BaseModel):
    """A prompt, and values of any size. padding: characters beside the text of each event."""

    prompt: str
    max_new_tokens: int = 8
    number: float = 0.0
    anything: object = None
    padding: int = 0
    lora: str = ""


@contextmanager
def small_gateway(target: str, **config: Any) -> Iterator[GatewayThread]:
    """Serves POST /whole and /stream beside what a gateway always serves."""
    served = replace(GatewayConfig(target=target, port=0), **config)
    ours = app.all_operations

    def operations(
        config: GatewayConfig, upstream: Upstream, selector: Selector, scrape: Scrape | None
    ) -> Sequence[Operation[Any]]:
        return [*ours(config, upstream, selector, scrape), *_operations(selector)]

    with patch.object(app, "all_operations", operations):
        gateway = GatewayThread(served, bind(served))
    try:
        yield gateway
    finally:
        gateway.close()


def _operations(selector: Selector) -> list[Operation[Any]]:
    def request(call: Call, body: Body) -> GenerateRequest:
        asked = GenerateRequest(prompt=body.prompt, request_id=row_id(call.request_id))
        asked.stop.max_new_tokens = body.max_new_tokens
        return asked

    async def whole(call: Call, body: Body) -> Reply:
        if body.prompt == "a bug":
            raise ZeroDivisionError("secret")
        reply = await selector.generate(request(call, body), Selection(name=body.lora))
        return Reply({"text": reply.text})

    async def stream(call: Call, body: Body) -> Events:
        parts = await selector.stream(request(call, body), Selection(name=body.lora))

        async def texts() -> AsyncGenerator[bytes]:
            async for part in parts:
                if body.prompt == "a late bug":
                    raise ZeroDivisionError("secret")
                yield event(json.dumps({"text": part.text + " " * body.padding}))

        return Events(
            texts(), lambda error: event(json.dumps({"error": error.message})), parts.aclose
        )

    shared: dict[str, Any] = {"method": "POST", "summary": "", "body": Body, "refuse": refuse}
    return [
        Operation(path="/whole", handle=whole, **shared),
        Operation(path="/stream", handle=stream, **shared),
    ]


def connect(address: str) -> socket.socket:
    """A plain connection."""
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE)


def post(path: str, body: object = None, *, raw: bytes | None = None, head: str = "") -> bytes:
    """A request as it goes over the wire. head: more lines, each with its end."""
    content = json.dumps(body).encode() if raw is None else raw
    return (
        f"POST {path} HTTP/1.1\r\nHost: here\r\nContent-Length: {len(content)}\r\n{head}\r\n"
    ).encode() + content


def read_all(connection: socket.socket) -> bytes:
    """Until the other side closes."""
    parts = []
    while part := connection.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)
