"""Whatever arrives at whichever RPC, a running stream goes on and nothing is left behind.

The shapes are made from the descriptors of every service, so a new RPC or field is walked too; one
of a kind that nobody has thought about fails here.
"""

from __future__ import annotations

import asyncio
import gzip
import os
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from types import FrameType
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor, MethodDescriptor

from lorastack.engine.batch import Batch
from lorastack.engine.runner import StepResults
from lorastack.request import RowEvent
from lorastack.service.calls.intake import NUM_LONG, NUM_SHORT
from lorastack.service.services import FILES
from lorastack.v1 import adapters_pb2, generation_pb2
from tests.helpers.http2 import RawConnection, enveloped
from tests.helpers.live import PATIENCE, LiveServer, ask, wait_until

MAX_GAP = 10  # steps of the engine
STEP_SECONDS = 0.1  # at least: ten of them are not what a busy machine takes from a thread
MAX_WORK = 100_000  # function calls in one turn of the event loop
TURN = asyncio.Handle._run.__code__
# Threads that a server's pools may grow to: its own, the store's, two for pulls, asyncio's default.
POOLED = NUM_LONG + NUM_SHORT + 1 + 2 + 32
AT_A_TIME = 4
TEXT = 256 << 10
METHODS = [
    method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
]
# What a field's hostile values are set beside, so that they get past the first check.
_SPEC = adapters_pb2.FileSpec(name="a.json", size=9, sha256="a" * 64)
VALID = {
    "GenerateRequest": ask("x", max_new_tokens=1),
    "TokenizeRequest": generation_pb2.TokenizeRequest(prompt="x"),
    "PlanUploadRequest": adapters_pb2.PlanUploadRequest(id="x", files=[_SPEC]),
    "UploadAdapterRequest": adapters_pb2.UploadAdapterRequest(
        header=adapters_pb2.UploadHeader(id="x", files=[_SPEC])
    ),
    "PullAdapterRequest": adapters_pb2.PullAdapterRequest(id="x", hub_id="nobody/nothing"),
}
FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.UNAVAILABLE}
ENDLESS = {"Watch", "ServerReflectionInfo"}  # what they take is answered until the caller leaves


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


TEXTS = (b"\0\n\x1b[2J\xe2\x80\xa8", b"\xed\xa0\x80", b"\xff", b"../" * 99, b" " * TEXT)
INTEGERS = (0, 1, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1)
FLOATS = (0x7FC00000, 0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00000001, 0x80000000, 0xBF800000)


def hostile_values(each: FieldDescriptor) -> Iterator[bytes]:
    """Odd values of one field, encoded with its number. Raises for a kind it does not know."""
    number = each.number
    match each.cpp_type:
        case FieldDescriptor.CPPTYPE_STRING:
            yield from (field(number, text) for text in TEXTS)
        case FieldDescriptor.CPPTYPE_UINT32 | FieldDescriptor.CPPTYPE_UINT64:
            yield from (varint(number << 3) + varint(value) for value in INTEGERS)
        case FieldDescriptor.CPPTYPE_INT32:
            yield from (varint(number << 3) + varint(value) for value in INTEGERS)
        case FieldDescriptor.CPPTYPE_ENUM | FieldDescriptor.CPPTYPE_BOOL:
            yield from (varint(number << 3) + varint(value) for value in (2, 99, 1 << 40))
        case FieldDescriptor.CPPTYPE_FLOAT:
            tag = varint(number << 3 | 5)
            yield from (tag + struct.pack("<I", bits) for bits in FLOATS)
        case FieldDescriptor.CPPTYPE_MESSAGE:
            yield field(number, b"")
            yield field(number, b"\xff")
        case other:
            raise NotImplementedError(f"{each.full_name}: no hostile values of type {other}")


def hostile_fields(descriptor: Descriptor, room: int) -> Iterator[bytes]:
    """Hostile values of every field of a message, at any depth; room: bytes for a list."""
    for each in descriptor.fields:
        yield from hostile_values(each)
        if each.is_repeated:
            yield field(each.number, b"") * (room // 2)
            yield field(each.number, b"\1" * room)
        if each.message_type is not None:
            for inner in hostile_fields(each.message_type, room - 10):
                yield field(each.number, inner)


def hostile_messages(method: MethodDescriptor, room: int) -> Iterator[bytes]:
    """Bytes that may come as this method's request."""
    name = method.input_type.name
    valid = VALID[name].SerializeToString() if name in VALID else b""
    yield from (b"", valid, valid[:-1], b"\xff" * 99, b"\x0b" * 2000, b"\0" * room)
    yield varint(999 << 3) + b"\0" + valid
    yield (varint(999 << 3) + b"\0") * (room // 3)
    yield field(999, b"\0" * 9000) + valid
    for shape in hostile_fields(method.input_type, room):
        yield valid + shape
    for group in method.input_type.oneofs:  # the last one set wins
        both = b"".join(next(iter(hostile_values(each))) for each in group.fields)
        yield both + both


class Canary:
    """A stream that runs all the while: how many steps passed before it had what a step gave it.

    Work that holds the interpreter's lock stops the steps too, so no gap shows it. It is counted.
    """

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gaps: list[int] = []
        engine, dispatcher = server.engine, server.server._dispatcher
        self._engine = engine
        self._given: list[int] = []  # steps that gave it something
        self._num_routed = 0
        self.most_work = 0  # function calls in one turn of the loop
        self._work = 0  # the same in the turn that runs
        self._loop = server.loop
        steps = engine._loop
        deliver, route, run = steps._on_events, dispatcher._route, engine._runner.run

        def run_slowly(batch: Batch, **options: Any) -> StepResults:
            time.sleep(STEP_SECONDS)
            return run(batch, **options)

        def record(events: list[RowEvent]) -> None:
            self._given += [engine.num_steps for each in events if each.request_id == "canary"]
            deliver(events)

        def record_routed(events: list[RowEvent]) -> None:
            route(events)
            for each in events:
                if each.request_id == "canary":
                    self.gaps.append(engine.num_steps - self._given[self._num_routed])
                    self._num_routed += 1

        def count(frame: FrameType, event: str, argument: object) -> None:
            if frame.f_code is TURN:
                self._work = 0
            self._work += event in ("call", "c_call")
            self.most_work = max(self.most_work, self._work)

        self._loop.call_soon_threadsafe(sys.setprofile, count)
        monkeypatch.setattr(engine._runner, "run", run_slowly)
        monkeypatch.setattr(steps, "_on_events", record)
        monkeypatch.setattr(dispatcher, "_route", record_routed)
        request = ask("canary", ignore_eos=True, max_new_tokens=15_000, off=True)
        request.request_id = "canary"
        self._stream = server.client.stream(request)
        next(self._stream)

    def end(self) -> None:
        self._stream.close()  # type: ignore[attr-defined]
        self._loop.call_soon_threadsafe(sys.setprofile, None)

    @property
    def longest(self) -> int:
        """In steps: without anything from the engine, or until the loop passed it on."""
        return max(*self.gaps, *(b - a for a, b in pairwise(self._given)))


@dataclass(frozen=True)
class Held:
    """What a server may not keep."""

    files: int
    threads: int


def held() -> Held:
    return Held(files=len(os.listdir("/proc/self/fd")), threads=threading.active_count())


def send(server: LiveServer, method: MethodDescriptor, messages: list[bytes]) -> grpc.StatusCode:
    """One call with these messages, whatever kind of method it is; how it ended."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    patience = 0.2 if method.name in ENDLESS else PATIENCE
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(server.server.address, options=options) as channel:
        call = channel.stream_stream(path, None, None)(iter(messages), timeout=patience)
        try:
            for _ in call:
                pass
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def walk(server: LiveServer, calls: list[Callable[[], None]]) -> None:
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        for future in [pool.submit(call) for call in calls]:
            future.result()


def shapes(server: LiveServer) -> Iterator[tuple[MethodDescriptor, list[bytes]]]:
    lengths = server.server._lengths
    for method in METHODS:
        room = lengths.request_bytes(method.input_type.name) - 64
        for message in hostile_messages(method, room):
            yield method, [message]
        yield method, []
        yield method, [b"\0" * (lengths.message_bytes + 1)]
        yield method, [gzip.compress(b"\x12\0" * (8 << 20), 1)]
        valid = VALID.get(method.input_type.name)
        if valid is not None:
            yield method, [valid.SerializeToString()] * 3


def broken_calls(server: LiveServer) -> Iterator[Callable[[], None]]:
    """Calls that are odd in how they come, or whose callers leave in the middle."""
    timeouts = ("0n", "1n", "1u", "99999999H", "3000000H", "-5S", "S", "12345678901234567890S")
    for method in METHODS:
        path = f"/{method.containing_service.full_name}/{method.name}"
        valid = VALID.get(method.input_type.name)
        raw = b"" if valid is None else valid.SerializeToString()

        def leave(path: str = path, raw: bytes = raw) -> None:
            for body in (b"", b"\0", enveloped(raw)[:-1], enveloped(b"\0" * 9)[:9], enveloped(raw)):
                with RawConnection(server.server.address) as connection:
                    connection.reset(connection.call(path, body, end=False))
            with RawConnection(server.server.address, window=0) as connection:
                connection.call(path, enveloped(raw))
            with RawConnection(server.server.address) as connection:
                connection.call(path, b"\2\xff\xff\xff\xff" + raw)
                connection.call(path, enveloped(b"no zip", compressed=True))

        def hurry(path: str = path, raw: bytes = raw) -> None:
            for timeout in timeouts:
                with RawConnection(server.server.address) as connection:
                    headers = [("grpc-timeout", timeout)]
                    connection.reset(connection.call(path, enveloped(raw), headers=headers))

        yield leave
        yield hurry
    for path in (b"/", b"", b"/\xff", b"/lorastack.v1.GenerationService/None"):

        def nowhere(path: bytes = path) -> None:
            with RawConnection(server.server.address) as connection:
                connection.call(path, enveloped(b""))

        yield nowhere


def test_no_shape_of_a_call_disturbs_a_stream_or_stays(
    start: Callable[..., LiveServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(max_rows=8)
    request = ask("before", max_new_tokens=8)
    before = server.client.generate(request)
    kept = held()
    calls = list(shapes(server))
    codes: dict[str, set[grpc.StatusCode]] = {}

    def call(method: MethodDescriptor, messages: list[bytes]) -> Callable[[], None]:
        def run() -> None:
            code = send(server, method, messages)
            codes.setdefault(method.name, set()).add(code)
            sent = [(len(message), message[:60]) for message in messages]
            assert code not in FAULTS, (method.full_name, code, sent)

        return run

    canary = Canary(server, monkeypatch)
    walk(server, [call(*each) for each in calls])
    walk(server, list(broken_calls(server)))
    canary.end()
    server.assert_idle()
    assert canary.longest <= MAX_GAP
    assert canary.most_work <= MAX_WORK
    assert set(codes) == {method.name for method in METHODS}
    assert list(server.client.generate(request).token_ids) == list(before.token_ids)
    guard, door = server.server._guard, server.server._door
    wait_until(lambda: guard._num_calls == 0, "all calls end")
    wait_until(lambda: not any(door._num_calls.values()), "the door counts nobody")
    ends = server.server._untrusted.close()  # worker processes, which hold pipes
    asyncio.run_coroutine_threadsafe(ends, server.loop).result(PATIENCE)
    wait_until(lambda: held().files <= kept.files, "all connections are closed")
    assert held().threads <= kept.threads + POOLED
