"""Requests are read from bytes without building what is too long, and no bytes break the reader."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.errors import InvalidArgumentError, Reason
from lorastack.service.edge import wire
from lorastack.service.edge.limits import Lengths
from lorastack.service.edge.wire import RequestReader, request_readers
from lorastack.service.services import FILES
from lorastack.v1 import adapters_pb2, generation_pb2

LENGTHS = Lengths(max_context=2048, max_files=64)
REQUESTS = {
    method.input_type.name: method.input_type
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def reader(descriptor: Descriptor) -> RequestReader:
    return RequestReader(descriptor, LENGTHS)


def lists(
    descriptor: Descriptor, wrap: Callable[[bytes], bytes] = lambda raw: raw, path: str = ""
) -> Iterator[tuple[str, Callable[[int], bytes]]]:
    """(path, n -> bytes of a request whose list there has n empty entries), for every list."""
    for each in descriptor.fields:
        name, number = f"{path}{each.name}", each.number
        if each.is_repeated:
            packed = each.cpp_type == FieldDescriptor.CPPTYPE_UINT32
            yield (
                name,
                lambda n, number=number, packed=packed: wrap(
                    field(number, b"\1" * n) if packed else field(number, b"") * n
                ),
            )
        if each.message_type is not None:
            inner = lambda raw, number=number: wrap(field(number, raw))  # noqa: E731
            yield from lists(each.message_type, inner, f"{name}.")


LISTS = [
    (name, path, make) for name, descriptor in REQUESTS.items() for path, make in lists(descriptor)
]


def test_every_method_has_a_reader_and_every_list_a_length() -> None:
    methods = request_readers(FILES, LENGTHS)
    assert "/lorastack.v1.GenerationService/Generate" in methods
    assert "/grpc.health.v1.Health/Check" in methods
    assert {path for _, path, _ in LISTS} >= {"loras", "chat.messages", "files", "header.files"}


@pytest.mark.parametrize(("name", "path", "make"), LISTS, ids=[f"{n}-{p}" for n, p, _ in LISTS])
def test_a_list_that_is_too_long_is_refused_before_it_is_built(
    name: str, path: str, make: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, after no more steps of the walk than the longest list takes."""
    longest = LENGTHS.longest(path)
    read = reader(REQUESTS[name])
    read.read(make(longest))
    steps = 0
    next_varint = wire._varint

    def count(raw: bytes, at: int, end: int) -> tuple[int, int]:
        nonlocal steps
        steps += 1
        return next_varint(raw, at, end)

    class Untouched:
        DESCRIPTOR = REQUESTS[name]

        @staticmethod
        def FromString(raw: bytes) -> Message:
            pytest.fail("it was parsed")

    monkeypatch.setattr(wire, "_varint", count)
    monkeypatch.setattr(read, "_class", Untouched)
    length = read._max_bytes - 64 if longest == LENGTHS.max_context else read._max_bytes // 2 - 64
    with pytest.raises(InvalidArgumentError) as refusal:
        read.read(make(length))
    assert refusal.value.metadata["field"] == path.removesuffix(".ids")
    assert steps <= 2 * longest + 10


@pytest.mark.parametrize(
    "record",
    [b"\x4a\x00", b"\xf8\x01\x00", b"\x0a\x00", b"\x12\x00", b"\xfa\x01\x00", b"\x52\x02\x08\x01"],
    ids=["sub-message", "unknown number", "prompt", "token_ids", "unknown bytes", "output"],
)
def test_what_stands_once_does_not_stand_a_million_times(record: bytes) -> None:
    raw = record * (1 << 20)
    with pytest.raises(InvalidArgumentError) as refusal:
        reader(generation_pb2.GenerateRequest.DESCRIPTOR).read(raw)
    assert refusal.value.reason is Reason.REQUEST_TOO_LARGE


def test_the_largest_requests_there_may_be_are_read() -> None:
    chat = generation_pb2.GenerateRequest()
    for number in range(1024):
        chat.chat.messages.add(role="user", content="x" * 600)
        chat.sampling.logit_bias[number] = 1.0
    chat.stop.stop_token_ids.extend(range(1024))
    chat.stop.stop_sequences.extend("é" * 256 for _ in range(16))
    chat.loras.extend(generation_pb2.LoraRef(lora_id="x" * 96, scale=1.0) for _ in range(16))
    chat.response_format.json_schema = "é" * 65_536
    ids = generation_pb2.GenerateRequest()
    ids.token_ids.ids.extend([1 << 20] * LENGTHS.max_context)
    files = [
        adapters_pb2.FileSpec(name=f"{n:03d}" * 85, size=1 << 60, sha256="a" * 64)
        for n in range(64)
    ]
    header = adapters_pb2.UploadHeader(id="x" * 96, files=files, if_digest="sha256:" + "a" * 64)
    chunk = adapters_pb2.UploadChunk(sha256="a" * 64, offset=1 << 60, data=b"\0" * (1 << 20))
    for message in (
        chat,
        ids,
        generation_pb2.TokenizeRequest(prompt="x" * (LENGTHS.message_bytes - 8)),
        adapters_pb2.PlanUploadRequest(id="x" * 96, files=files),
        adapters_pb2.UploadAdapterRequest(header=header),
        adapters_pb2.UploadAdapterRequest(chunk=chunk),
        adapters_pb2.PullAdapterRequest(id="x" * 96, folder="/" + "x" * 4095, token="t" * 1024),
    ):
        assert reader(message.DESCRIPTOR).read(message.SerializeToString()) == message


def test_unpacked_numbers_are_numbers() -> None:
    """Encoders may send a list of numbers one by one."""
    raw = field(2, b"".join(b"\x08" + varint(n) for n in range(300)))
    read = reader(generation_pb2.GenerateRequest.DESCRIPTOR)
    assert list(read.read(raw).token_ids.ids) == list(range(300))


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(REQUESTS)), data=st.data())
def test_any_bytes_are_a_message_or_refused(name: str, data: Any) -> None:
    """What the reader takes, protobuf takes, and the other way round unless it holds too much."""
    piece = st.one_of(
        st.binary(max_size=20),
        st.builds(field, st.integers(1, 20), st.binary(max_size=30)),
        st.builds(lambda n, v: varint(n << 3) + varint(v), st.integers(1, 20), st.integers(0)),
    )
    raw = b"".join(data.draw(st.lists(piece, max_size=12)))
    raw += data.draw(st.sampled_from([b"", field(99, b"\0" * 600)]))  # short ones are not walked
    read, kind = reader(REQUESTS[name]), GetMessageClass(REQUESTS[name])
    try:
        expected = kind.FromString(raw)
    except DecodeError:
        with pytest.raises(InvalidArgumentError):
            read.read(raw)
        return
    try:
        assert read.read(raw) == expected
    except InvalidArgumentError as refusal:
        assert refusal.message


def test_zipped_requests_are_read_and_cost_no_more_than_they_may() -> None:
    read = reader(adapters_pb2.PlanUploadRequest.DESCRIPTOR)
    message = adapters_pb2.PlanUploadRequest(id="x", files=[adapters_pb2.FileSpec(name="y")] * 9)
    packed = gzip.compress(message.SerializeToString())
    assert read.read(packed) == message
    for broken in (packed[:-9], packed[:4], b"\x1f\x8b"):
        with pytest.raises(InvalidArgumentError):
            read.read(broken)
    bomb = gzip.compress(b"\0" * (16 << 20))
    with pytest.raises(InvalidArgumentError) as refusal:
        read.read(bomb)
    assert refusal.value.reason is Reason.REQUEST_TOO_LARGE
