"""Errors as LoRAX and TGI tell them: {"error", "error_type"} and a status."""

from __future__ import annotations

import json

from lorastack.errors import (
    DataLossError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
    UnimplementedError,
)
from lorastack.gateway.exchange import event
from lorastack.gateway.statuses import http_status

# The four types that their clients know, and words of ours, for which the status decides there.
_TYPES: dict[type[LorastackError], str] = {
    InvalidArgumentError: "validation",
    FailedPreconditionError: "validation",
    ResourceExhaustedError: "overloaded",
    DataLossError: "generation",
    NotFoundError: "not_found",
    PermissionDeniedError: "permission_denied",
    UnavailableError: "unavailable",
    UnimplementedError: "not_implemented",
}
_STATUSES = {"validation": 422, "overloaded": 429, "generation": 424}


def status_of(error: LorastackError) -> int:
    """422, 429 and 424 for the types that have one, else as everywhere."""
    return _STATUSES.get(error_type(error)) or http_status(error)


def error_type(error: LorastackError) -> str:
    """What their clients choose the exception by."""
    failed = isinstance(error, InternalError) and error.reason is not Reason.INTERNAL
    if failed or error.reason is Reason.HUB_FAILED:
        return "generation"
    return _TYPES.get(type(error), "error")


def refuse(error: LorastackError, status: int) -> dict[str, str]:
    """The body of a refusal."""
    return {"error": error.message, "error_type": error_type(error)}


def failed(error: LorastackError) -> bytes:
    """The last event of a stream that broke off."""
    kind = error_type(error)
    if kind not in ("generation", "overloaded", "validation"):
        kind = "incomplete_generation"
    return event(json.dumps({"error": error.message, "error_type": kind}))
