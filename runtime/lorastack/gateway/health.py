"""Whether the server behind the gateway serves, and its metrics."""

from __future__ import annotations

from typing import Any

from lorastack.errors import LorastackError
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.upstream import Upstream

PATIENCE = 5.0  # seconds for the server's answer


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """GET /health, /ping, /startup."""

    async def health(call: Call, body: None) -> Reply:
        await upstream.client.model_info(timeout=PATIENCE)
        return Reply(b"")

    return [
        Operation(
            method="GET",
            path=path,
            summary="200 when requests are served",
            handle=health,
            refuse=refuse,
        )
        for path in ("/health", "/ping", "/startup")
    ]


def refuse(error: LorastackError, status: int) -> dict[str, str]:
    """The body of a server that does not answer."""
    return {"error": error.message, "error_type": "unavailable"}
