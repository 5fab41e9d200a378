"""The HTTP status of each error class."""

from __future__ import annotations

import math

from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)

STATUSES: dict[type[LorastackError], int] = {
    NotFoundError: 404,
    InvalidArgumentError: 400,
    AlreadyExistsError: 409,
    AbortedError: 409,
    FailedPreconditionError: 409,
    ResourceExhaustedError: 429,
    DeadlineExceededError: 504,
    PermissionDeniedError: 403,
    RequestCancelledError: 499,
    UnavailableError: 503,
    UnimplementedError: 501,
    DataLossError: 500,
    InternalError: 500,
}


def http_status(error: LorastackError) -> int:
    """As most APIs have it."""
    return STATUSES[type(error)]


def retry_after(error: LorastackError) -> int:
    """Whole seconds for the header Retry-After, at least one."""
    wait = error.retry_after if isinstance(error, ResourceExhaustedError) else None
    return max(1, math.ceil(wait or 1.0))
