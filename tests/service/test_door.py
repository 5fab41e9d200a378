"""What comes in through the door: odd calls, too many, silent ones, callers who leave."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import weakref
from collections import Counter
from contextlib import suppress
from typing import Any

import grpc
import pytest
from grpc._cython import cygrpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from lorastack.client import Client
from lorastack.errors import InvalidArgumentError, Reason, ResourceExhaustedError
from lorastack.service.edge import door, grpc_server
from lorastack.service.edge.door import Door
from lorastack.service.edge.grpc_server import raise_file_limit
from lorastack.service.edge.status import CallGuard
from lorastack.service.edge.wire import RequestReader
from lorastack.v1 import adapters_pb2, adapters_pb2_grpc, generation_pb2_grpc
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.http2 import RawConnection, enveloped
from tests.helpers.live import wait_until
from tests.service.fakes import PATIENCE, RunningServer
from tests.service.test_metrics import samples

GENERATE = "/lorastack.v1.GenerationService/Generate"
STATUS = b"grpc-status"


def ask(num_new: int = 4, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hello", stop=pb.StopParams(max_new_tokens=num_new), **fields)


def ended(fake: RunningServer, rpc: str, code: str) -> float:
    return samples(fake.server.metrics).get(("lorastack_requests_total", code, rpc), 0.0)


def wait_for_end(fake: RunningServer, rpc: str, code: str, count: int = 1) -> None:
    wait_until(lambda: ended(fake, rpc, code) >= count, f"{rpc} ends {code}")


@pytest.mark.parametrize("path", [b"/\xff\xfe", b"/x/\xe9", b"/", b"", b"/a.B/C", b"//"])
def test_a_path_that_is_none_disturbs_nobody(
    fake: RunningServer, client: Client, path: bytes
) -> None:
    fake.engine.hold(2)
    running = client.stream(ask())
    next(running)
    for _ in range(3):
        with RawConnection(fake.address) as raw:
            raw.call(path, enveloped(b""))
            if path.startswith(b"/"):
                raw.read_until(STATUS)
    fake.engine.go_on()
    assert list(running)[-1].final.usage.generated_tokens == 4
    assert client.generate(ask()).usage.generated_tokens == 4


@pytest.mark.parametrize("body", [b"\xff", b"\x0a\x05a", b"\x0a\x01\xff", b"\x0b" * 2000])
def test_bytes_that_are_no_message_are_refused_and_counted(
    fake: RunningServer, client: Client, body: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with grpc.insecure_channel(fake.address) as channel, caplog.at_level(logging.INFO):
        call = channel.unary_unary(GENERATE, None, None)
        with pytest.raises(grpc.RpcError) as refused:
            call(body)
        health = channel.unary_unary("/grpc.health.v1.Health/Check", None, None)
        with pytest.raises(grpc.RpcError) as other:
            health(body)
    assert refused.value.code() is other.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ended(fake, "Generate", "INVALID_ARGUMENT") == 1
    assert ended(fake, "Check", "INVALID_ARGUMENT") == 1
    lines = [record for record in caplog.records if "INVALID_ARGUMENT" in record.getMessage()]
    assert [record.levelname for record in lines] == ["INFO", "INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_call_without_a_message_is_refused(fake: RunningServer) -> None:
    with RawConnection(fake.address) as raw:
        raw.call(GENERATE)
        assert b"without a message" in raw.read_until(STATUS + b"-details")
    wait_for_end(fake, "Generate", "INVALID_ARGUMENT")


def test_a_call_that_says_nothing_ends(
    fake: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "SILENCE", 0.01)
    for path in (GENERATE, "/lorastack.v1.AdapterService/UploadAdapter"):
        with RawConnection(fake.address) as raw:
            raw.call(path, end=False)
            raw.read_until(b"no message came")
    wait_for_end(fake, "UploadAdapter", "DEADLINE_EXCEEDED")


def test_zipped_messages_are_served_and_other_codings_refused(fake: RunningServer) -> None:
    with grpc.insecure_channel(fake.address, compression=grpc.Compression.Gzip) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        reply = stub.Tokenize(pb.TokenizeRequest(prompt="abc " * 200))
        assert len(reply.token_ids) >= 200
    with grpc.insecure_channel(fake.address, compression=grpc.Compression.Deflate) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refused:
            stub.Tokenize(pb.TokenizeRequest(prompt="abc " * 200))
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_calls_beyond_the_bound_are_refused_and_health_still_answers(
    fake: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake.server._door, "_max_calls", 2)
    fake.engine.hold(1)
    running = [client.stream(ask()) for _ in range(2)]
    for stream in running:
        next(stream)
    with pytest.raises(ResourceExhaustedError) as refused:
        client.get_adapter("x")
    assert refused.value.reason is Reason.TOO_MANY_CALLS
    with grpc.insecure_channel(fake.address) as channel:
        reply = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    fake.engine.go_on()
    for stream in running:
        list(stream)
    assert client.generate(ask()).usage.generated_tokens == 4


def test_replies_that_nobody_reads_are_calls(
    fake: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they hold is bounded, and health still answers."""
    monkeypatch.setattr(fake.server._door, "_max_calls", 2)
    with RawConnection(fake.address, window=0) as unread:
        for _ in range(2):
            unread.call("/lorastack.v1.GenerationService/GetModelInfo", enveloped(b""))
        for _ in range(2):
            unread.call("/grpc.health.v1.Health/Check", enveloped(b""))
        wait_for_end(fake, "GetModelInfo", "OK", 2)
        with pytest.raises(ResourceExhaustedError):
            client.get_adapter("x")
        with grpc.insecure_channel(fake.address) as channel:
            health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    wait_until(lambda: not fake.server._door._num_calls.total(), "the calls are over")
    assert client.model_info().base_model


def test_an_upload_whose_caller_leaves_is_cancelled(
    fake: RunningServer, caplog: pytest.LogCaptureFixture
) -> None:
    """Not cut short: to grpc's readers both look alike."""
    sent = threading.Event()

    def messages() -> Any:
        files = [adapters_pb2.FileSpec(name="a", size=9, sha256="a" * 64)]
        header = adapters_pb2.UploadHeader(id="x", files=files)
        yield adapters_pb2.UploadAdapterRequest(header=header)
        sent.set()
        threading.Event().wait(PATIENCE)

    with grpc.insecure_channel(fake.address) as channel:
        call = adapters_pb2_grpc.AdapterServiceStub(channel).UploadAdapter.future(messages())
        assert sent.wait(PATIENCE)
        call.cancel()
        wait_for_end(fake, "UploadAdapter", "CANCELLED")
    assert ended(fake, "UploadAdapter", "ABORTED") == 0
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class Gone:
    """The context of a call whose caller has left: nothing can be sent."""

    def peer(self) -> str:
        return "ipv4:1.2.3.4:5"

    async def read(self) -> object:
        return grpc.aio.EOF  # type: ignore[attr-defined]

    async def write(self, message: object) -> None:
        raise cygrpc.ExecuteBatchError("Failed")

    async def send_initial_metadata(self, metadata: object) -> None:
        raise cygrpc.ExecuteBatchError("Failed")

    async def abort(self, *status: object) -> None:
        raise cygrpc.ExecuteBatchError("Failed")


class Box:
    """A message that may be watched."""

    def __init__(self, message: Any) -> None:
        self._message = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


@pytest.mark.parametrize("request_id", ["has spaces", ""], ids=["refused", "served"])
def test_nothing_of_a_request_stays(
    fake: RunningServer, client: Client, monkeypatch: pytest.MonkeyPatch, request_id: str
) -> None:
    """Not even until the collector comes by: it may be megabytes."""
    seen: list[weakref.ref[Any]] = []
    read = RequestReader.read

    def watch(self: RequestReader, raw: bytes) -> Any:
        box = Box(read(self, raw))
        seen.append(weakref.ref(box))
        return box

    monkeypatch.setattr(RequestReader, "read", watch)
    gc.disable()
    try:
        for _ in range(3):
            with suppress(InvalidArgumentError):
                client.generate(ask(request_id=request_id))
        wait_until(lambda: not any(each() for each in seen), "all requests are gone")
    finally:
        gc.enable()
    assert len(seen) == 3


def make_door(readers: Any) -> Door:
    return Door(CallGuard(lambda rpc, code: None), readers, own="/", max_calls=1)


@pytest.mark.parametrize("doing", ["write", "send_initial_metadata"])
def test_whoever_leaves_while_a_message_is_written_is_cancelled(
    doing: str, caplog: pytest.LogCaptureFixture
) -> None:
    codes: list[grpc.StatusCode] = []
    guard, context = CallGuard(lambda rpc, code: codes.append(code)), Gone()

    async def serve() -> None:
        async with guard("GenerateStream", context, "id"):  # type: ignore[arg-type]
            await getattr(context, doing)(())

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(serve())
    assert codes == [grpc.StatusCode.CANCELLED]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("error", [InvalidArgumentError("bad"), RuntimeError("a bug")])
def test_a_refusal_that_nobody_waits_for_is_no_failure(error: Exception) -> None:
    codes: list[grpc.StatusCode] = []
    guard = CallGuard(lambda rpc, code: codes.append(code))

    async def serve() -> None:
        async with guard("Generate", Gone(), "id"):  # type: ignore[arg-type]
            raise error

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(serve())
    assert len(codes) == 1


def test_a_stream_that_ends_with_its_call_is_cancelled() -> None:
    async def serve() -> None:
        messages = make_door({"/x": None})._messages("/x", Gone())  # type: ignore[arg-type]
        with pytest.raises(asyncio.CancelledError):
            await anext(messages, None)

    asyncio.run(serve())


def test_the_loop_turns_between_two_messages() -> None:
    """However many have arrived, what streams wait for passes between them."""
    turns: Counter[int] = Counter()
    now = 0

    class Reader:
        def read(self, raw: bytes) -> bytes:
            turns[now] += 1
            return raw

    class Waiting(Gone):
        async def read(self) -> bytes:
            return b"a message"

    async def serve() -> None:
        loop = asyncio.get_running_loop()

        def tick() -> None:
            nonlocal now
            now += 1
            loop.call_soon(tick)

        tick()
        shared = make_door({"/x": Reader()})
        streams = [shared._messages("/x", Waiting()) for _ in range(20)]  # type: ignore[arg-type]
        await asyncio.gather(*(anext(stream) for stream in streams))

    asyncio.run(serve())
    assert turns.total() == 20
    assert max(turns.values()) <= 2  # the end of one turn and the beginning of the next


def test_the_soft_limit_of_files_becomes_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = (100, 5000)
    monkeypatch.setattr(grpc_server.resource, "getrlimit", lambda kind: limits)
    asked: list[object] = []
    monkeypatch.setattr(grpc_server.resource, "setrlimit", lambda kind, want: asked.append(want))
    assert raise_file_limit() == 5000
    assert asked == [(5000, 5000)]


def test_connections_beyond_the_bound_are_closed_and_there_is_room_again_later(
    start_fake: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_server, "MAX_CONNECTIONS", 3)
    server = start_fake()
    held = [RawConnection(server.address) for _ in range(3)]
    for each in held:
        each.call("/x", enveloped(b""))
        each.read_until(STATUS)
    with pytest.raises((AssertionError, OSError)), RawConnection(server.address) as refused:
        refused.call("/x", enveloped(b""))
        refused.read_until(STATUS)
    for each in held:
        each._socket.close()
    with grpc.insecure_channel(server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        reply = stub.Generate(ask(), timeout=PATIENCE, wait_for_ready=True)
    assert reply.usage.generated_tokens == 4
