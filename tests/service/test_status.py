"""The table of statuses and what a status carries."""

from __future__ import annotations

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from lorastack import errors
from lorastack.errors import LorastackError, Reason
from lorastack.service.edge.status import CODES, MAX_MESSAGE_BYTES, to_status


def details_of(
    status: status_pb2.Status,
) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.RetryInfo | None]:
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    if len(status.details) == 1:
        return info, None
    retry = error_details_pb2.RetryInfo()
    assert status.details[1].Unpack(retry)
    return info, retry


def test_every_error_class_has_its_own_code() -> None:
    classes = set(LorastackError.__subclasses__())
    assert set(CODES) == classes
    assert len(set(CODES.values())) == len(classes)


@pytest.mark.parametrize("kind", CODES)
def test_a_status_carries_reason_and_request_id(kind: type[LorastackError]) -> None:
    status = to_status(kind("what and what to do", field="x"), "id-1")
    assert status.code == CODES[kind].value[0]
    assert status.message == "what and what to do"
    info, retry = details_of(status)
    assert (info.domain, info.reason) == ("lorastack", kind.default_reason.value)
    assert dict(info.metadata) == {"field": "x", "request_id": "id-1"}
    assert (retry is not None) == (kind is errors.ResourceExhaustedError)


def test_a_reason_and_a_delay_of_its_own() -> None:
    error = errors.ResourceExhaustedError(
        "full", reason=Reason.DEVICE_MEMORY_PINNED, retry_after=2.5
    )
    info, retry = details_of(to_status(error, "x"))
    assert info.reason == "DEVICE_MEMORY_PINNED"
    assert retry is not None
    assert (retry.retry_delay.seconds, retry.retry_delay.nanos) == (2, 500_000_000)


def test_long_texts_fit_into_trailers() -> None:
    error = errors.InvalidArgumentError("é" * 100_000, field="ü" * 100_000)
    status = to_status(error, "x")
    assert len(status.message.encode()) <= MAX_MESSAGE_BYTES
    assert status.message.endswith("...")
    assert status.message.startswith("éé")
    # Percent-encoding triples the message, base64 adds a third to the details.
    assert 3 * len(status.message.encode()) + 4 * status.ByteSize() // 3 < 8192


def test_a_subclass_has_the_code_of_its_class() -> None:
    class Narrower(errors.NotFoundError):
        pass

    assert to_status(Narrower("x"), "").code == grpc.StatusCode.NOT_FOUND.value[0]
