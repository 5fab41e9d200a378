"""Whether the server behind the gateway serves, and its metrics."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lorastack import __version__
from lorastack.client import GetMetricsRequest
from lorastack.errors import DeadlineExceededError, LorastackError, UnavailableError
from lorastack.gateway.exchange import Call, Operation, Reply
from lorastack.gateway.statuses import http_status
from lorastack.gateway.upstream import Upstream

UNAVAILABLE = (UnavailableError, DeadlineExceededError)
PATIENCE = 5.0  # seconds for the server's answer
OWN_AGE = 1.0  # seconds that our own names may be old here, beside the server's second
MAX_KEPT = 8  # of their texts: callers choose the type
END = b"# EOF\n"  # of OpenMetrics; it ends the whole


Scrape = Callable[[str], tuple[str, bytes]]  # an Accept header -> content type, body


def operations(upstream: Upstream, scrape: Scrape | None = None) -> list[Operation[Any]]:
    """GET /health, /ping, /startup, /version, /metrics; POST /ping.

    scrape: gives the server's metrics without a call, within milliseconds.
    """

    remote = _RemoteScrape(upstream)

    async def health(call: Call, body: None) -> Reply:
        await upstream.client.model_info(timeout=PATIENCE)
        return Reply(b"")

    async def version(call: Call, body: None) -> Reply:
        return Reply({"version": __version__})

    async def metrics(call: Call, body: None) -> Reply:
        accept = call.headers.get("accept", "")
        if scrape is None:
            content_type, content = await remote.text(accept)
        else:
            content_type, content = scrape(accept)
        return Reply(content, headers={"content-type": content_type})

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


class _RemoteScrape:
    """The server's metrics. Our own names are large and asked for once a second only."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._own: OrderedDict[str, tuple[float, bytes]] = OrderedDict()  # by Accept, with the time

    async def text(self, accept: str) -> tuple[str, bytes]:
        """(content type, body). Raises UnavailableError."""
        client, now = self._upstream.client, time.monotonic()
        routers = await client.metrics(accept, GetMetricsRequest.ROUTERS, timeout=PATIENCE)
        kept = self._own.get(accept)
        if kept is None or now - kept[0] >= OWN_AGE:
            own = await client.metrics(accept, GetMetricsRequest.OWN, timeout=PATIENCE)
            kept = self._own[accept] = now, own.body.removesuffix(END)
            if len(self._own) > MAX_KEPT:
                self._own.popitem(last=False)
        return routers.content_type, kept[1] + routers.body


def refuse(error: LorastackError, status: int) -> dict[str, str]:
    """The body of a server that does not answer."""
    return {"error": error.message, "error_type": "unavailable"}


def unavailable(error: LorastackError) -> int:
    """503 for a server that drains, is gone, or does not answer in time."""
    return 503 if isinstance(error, UNAVAILABLE) else http_status(error)
