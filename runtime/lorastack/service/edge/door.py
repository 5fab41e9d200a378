"""What every call passes before its method: the bound on calls, and the parsing of its bytes.

Messages are parsed one at a time, and the event loop does other work between two of them, so that
streams go on however many large requests come in at once.
"""

from __future__ import annotations

import asyncio
import inspect
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any

import grpc

from lorastack.errors import (
    DeadlineExceededError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
)
from lorastack.service.edge.status import CallGuard, Context, call_is_over, new_request_id
from lorastack.service.edge.wire import RequestReader

SILENCE = 60.0  # seconds to wait for a call's first message; of other services, for each message
# Calls at a time of each method of health and reflection. Replies that wait to be read do not
# count, so that they never keep health from being told.
MAX_OTHER_CALLS = 64

# grpc.aio's four kinds of methods as one: messages in; one message returned, or many written.
Method = Callable[[AsyncIterator[Any], Context], Awaitable[Any]]


class Door(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Bounds the calls that run, and reads their messages."""

    def __init__(
        self, guard: CallGuard, readers: Mapping[str, RequestReader], *, own: str, max_calls: int
    ) -> None:
        """readers: one for each method, by full name ("/package.Service/Method").

        own: how the names of our methods begin; these share max_calls.
        """
        self._guard = guard
        self._readers = readers
        self._own = own
        self._max_calls = max_calls
        self._num_calls: Counter[str] = Counter()
        self._turn = asyncio.Lock()

    async def intercept_service(
        self,
        continuation: Callable[
            [grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]
        ],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """The same method, as one that gets a stream of bytes."""
        handler: Any = await continuation(handler_call_details)
        name = handler_call_details.method
        if handler.response_streaming:
            make = grpc.stream_stream_rpc_method_handler
            inner = handler.stream_stream if handler.request_streaming else handler.unary_stream
        else:
            make = grpc.stream_unary_rpc_method_handler
            inner = handler.stream_unary if handler.request_streaming else handler.unary_unary
        if inspect.isasyncgenfunction(inner):
            inner = _written(inner)
        if not handler.request_streaming:
            inner = _first(inner)
        return make(self._entered(name, inner), response_serializer=handler.response_serializer)

    def _entered(self, name: str, method: Method) -> Method:
        own = name.startswith(self._own)
        group, most = (self._own, self._max_calls) if own else (name, MAX_OTHER_CALLS)

        def leave(_: object = None) -> None:
            self._num_calls[group] -= 1

        async def enter(_: AsyncIterator[bytes], context: Context) -> Any:
            self._num_calls[group] += 1
            if own:  # counts until its last byte is read, so unread replies count too
                context.add_done_callback(leave)  # type: ignore[arg-type]
            try:
                return await self._called(name, method, context, self._num_calls[group] <= most)
            except grpc.aio.AbortError as aborted:
                # grpc keeps the error with the call, and its frames keep the request: a cycle that
                # stays until the collector comes by.
                aborted.__context__ = None
                raise aborted.with_traceback(None) from None
            finally:
                if not own:
                    leave()

        return enter

    async def _called(self, name: str, method: Method, context: Context, admitted: bool) -> Any:
        try:
            if not admitted:
                raise ResourceExhaustedError(
                    "too many calls are running already; try again later",
                    reason=Reason.TOO_MANY_CALLS,
                )
            with call_is_over():
                return await method(self._messages(name, context), context)
        except LorastackError as error:  # a method's own errors end in its guard
            async with self._guard(name.rpartition("/")[2], context, new_request_id()):
                raise error

    async def _messages(self, name: str, context: Context) -> AsyncIterator[Any]:
        """A call's messages. grpc's own iterator would keep the last one's bytes in a cycle."""
        reader = self._readers[name]
        silence: float | None = SILENCE
        while True:
            try:
                async with asyncio.timeout(silence):
                    raw = await context.read()
            except TimeoutError:
                raise DeadlineExceededError(
                    f"no message came for {SILENCE:g} seconds; send it with the call"
                ) from None
            if raw is grpc.aio.EOF:  # type: ignore[attr-defined]
                await _check_half_closed(context)
                return
            async with self._turn:
                message = _read(reader, raw)
                del raw
                await asyncio.sleep(0)
            if isinstance(message, LorastackError):
                raise message
            yield message
            del message
            if name.startswith(self._own):
                silence = None  # uploads have a limit of their own


def _read(reader: RequestReader, raw: bytes) -> Any:
    """The message, or the error, without the frames that would keep its bytes."""
    try:
        return reader.read(raw)
    except LorastackError as error:
        error.__context__ = None
        return error.with_traceback(None)


async def _check_half_closed(context: Context) -> None:
    """Raises CancelledError if a stream has ended because its call has.

    grpc shows both as the stream's end, but metadata can be sent only while the caller listens.
    Once we have replied, the next reply will tell.
    """
    with call_is_over(), suppress(grpc.aio.UsageError):
        await context.send_initial_metadata(())


def _first(method: Callable[[Any, Context], Awaitable[Any]]) -> Method:
    """Wraps a method that takes one message as one that takes a stream."""

    async def call(messages: AsyncIterator[Any], context: Context) -> Any:
        message = await anext(messages, None)
        if message is None:
            raise InvalidArgumentError("the call ended without a message; send one")
        return await method(message, context)

    return call


def _written(method: Callable[[Any, Context], AsyncIterator[Any]]) -> Method:
    """Wraps a method that yields its replies as one that writes them."""

    async def call(messages: AsyncIterator[Any], context: Context) -> None:
        async for reply in method(messages, context):
            await context.write(reply)

    return call
