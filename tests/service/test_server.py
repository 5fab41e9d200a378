"""Start, health, reflection, drain, and the exit code."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_status import rpc_status

from lorastack.client import Client
from lorastack.errors import InvalidArgumentError, NotFoundError, UnavailableError
from lorastack.layout import ModelShapes
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1 import generation_pb2_grpc
from tests.helpers.http2 import RawConnection, enveloped
from tests.service.conftest import StartFake
from tests.service.fakes import PATIENCE, FakeServer, RunningServer

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def ask(num_new: int = 4, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt="hello", stop=pb.StopParams(max_new_tokens=num_new), **fields)


@pytest.fixture
def whole(tmp_path: Path, tokenizer: Tokenizer, shapes: ModelShapes) -> FakeServer:
    """For Server.run, which has a loop of its own."""
    return FakeServer(tmp_path / "store", tokenizer, shapes)


def test_health_names_every_service(fake: RunningServer) -> None:
    with grpc.insecure_channel(fake.address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", "lorastack.v1.GenerationService", "lorastack.v1.AdapterService"):
            assert stub.Check(health_pb2.HealthCheckRequest(service=name)).status == SERVING


def test_reflection_lists_the_services(fake: RunningServer) -> None:
    with grpc.insecure_channel(fake.address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        (reply,) = stub.ServerReflectionInfo(iter([request]))
    names = {service.name for service in reply.list_services_response.service}
    assert {"lorastack.v1.GenerationService", "lorastack.v1.AdapterService"} <= names
    assert "grpc.health.v1.Health" in names


def test_serving_means_that_a_token_came_out(whole: FakeServer) -> None:
    seen: list[int] = []

    def on_ready(line: str) -> None:
        seen.append(len(whole.engine.submitted))
        os.kill(os.getpid(), signal.SIGTERM)

    assert whole.server.run(on_ready) == 0
    assert seen == [1]


def test_unknown_default_heads_end_the_start(start_fake: StartFake) -> None:
    with pytest.raises(NotFoundError, match="nobody"):
        start_fake(default_medusa="nobody")


def test_a_taken_port_is_refused(fake: RunningServer, whole: FakeServer) -> None:
    whole.server._ports._address = fake.address
    with pytest.raises(InvalidArgumentError, match=fake.address):
        whole.server.run(lambda line: pytest.fail(line))


def test_the_ready_line(whole: FakeServer) -> None:
    lines: list[str] = []

    def on_ready(line: str) -> None:
        lines.append(line)
        os.kill(os.getpid(), signal.SIGINT)

    whole.server.run(on_ready)
    (line,) = lines
    for word in (whole.server.address, "tests/tiny", "backend fake", "cpu", "float32"):
        assert word in line


def in_background(server: FakeServer, work: Callable[[], None]) -> int:
    """Runs the server here and `work` beside it; work's errors are raised."""
    with ThreadPoolExecutor(1) as pool:
        futures = []
        code = server.server.run(lambda line: futures.append(pool.submit(work)))
        futures[0].result(PATIENCE)
    return code


def test_sigterm_lets_running_rows_finish_and_refuses_new_calls(whole: FakeServer) -> None:
    engine = whole.engine

    def work() -> None:
        with Client(whole.server.address) as client:
            engine.hold(2)
            stream = client.stream(ask(request_id="running"))
            next(stream)
            with grpc.insecure_channel(whole.server.address) as channel:
                health = health_pb2_grpc.HealthStub(channel)
                watch = health.Watch(health_pb2.HealthCheckRequest())
                assert next(watch).status == SERVING
                os.kill(os.getpid(), signal.SIGTERM)
                assert next(watch).status == NOT_SERVING
                for number in (signal.SIGTERM, signal.SIGINT):  # a second one ends at once
                    assert signal.getsignal(number) is signal.SIG_DFL
                generation = generation_pb2_grpc.GenerationServiceStub(channel)
                with pytest.raises(grpc.RpcError) as refused:
                    generation.Generate(ask())
            status = rpc_status.from_call(refused.value)
            info = error_details_pb2.ErrorInfo()
            assert status.details[0].Unpack(info)
            assert (info.reason, bool(info.metadata["request_id"])) == ("DRAINING", True)
            with pytest.raises(UnavailableError):
                client.list_adapters()
            engine.go_on()
            assert list(stream)[-1].final.usage.generated_tokens == 4

    assert in_background(whole, work) == 0


def test_what_outlives_the_drain_is_unavailable(whole: FakeServer) -> None:
    whole.server._config = type(whole.server._config)(port=0, drain_timeout=0.0)

    def work() -> None:
        whole.engine.hold(2)
        with Client(whole.server.address) as client:
            stream = client.stream(ask())
            next(stream)
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(UnavailableError):
                list(stream)

    assert in_background(whole, work) == 0


def test_a_dead_engine_ends_the_process_with_an_error(whole: FakeServer) -> None:
    def work() -> None:
        whole.engine.hold(2)
        with Client(whole.server.address) as client:
            stream = client.stream(ask())
            next(stream)
            whole.engine.die()
            with pytest.raises(UnavailableError):
                list(stream)

    assert in_background(whole, work) == 1


def test_no_thread_is_left(whole: FakeServer) -> None:
    before = set(threading.enumerate())
    whole.server.run(lambda line: os.kill(os.getpid(), signal.SIGTERM))
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if thread.name.startswith(("lorastack", "fake"))]


def test_the_end_waits_for_nothing_that_waits_for_it(
    whole: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store's thread may have a template to check when the server ends."""
    server, began = whole.server, threading.Event()
    shutdown, refused = server._workers.shutdown, []

    def check_late() -> None:
        began.set()
        while not server._uploader._shutdown:
            time.sleep(0.001)
        try:
            server._untrusted.check_template("{{ messages }}")
        except UnavailableError as error:
            refused.append(error)

    def begin_late(**how: bool) -> None:
        server._uploader.submit(check_late)
        assert began.wait(PATIENCE)
        shutdown(**how)

    monkeypatch.setattr(server._workers, "shutdown", begin_late)
    assert server.run(lambda line: os.kill(os.getpid(), signal.SIGTERM)) == 0
    assert len(refused) == 1


def test_a_watcher_that_does_not_read_holds_up_nobody(fake: RunningServer) -> None:
    with RawConnection(fake.address, window=0) as silent, grpc.insecure_channel(fake.address) as ch:
        silent.call("/grpc.health.v1.Health/Watch", enveloped(b""))
        stub = health_pb2_grpc.HealthStub(ch)
        watch = stub.Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        listed = stub.List(health_pb2.HealthListRequest()).statuses
        assert {status.status for status in listed.values()} == {SERVING}
        with pytest.raises(grpc.RpcError) as unknown:
            stub.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert unknown.value.code() is grpc.StatusCode.NOT_FOUND
        fake.stop()
        assert next(watch).status == NOT_SERVING
