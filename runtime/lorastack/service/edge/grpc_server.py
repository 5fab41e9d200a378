"""grpc.aio's server with our bounds, made to survive whatever arrives."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Mapping, Sequence
from typing import Any, cast

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

from lorastack.config import KIB

RESERVED_FILES = 256  # descriptors for the store, the model and ourselves, beside connections
MAX_CONNECTIONS = 4096
ONLY_GZIP = 1 << grpc.Compression.NoCompression | 1 << grpc.Compression.Gzip


def raise_file_limit() -> int:
    """Lets this process open as many files as the system allows; returns how many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # some systems promise more than they give
        return soft
    return hard


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]],
    *,
    max_message_bytes: int,
    max_calls: int,
    max_files: int,
) -> grpc.aio.Server:
    """A server with our bounds, not started.

    max_calls: calls at a time, which the interceptors bound; grpc refuses beyond twice as many.
    max_files: descriptors that this process may open.
    """
    connections = min(MAX_CONNECTIONS, max(max_files - RESERVED_FILES, max_files // 2))
    server: Any = _Server(
        interceptors,
        2 * max_calls,
        {
            "grpc.so_reuseport": 0,  # a second server on the port is an error, not a coin toss
            "grpc.max_receive_message_length": max_message_bytes,
            # gRPC would unzip a message to a thousand times its size; the door stops in time.
            "grpc.per_message_decompression": 0,
            "grpc.compression_enabled_algorithms_bitset": ONLY_GZIP,
            # Beyond these a connection or a stream is refused, and tried again by its client.
            "grpc.max_allowed_incoming_connections": connections,
            "grpc.max_concurrent_streams": max_calls,
            "grpc.max_metadata_size": 8 * KIB,
            "grpc.absolute_max_metadata_size": 16 * KIB,
            # A connection that never completes, or that nobody uses, ends; clients come back.
            "grpc.server_handshake_timeout_ms": 10_000,
            "grpc.max_connection_idle_ms": 600_000,
            # A client that vanished without a word is noticed within 40 s, and its rows end.
            "grpc.keepalive_time_ms": 30_000,
            "grpc.keepalive_timeout_ms": 10_000,
            "grpc.http2.min_ping_interval_without_data_ms": 10_000,
        },
    )
    return cast(grpc.aio.Server, server)


class _Server(_server.Server):
    def __init__(
        self,
        interceptors: Sequence[grpc.aio.ServerInterceptor[Any, Any]],
        max_calls: int,
        options: Mapping[str, int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = _Core(self._loop, None, (), interceptors, tuple(options.items()), max_calls)


class _Core(cygrpc.AioServer):  # type: ignore[misc]
    """Calls of methods that do not exist are refused without reading which one they meant.

    grpc's own loop decodes that name as UTF-8 and, where this fails, shuts the server down: one
    call would end it for everybody. Calls of methods that exist arrive elsewhere.
    """

    def _make_request_call_future(self, method: bytes | None) -> Any:
        if method is not None:
            return super()._make_request_call_future(method)
        return asyncio.get_running_loop().create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Runs until the server stops: then _request_call raises."""
        loop = asyncio.get_running_loop()
        tasks: set[asyncio.Task[None]] = set()
        while True:
            state = await self._request_call()
            refusal = cygrpc._handle_rpc("", _Nothing(), (), state, loop, False)
            task = loop.create_task(cygrpc._schedule_rpc_coro(refusal, state, loop, ""))
            tasks.add(task)  # the loop keeps weak references only
            task.add_done_callback(tasks.discard)


class _Nothing:
    """A resolver that knows no method."""

    def resolve_handler(self, details: grpc.HandlerCallDetails) -> None:
        return None
