"""Errors on their way out: gRPC codes from the table in `codes`, one guard around every RPC.

Every status carries google.rpc.ErrorInfo (domain "lorastack", a stable reason, request_id among
its metadata); RESOURCE_EXHAUSTED also carries RetryInfo. Anything unexpected becomes INTERNAL, is
logged with its traceback, and shows the caller nothing but the request id. A caller who has gone is
CANCELLED, whatever we were doing for it.

Each call that fails, changes something or generates leaves a line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
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
from lorastack.printable import printable

DOMAIN = "lorastack"
# Statuses travel in HTTP/2 trailers, which receivers cap at 8 KiB; percent-encoding triples bytes.
MAX_MESSAGE_BYTES = 1024
MAX_METADATA_BYTES = 256
DEFAULT_RETRY_SECONDS = 1.0
ABORT_SECONDS = 2.0  # seconds that a call waits for its status to be sent
MAX_REFUSALS = 100  # lines a second; callers must not fill the log

logger = logging.getLogger(__name__)

# The aio context is generic over the messages of its RPC, which do not matter here.
Context = grpc.aio.ServicerContext[Any, Any]
# What a call's line in the log says beside its name and outcome: adapters, tokens, times.
Notes = dict[str, object]


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


@contextmanager
def call_is_over() -> Iterator[None]:
    """Around sends: turns grpc's error that the caller has left into CancelledError."""
    try:
        yield
    except grpc.aio.InternalError:  # ExecuteBatchError among them, which is not public
        raise asyncio.CancelledError from None


class CallGuard:
    """Wraps the body of every RPC. draining: new calls are refused, running ones go on."""

    def __init__(self, on_end: Callable[[str, grpc.StatusCode], None]) -> None:
        """on_end: called with the RPC's name and how it ended."""
        self.draining = False
        self._on_end = on_end
        self._num_calls = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._refusals = _Refusals()

    async def idle(self, timeout: float) -> None:
        """Waits until no call runs, for at most `timeout` seconds."""
        with suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout)

    @asynccontextmanager
    async def __call__(self, rpc: str, context: Context, request_id: str) -> AsyncIterator[Notes]:
        """Turns whatever the body raises into a status. Cancellation passes through.

        The body fills the notes; a call that ends well without any is logged at DEBUG only.
        """
        notes: Notes = {}
        call = _Call(rpc, context, request_id, notes, time.monotonic())
        self._num_calls += 1
        self._idle.clear()
        try:
            if self.draining:
                raise UnavailableError(
                    "the server is shutting down; send the request to another one"
                )
            with call_is_over():
                yield notes
            self._on_end(rpc, grpc.StatusCode.OK)
            call.log(logging.INFO if notes else logging.DEBUG, "OK")
        except LorastackError as error:
            code = code_of(error)
            if isinstance(error, InternalError):
                call.log(logging.ERROR, f"{code.name}: {error.reason}: {error.message}")
            elif self._refusals.may_log():
                call.log(logging.INFO, f"{code.name}: {error.reason}: {error.message}")
            await self._abort(call, error)
        except asyncio.CancelledError:
            self._on_end(rpc, grpc.StatusCode.CANCELLED)
            if self._refusals.may_log():
                call.log(logging.INFO, "CANCELLED")
            raise
        except (grpc.aio.AbortError, grpc.aio.UsageError):
            raise
        except Exception:
            call.log(logging.ERROR, "INTERNAL: unexpected error", exc_info=True)
            bug = InternalError(
                f"the server failed on request {request_id}; its log says why, please report it"
            )
            await self._abort(call, bug)
        finally:
            self._num_calls -= 1
            if self._num_calls == 0:
                self._idle.set()

    async def _abort(self, call: _Call, error: LorastackError) -> None:
        self._on_end(call.rpc, code_of(error))
        status = rpc_status.to_status(to_status(error, call.request_id))
        with call_is_over():
            try:
                async with asyncio.timeout(ABORT_SECONDS):
                    await call.context.abort(status.code, status.details, status.trailing_metadata)
            except TimeoutError:
                # It waits behind what the caller has not read, and will be sent after that; the
                # call is over for us.
                raise asyncio.CancelledError from None


@dataclass(frozen=True, slots=True)
class _Call:
    """What a line about a call says."""

    rpc: str
    context: Context
    request_id: str
    notes: Notes
    began: float  # time.monotonic()

    def log(self, level: int, outcome: str, *, exc_info: bool = False) -> None:
        if logger.isEnabledFor(level):
            extra = {
                "request_id": self.request_id,
                "peer": self.context.peer(),
                "rpc": self.rpc,
                **{key: _noted(value) for key, value in self.notes.items()},
                "ms": round((time.monotonic() - self.began) * 1000, 1),
            }
            line = f"{self.rpc} {_cut(outcome, MAX_MESSAGE_BYTES)}"
            logger.log(level, "%s", line, extra=extra, exc_info=exc_info)


class _Refusals:
    """Bounds the lines a second about callers who are refused or leave. The rest is counted."""

    def __init__(self) -> None:
        self._second = 0.0  # time.monotonic()
        self._num_logged = 0
        self._num_left_out = 0

    def may_log(self) -> bool:
        """True if one more line may be written; counts it."""
        now = time.monotonic()
        if now - self._second >= 1.0:
            if self._num_left_out:
                logger.warning("%d more calls were refused or cancelled", self._num_left_out)
            self._second, self._num_logged, self._num_left_out = now, 0, 0
        if self._num_logged == MAX_REFUSALS:
            self._num_left_out += 1
            return False
        self._num_logged += 1
        return True


def _pack(message: Any) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def _noted(value: object) -> object:
    return _cut(value, MAX_METADATA_BYTES) if isinstance(value, str) else value


def _cut(text: str, limit: int) -> str:
    """At most so many bytes, and printable: callers show it, proxies log it."""
    text = printable(text[:limit])
    raw = text.encode()
    if len(raw) <= limit:
        return text
    return raw[: limit - 3].decode("utf-8", "ignore") + "..."
