"""Errors on their way out: one table from error classes to gRPC codes, one guard around every RPC.

Every status carries google.rpc.ErrorInfo (domain "lorastack", a stable reason, request_id among
its metadata); RESOURCE_EXHAUSTED also carries RetryInfo. Anything unexpected becomes INTERNAL, is
logged with its traceback, and shows the caller nothing but the request id.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorastack.codes import CODES
from lorastack.errors import (
    InternalError,
    LorastackError,
    ResourceExhaustedError,
    UnavailableError,
)

DOMAIN = "lorastack"
# Statuses travel in HTTP/2 trailers, which receivers cap at 8 KiB; percent-encoding triples bytes.
MAX_MESSAGE_BYTES = 1024
MAX_METADATA_BYTES = 256
DEFAULT_RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)

# The aio context is generic over the messages of its RPC, which do not matter here.
Context = grpc.aio.ServicerContext[Any, Any]


def new_request_id() -> str:
    """A fresh id: 32 hexadecimal digits."""
    return uuid.uuid4().hex


def code_of(error: LorastackError) -> grpc.StatusCode:
    """The gRPC code of an error's class."""
    code = next((CODES[kind] for kind in type(error).__mro__ if kind in CODES), None)
    return code or grpc.StatusCode.INTERNAL


def to_status(error: LorastackError, request_id: str) -> status_pb2.Status:
    """The google.rpc.Status of an error; texts too long for trailers are cut."""
    info = error_details_pb2.ErrorInfo(reason=error.reason.value, domain=DOMAIN)
    for key, value in {**error.metadata, "request_id": request_id}.items():
        info.metadata[key] = _cut(value, MAX_METADATA_BYTES)
    details = [_pack(info)]
    if isinstance(error, ResourceExhaustedError):
        seconds = DEFAULT_RETRY_SECONDS if error.retry_after is None else error.retry_after
        delay = duration_pb2.Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9))
        details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
    return status_pb2.Status(
        code=code_of(error).value[0],
        message=_cut(error.message, MAX_MESSAGE_BYTES),
        details=details,
    )


class CallGuard:
    """Wraps the body of every RPC. draining: new calls are refused, running ones go on."""

    def __init__(self, on_end: Callable[[str, grpc.StatusCode], None]) -> None:
        """on_end: called with the RPC's name and how it ended."""
        self.draining = False
        self._on_end = on_end
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def idle(self, timeout: float) -> None:
        """Waits until no call runs, for at most `timeout` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)

    @asynccontextmanager
    async def __call__(self, rpc: str, context: Context, request_id: str) -> AsyncIterator[None]:
        """Turns whatever the body raises into a status. Cancellation passes through."""
        self._num_calls += 1
        self._idle.clear()
        try:
            if self.draining:
                raise UnavailableError(
                    "the server is shutting down; send the request to another one"
                )
            yield
            self._on_end(rpc, grpc.StatusCode.OK)
        except LorastackError as error:
            level = logging.ERROR if isinstance(error, InternalError) else logging.INFO
            logger.log(
                level, "%s: %s", error.reason, error.message, extra={"request_id": request_id}
            )
            await self._abort(rpc, context, error, request_id)
        except asyncio.CancelledError:
            self._on_end(rpc, grpc.StatusCode.CANCELLED)
            raise
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception:
            logger.exception("unexpected error", extra={"request_id": request_id})
            bug = InternalError(
                f"the server failed on request {request_id}; its log says why, please report it"
            )
            await self._abort(rpc, context, bug, request_id)
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()

    async def _abort(
        self, rpc: str, context: Context, error: LorastackError, request_id: str
    ) -> None:
        self._on_end(rpc, code_of(error))
        status = rpc_status.to_status(to_status(error, request_id))
        await context.abort(status.code, status.details, status.trailing_metadata)


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _cut(text: str, limit: int) -> str:
    raw = text.encode("utf-8", "replace")
    if len(raw) <= limit:
        return text
    return raw[: limit - 3].decode("utf-8", "ignore") + "..."
