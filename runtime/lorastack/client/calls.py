"""What both clients share: the channel's settings, errors, and when to try a call again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

import grpc
from google.rpc import error_details_pb2  # type: ignore[import-untyped]
from grpc_status import rpc_status

from lorastack.codes import CODES
from lorastack.config import MIB
from lorastack.errors import (
    InternalError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
)

DEFAULT_SERVER = "127.0.0.1:50051"
# A vanished server is noticed within 40 s; long outputs with logprobs are large messages.
CHANNEL_OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 256 * MIB),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2_000),
]
Progress = Callable[[int, int], None]  # bytes done, bytes in all
ERRORS = {code: kind for kind, code in CODES.items()}
PAGE_SIZE = 1000  # adapters in one reply of ListAdapters
LONGEST_TIMEOUT = 365 * 86_400.0  # seconds; gRPC cannot count much further: beyond it, no deadline

# Nothing of the request has run, and room for it comes as others end.
_PASSING = (Reason.QUEUE_FULL, Reason.TOO_MANY_CALLS)
_HOST_PORT = re.compile(r"([!-9;-Z\\^-~]+|\[[0-9A-Fa-f:.%]+\]):(?P<port>[0-9]{1,5})")
_SCHEME = re.compile(r"(unix|unix-abstract|dns|ipv4|ipv6):[!-~]+")  # as gRPC names them


def check_server(server: str) -> None:
    """Raises InvalidArgumentError unless this may be a server's address."""
    match = _HOST_PORT.fullmatch(server)
    if _SCHEME.fullmatch(server) or (match and 0 < int(match["port"]) < 65536):
        return
    raise InvalidArgumentError(
        f"{server!r} is not the address of a server: write HOST:PORT, such as {DEFAULT_SERVER}"
    )


def to_error(error: grpc.RpcError, server: str) -> LorastackError:
    """Our class for a failed call; reason and metadata are the server's where it sent them."""
    call = cast(grpc.Call, error)
    code, details = call.code(), call.details() or ""
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(call)
    for detail in status.details if status is not None else ():
        _ = detail.Unpack(info) or detail.Unpack(retry)
    if code is grpc.StatusCode.UNAVAILABLE and not info.reason:
        details = (
            f"no answer from {server} ({details}); start one with `lorastack serve` or name "
            "another with --server"
        )
    ours = ERRORS.get(code, InternalError)(details or code.name)
    ours.metadata.update(info.metadata)
    if info.reason in Reason.__members__:
        ours.reason = Reason[info.reason]
    if isinstance(ours, ResourceExhaustedError) and retry.HasField("retry_delay"):
        ours.retry_after = retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9
    return ours


@contextmanager
def our_errors(server: str) -> Iterator[None]:
    """Raises our class for a call that fails in the block."""
    try:
        yield
    except grpc.RpcError as error:
        raise to_error(error, server) from None


class Patience:
    """One call's remaining retries and time."""

    def __init__(self, retries: int, timeout: float | None) -> None:
        self._retries = retries
        known = timeout is not None and timeout < LONGEST_TIMEOUT
        self._end = time.monotonic() + timeout if known and timeout is not None else None

    def left(self) -> float | None:
        """Seconds until the deadline, None without one."""
        return None if self._end is None else self._end - time.monotonic()

    def delay(self, error: ResourceExhaustedError) -> float:
        """Seconds until the next try, as the server asks (RetryInfo).

        Raises the error itself if there is no next try: none is left, the deadline comes first, or
        it is an error that does not pass by itself.
        """
        delay = 1.0 if error.retry_after is None else error.retry_after
        left = self.left()
        too_late = left is not None and delay >= left
        if error.reason not in _PASSING or self._retries == 0 or too_late:
            raise error
        self._retries -= 1
        return delay
