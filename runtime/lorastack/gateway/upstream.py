"""The gRPC server behind the gateway: its client, and what it serves."""

from __future__ import annotations

import secrets
import time

from lorastack.client import AsyncClient, GetModelInfoResponse

INFO_SECONDS = 10.0  # how long the server's description is kept


class Upstream:
    """One server, for one event loop."""

    def __init__(self, target: str) -> None:
        """target: HOST:PORT, for messages."""
        self.target = target
        self._client: AsyncClient | None = None
        self._info: GetModelInfoResponse | None = None
        self._info_until = 0.0

    def attach(self, client: AsyncClient) -> None:
        """Called once, before the first request."""
        self._client = client

    @property
    def client(self) -> AsyncClient:
        """The client, once the application has started."""
        assert self._client is not None, "attach() comes before the first request"
        return self._client

    async def info(self) -> GetModelInfoResponse:
        """What is served; asked again every few seconds, as another server may come to the address.

        Raises UnavailableError.
        """
        if self._info is None or time.monotonic() >= self._info_until:
            self._info = await self.client.model_info(timeout=INFO_SECONDS)
            self._info_until = time.monotonic() + INFO_SECONDS
        return self._info


def row_id(request_id: str) -> str:
    """An id for one row of an HTTP request: several rows and retries share the request's."""
    return f"{request_id}-{secrets.token_hex(4)}"
