"""Whether the server behind the gateway serves, and its metrics."""

from __future__ import annotations

from typing import Any

from lorastack import __version__
from lorastack.errors import DeadlineExceededError, LorastackError, UnavailableError
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.statuses import http_status
from lorastack.gateway.upstream import Upstream

UNAVAILABLE = (UnavailableError, DeadlineExceededError)
PATIENCE = 5.0  # seconds for the server's answer


def operations(upstream: Upstream) -> list[Operation[Any]]:
    """GET /health, /ping, /startup, /version, /metrics; POST /ping."""

    async def health(call: Call, body: None) -> Reply:
        await upstream.client.model_info(timeout=PATIENCE)
        return Reply(b"")

    async def version(call: Call, body: None) -> Reply:
        return Reply({"version": __version__})

    async def metrics(call: Call, body: None) -> Reply:
        accept = call.headers.get("accept", "")
        scrape = await upstream.client.metrics(accept, timeout=PATIENCE)
        return Reply(scrape.body, headers={"content-type": scrape.content_type})

    serves = "200 when requests are served"
    rows = [
        ("GET", "/health", serves, health),
        ("GET", "/ping", serves, health),
        ("POST", "/ping", serves, health),  # as SageMaker's and vLLM's may be asked
        ("GET", "/startup", serves, health),
        ("GET", "/version", "The version", version),
        ("GET", "/metrics", "For Prometheus and routers", metrics),
    ]
    return [
        Operation(
            method=method,
            path=path,
            summary=summary,
            handle=handle,
            refuse=refuse,
            status_of=unavailable,
        )
        for method, path, summary, handle in rows
    ]


def refuse(error: LorastackError, status: int) -> dict[str, str]:
    """The body of a server that does not answer."""
    return {"error": error.message, "error_type": "unavailable"}


def unavailable(error: LorastackError) -> int:
    """503 for a server that drains, is gone, or does not answer in time."""
    return 503 if isinstance(error, UNAVAILABLE) else http_status(error)
