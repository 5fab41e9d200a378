"""Everything that can go wrong for a user, one class a gRPC status.

A message says what is wrong and what to do. `codes` maps classes to status codes; `reason` travels
in google.rpc.ErrorInfo and stays stable across releases.
"""

from __future__ import annotations

from enum import StrEnum

# What torch and Triton say of a CUDA device's errors; which of these only lack memory.
_DEVICE_ERRORS = ("CUDA error:", "CUDA driver error:", "Triton Error [CUDA]:")
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


class Reason(StrEnum):
    """Stable machine-readable causes (google.rpc.ErrorInfo.reason)."""

    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    INVALID_REQUEST = "INVALID_REQUEST"
    INVALID_GRAMMAR = "INVALID_GRAMMAR"
    INVALID_ADAPTER = "INVALID_ADAPTER"
    UNSUPPORTED_ADAPTER = "UNSUPPORTED_ADAPTER"
    WRONG_ADAPTER_KIND = "WRONG_ADAPTER_KIND"
    UNSUPPORTED_MODEL = "UNSUPPORTED_MODEL"
    INVALID_MODEL = "INVALID_MODEL"
    ADAPTER_EXISTS = "ADAPTER_EXISTS"
    DIGEST_MISMATCH = "DIGEST_MISMATCH"
    UPLOAD_TAKEN_OVER = "UPLOAD_TAKEN_OVER"
    UPLOAD_INCOMPLETE = "UPLOAD_INCOMPLETE"
    STAGING_FULL = "STAGING_FULL"
    TOO_MANY_TRANSFERS = "TOO_MANY_TRANSFERS"
    TRANSFER_IDLE = "TRANSFER_IDLE"
    BASE_MODEL_DIFFERS = "BASE_MODEL_DIFFERS"
    ADAPTER_TOO_LARGE = "ADAPTER_TOO_LARGE"
    REQUEST_TOO_LARGE = "REQUEST_TOO_LARGE"
    QUEUE_FULL = "QUEUE_FULL"
    TOO_MANY_CALLS = "TOO_MANY_CALLS"
    READER_TOO_SLOW = "READER_TOO_SLOW"
    DEVICE_MEMORY_PINNED = "DEVICE_MEMORY_PINNED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    DRAINING = "DRAINING"
    NOT_IMPLEMENTED = "NOT_IMPLEMENTED"
    CORRUPT_DATA = "CORRUPT_DATA"
    NON_FINITE_LOGITS = "NON_FINITE_LOGITS"
    ADAPTER_IN_USE = "ADAPTER_IN_USE"
    SHARED_HEADS_MISSING = "SHARED_HEADS_MISSING"
    STORE_FULL = "STORE_FULL"
    STORE_IN_USE = "STORE_IN_USE"
    STORE_FORMAT = "STORE_FORMAT"
    STORE_READ_ONLY = "STORE_READ_ONLY"
    PULL_NOT_ALLOWED = "PULL_NOT_ALLOWED"
    HUB_FAILED = "HUB_FAILED"
    DEFAULT_IS_FIXED = "DEFAULT_IS_FIXED"
    STEP_FAILED = "STEP_FAILED"
    GRAMMAR_FAILED = "GRAMMAR_FAILED"
    WORKER_ENDED = "WORKER_ENDED"
    INTERNAL = "INTERNAL"


class LorastackError(Exception):
    """Base of all errors shown to users.

    reason: stable cause; metadata: strings for ErrorInfo (ids, limits).
    """

    default_reason = Reason.INTERNAL

    def __init__(self, message: str, *, reason: Reason | None = None, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.metadata = metadata


class NotFoundError(LorastackError):
    """NOT_FOUND: an unknown id."""

    default_reason = Reason.ADAPTER_NOT_FOUND


class InvalidArgumentError(LorastackError):
    """INVALID_ARGUMENT: a bad parameter, or a malformed or incompatible adapter."""

    default_reason = Reason.INVALID_REQUEST


class AlreadyExistsError(LorastackError):
    """ALREADY_EXISTS: the id of an upload that had to be new is taken."""

    default_reason = Reason.ADAPTER_EXISTS


class AbortedError(LorastackError):
    """ABORTED: an upload's `if_digest` no longer holds, another upload took over its bytes, it
    lacks bytes that the store needs, or a transfer's caller was idle for too long."""

    default_reason = Reason.DIGEST_MISMATCH


class FailedPreconditionError(LorastackError):
    """FAILED_PRECONDITION: the state of the server forbids it."""

    default_reason = Reason.BASE_MODEL_DIFFERS


class ResourceExhaustedError(LorastackError):
    """RESOURCE_EXHAUSTED: try again in about `retry_after` seconds; None: not known."""

    default_reason = Reason.QUEUE_FULL

    def __init__(
        self,
        message: str,
        *,
        reason: Reason | None = None,
        retry_after: float | None = None,
        **metadata: str,
    ) -> None:
        super().__init__(message, reason=reason, **metadata)
        self.retry_after = retry_after


class DeadlineExceededError(LorastackError):
    """DEADLINE_EXCEEDED: the caller's deadline passed, or no message came."""

    default_reason = Reason.DEADLINE_EXCEEDED


class RequestCancelledError(LorastackError):
    """CANCELLED: the caller gave up."""

    default_reason = Reason.CANCELLED


class PermissionDeniedError(LorastackError):
    """PERMISSION_DENIED: the server's configuration does not allow it."""

    default_reason = Reason.PULL_NOT_ALLOWED


class UnavailableError(LorastackError):
    """UNAVAILABLE: the server drains, or the hub or a worker process failed."""

    default_reason = Reason.DRAINING


class UnimplementedError(LorastackError):
    """UNIMPLEMENTED: a field or call that this version does not have."""

    default_reason = Reason.NOT_IMPLEMENTED


class DataLossError(LorastackError):
    """DATA_LOSS: stored bytes fail their digest."""

    default_reason = Reason.CORRUPT_DATA


class InternalError(LorastackError):
    """INTERNAL: our bug."""


class DeviceLostError(InternalError):
    """INTERNAL: what computes the model is gone; the server ends."""


def breaks_device(error: BaseException) -> bool:
    """True for an error after which the device computes nothing any more for this process.

    CUDA reports an error in whatever is asked of the device next, and again in everything after
    it, so it is no fault of the rows that meet it. A device whose memory is full works on.
    """
    if isinstance(error, DeviceLostError):
        return True
    text = str(error)
    if not isinstance(error, RuntimeError) or any(words in text for words in _OUT_OF_MEMORY):
        return False
    return any(words in text for words in _DEVICE_ERRORS)
