"""The client for asyncio: all calls but those that move files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from lorastack.client.calls import (
    CHANNEL_OPTIONS,
    DEFAULT_SERVER,
    PAGE_SIZE,
    Patience,
    check_server,
    our_errors,
)
from lorastack.client.merging import MajoritySign, Strategy, merge_request
from lorastack.errors import ResourceExhaustedError
from lorastack.v1 import (
    adapters_pb2,
    adapters_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
)
from lorastack.v1.adapters_pb2 import Adapter
from lorastack.v1.generation_pb2 import LoraRef


class AsyncClient:
    """`Client`'s calls for one event loop. Make it where the loop runs.

    Cancelling the task that waits for a call cancels the call.
    """

    def __init__(self, server: str = DEFAULT_SERVER, *, retries: int = 0) -> None:
        """See `Client`."""
        check_server(server)
        self._server = server
        self._retries = retries
        self._channel = grpc.aio.insecure_channel(server, options=CHANNEL_OPTIONS)
        self._generation: Any = generation_pb2_grpc.GenerationServiceStub(self._channel)  # type: ignore[no-untyped-call]
        self._adapters: Any = adapters_pb2_grpc.AdapterServiceStub(self._channel)  # type: ignore[no-untyped-call]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends running calls too."""
        await self._channel.close(None)

    async def generate(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None = None
    ) -> generation_pb2.GenerateResponse:
        """Returns the whole reply at once."""
        reply: generation_pb2.GenerateResponse = await self._call(
            self._generation.Generate, request, timeout
        )
        return reply

    async def stream(
        self, request: generation_pb2.GenerateRequest, *, timeout: float | None = None
    ) -> AsyncGenerator[generation_pb2.GenerateStreamResponse]:
        """Yields the reply as it is made; the last message has `final`.

        `aclose()` of the iterator cancels the call. A loop that is left early cancels it only when
        Python collects the iterator, with `contextlib.aclosing` at once.
        """
        patience = Patience(self._retries, timeout)
        while True:
            call, begun = self._generation.GenerateStream(request, timeout=patience.left()), False
            try:
                with our_errors(self._server):
                    async for part in call:
                        begun = True
                        yield part
                return
            except ResourceExhaustedError as error:
                if begun:
                    raise
                delay = patience.delay(error)
            finally:
                call.cancel()
            await asyncio.sleep(delay)

    async def tokenize(
        self, request: generation_pb2.TokenizeRequest, *, timeout: float | None = None
    ) -> list[int]:
        """The token ids that Generate would run."""
        reply = await self._call(self._generation.Tokenize, request, timeout)
        return list(reply.token_ids)

    async def token_spans(
        self, prompt: str, *, timeout: float | None = None
    ) -> generation_pb2.TokenizeResponse:
        """A prompt's token ids, and each one's text and place."""
        request = generation_pb2.TokenizeRequest(prompt=prompt, spans=True)
        reply: generation_pb2.TokenizeResponse = await self._call(
            self._generation.Tokenize, request, timeout
        )
        return reply

    async def model_info(
        self, *, timeout: float | None = None
    ) -> generation_pb2.GetModelInfoResponse:
        """What the server serves, and its limits."""
        reply: generation_pb2.GetModelInfoResponse = await self._call(
            self._generation.GetModelInfo, generation_pb2.GetModelInfoRequest(), timeout
        )
        return reply

    async def get_adapter(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """See `Client.get_adapter`."""
        request = adapters_pb2.GetAdapterRequest(id=adapter_id)
        reply: Adapter = await self._call(self._adapters.GetAdapter, request, timeout)
        return reply

    async def list_adapters(
        self, prefix: str = "", *, timeout: float | None = None
    ) -> list[Adapter]:
        """See `Client.list_adapters`."""
        adapters: list[Adapter] = []
        request = adapters_pb2.ListAdaptersRequest(page_size=PAGE_SIZE, id_prefix=prefix)
        while True:
            page = await self._call(self._adapters.ListAdapters, request, timeout)
            adapters.extend(page.adapters)
            if not page.next_page_token:
                return adapters
            request.page_token = page.next_page_token

    async def load(
        self, adapter_id: str, *, pin: bool = False, timeout: float | None = None
    ) -> Adapter:
        """See `Client.load`."""
        request = adapters_pb2.LoadAdapterRequest(id=adapter_id, pin=pin)
        reply: Adapter = await self._call(self._adapters.LoadAdapter, request, timeout)
        return reply

    async def unload(self, adapter_id: str, *, timeout: float | None = None) -> Adapter:
        """See `Client.unload`."""
        request = adapters_pb2.UnloadAdapterRequest(id=adapter_id)
        reply: Adapter
        reply = await self._call(self._adapters.UnloadAdapter, request, timeout)
        return reply

    async def delete_adapter(self, adapter_id: str, *, timeout: float | None = None) -> None:
        """See `Client.delete_adapter`."""
        request = adapters_pb2.DeleteAdapterRequest(id=adapter_id)
        await self._call(self._adapters.DeleteAdapter, request, timeout)

    async def pull(
        self,
        adapter_id: str,
        *,
        hub_id: str = "",
        folder: str = "",
        revision: str = "",
        token: str = "",
        if_digest: str | None = None,
    ) -> Adapter:
        """See `Client.pull`."""
        request = adapters_pb2.PullAdapterRequest(
            id=adapter_id, revision=revision, token=token, if_digest=if_digest
        )
        if hub_id:
            request.hub_id = hub_id
        if folder:
            request.folder = folder
        reply = adapters_pb2.PullAdapterResponse()
        call = self._adapters.PullAdapter(request)
        try:
            with our_errors(self._server):
                async for part in call:
                    reply = part
        finally:
            call.cancel()
        return reply.adapter

    async def metrics(
        self,
        accept: str = "",
        part: generation_pb2.GetMetricsRequest.Part = generation_pb2.GetMetricsRequest.ALL,
        *,
        timeout: float | None = None,
    ) -> generation_pb2.GetMetricsResponse:
        """A scrape for Prometheus and routers, or a part of it; see `Client.metrics`."""
        request = generation_pb2.GetMetricsRequest(accept=accept, part=part)
        reply: generation_pb2.GetMetricsResponse = await self._call(
            self._generation.GetMetrics, request, timeout
        )
        return reply

    async def merge(
        self,
        loras: Sequence[LoraRef],
        strategy: Strategy,
        density: float,
        *,
        majority_sign: MajoritySign = "total",
        timeout: float | None = None,
    ) -> Adapter:
        """See `Client.merge`."""
        request = merge_request(loras, strategy, density, majority_sign)
        reply: Adapter = await self._call(self._adapters.MergeAdapters, request, timeout)
        return reply

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        patience = Patience(self._retries, timeout)
        while True:
            try:
                with our_errors(self._server):
                    return await method(request, timeout=patience.left())
            except ResourceExhaustedError as error:
                delay = patience.delay(error)
            await asyncio.sleep(delay)
