"""Uploads: all or nothing, and what a broken connection leaves for the next try."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import grpc
import pytest

from lorastack.adapters.store.staging import Staging
from lorastack.client import Client, to_error, uploading
from lorastack.errors import (
    AbortedError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.layout import ModelShapes
from lorastack.service.edge import places
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import adapters_pb2_grpc
from tests.helpers.adapters import write_lora
from tests.helpers.live import wait_until
from tests.helpers.proxy import CuttingProxy
from tests.service.conftest import StartFake
from tests.service.fakes import PATIENCE, RunningServer

Folders = dict[str, Path]


def specs_of(folder: Path) -> list[ab.FileSpec]:
    return [
        ab.FileSpec(
            name=path.name,
            size=path.stat().st_size,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in sorted(folder.iterdir())
    ]


def messages_of(folder: Path, adapter_id: str) -> list[ab.UploadAdapterRequest]:
    """An upload, each file in one chunk."""
    specs = specs_of(folder)
    header = ab.UploadHeader(id=adapter_id, files=specs)
    chunks = [
        ab.UploadChunk(sha256=spec.sha256, data=(folder / spec.name).read_bytes()) for spec in specs
    ]
    return [
        ab.UploadAdapterRequest(header=header),
        *(ab.UploadAdapterRequest(chunk=chunk) for chunk in chunks),
    ]


def staged(fake: RunningServer) -> list[Path]:
    """What unfinished uploads left, once the uploader has done all it was asked."""
    fake.server._uploader.submit(lambda: None).result()
    return list((fake.registry._root / "staging").iterdir())


@pytest.fixture
def stub(fake: RunningServer) -> Iterator[adapters_pb2_grpc.AdapterServiceStub]:
    with grpc.insecure_channel(fake.address) as channel:
        yield adapters_pb2_grpc.AdapterServiceStub(channel)


def refusal(fake: RunningServer, call: object, *arguments: object) -> LorastackError:
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments)  # type: ignore[operator]
    return to_error(caught.value, fake.address)


def test_plan_asks_for_what_is_missing(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
) -> None:
    specs = specs_of(folders["lora"])
    plan = stub.PlanUpload(ab.PlanUploadRequest(id="x", files=specs))
    assert [(blob.sha256, blob.offset) for blob in plan.needed] == [(s.sha256, 0) for s in specs]
    client.upload(folders["lora"], "x")
    assert not stub.PlanUpload(ab.PlanUploadRequest(id="y", files=specs)).needed
    for bad in (
        ab.PlanUploadRequest(id="a b", files=specs),
        ab.PlanUploadRequest(id="x"),
        ab.PlanUploadRequest(id="x", files=[ab.FileSpec(name="../x", size=1, sha256="0" * 64)]),
    ):
        assert type(refusal(fake, stub.PlanUpload, bad)) is InvalidArgumentError


def test_malformed_uploads_store_nothing(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
) -> None:
    header, *chunks = messages_of(folders["lora"], "x")
    empty = ab.UploadAdapterRequest()
    wrong = ab.UploadAdapterRequest(chunk=ab.UploadChunk(sha256="0" * 64, data=b"x"))
    huge = ab.UploadAdapterRequest(
        chunk=ab.UploadChunk(sha256=chunks[0].chunk.sha256, data=bytes((1 << 20) + 1))
    )
    flipped = ab.UploadAdapterRequest(chunk=chunks[0].chunk)
    flipped.chunk.data = bytes([flipped.chunk.data[0] ^ 1]) + flipped.chunk.data[1:]
    for messages in (
        [],
        [empty],
        chunks,
        [header, header],
        [header, wrong],
        [header, huge],
        [header, chunks[0], *chunks],
        [header, flipped, *chunks[1:]],
    ):
        error = refusal(fake, stub.UploadAdapter, iter(messages))
        assert type(error) is InvalidArgumentError, error
        assert error.metadata["request_id"]
        assert staged(fake) == []
    assert client.list_adapters() == []


@pytest.fixture
def short(folders: Folders) -> tuple[list[ab.UploadAdapterRequest], dict[str, int]]:
    """The messages of an upload up to the middle of its weights, and the bytes of each blob."""
    header, config, weights = messages_of(folders["lora"], "x")
    assert len(weights.chunk.data) > len(config.chunk.data)
    weights.chunk.data = weights.chunk.data[:1000]
    sizes = {each.chunk.sha256: len(each.chunk.data) for each in (config, weights)}
    return [header, config, weights], sizes


def planned(stub: adapters_pb2_grpc.AdapterServiceStub, folder: Path) -> dict[str, int]:
    plan = stub.PlanUpload(ab.PlanUploadRequest(id="x", files=specs_of(folder)))
    return {blob.sha256: blob.offset for blob in plan.needed}


def test_an_upload_that_ends_early_waits_for_the_rest(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
    short: tuple[list[ab.UploadAdapterRequest], dict[str, int]],
) -> None:
    messages, sizes = short
    error = refusal(fake, stub.UploadAdapter, iter(messages))
    assert type(error) is AbortedError
    assert error.reason is Reason.UPLOAD_INCOMPLETE
    assert client.list_adapters() == []
    assert len(staged(fake)) == 1
    assert planned(stub, folders["lora"]) == sizes
    progress: list[tuple[int, int]] = []
    client.upload(folders["lora"], "x", progress=lambda *done: progress.append(done))
    total = sum(path.stat().st_size for path in folders["lora"].iterdir())
    assert progress == [(total, total)]
    assert staged(fake) == []


def test_a_caller_who_goes_may_come_back(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
    short: tuple[list[ab.UploadAdapterRequest], dict[str, int]],
) -> None:
    """The caller goes in the middle of its upload, without ending its stream."""
    parts, sizes = short

    def messages() -> Iterator[ab.UploadAdapterRequest]:
        yield from parts
        called.wait(10)  # this runs on a thread that may be ahead of the line that makes `call`
        for _ in range(1000):  # every answer comes after the server has seen what came before it
            if planned(stub, folders["lora"]) == sizes:
                break
        call.cancel()

    called = threading.Event()
    call = stub.UploadAdapter.future(messages())
    called.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    assert client.list_adapters() == []
    assert planned(stub, folders["lora"]) == sizes
    assert client.upload(folders["lora"], "x").revision == 1
    assert staged(fake) == []


def test_wrong_bytes_are_not_kept(
    client: Client, folders: Folders, stub: adapters_pb2_grpc.AdapterServiceStub
) -> None:
    header, config, weights = messages_of(folders["lora"], "x")
    wrong = ab.UploadAdapterRequest(chunk=weights.chunk)
    wrong.chunk.data = b"?" + weights.chunk.data[1:]
    with pytest.raises(grpc.RpcError):
        stub.UploadAdapter(iter([header, config, wrong]))
    assert set(planned(stub, folders["lora"]).values()) == {0}


def test_the_same_upload_twice_at_once(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
    short: tuple[list[ab.UploadAdapterRequest], dict[str, int]],
) -> None:
    """The newer one takes over; what the older one still sends does not reach it."""
    parts, sizes = short
    newer_done = threading.Event()

    def messages() -> Iterator[ab.UploadAdapterRequest]:
        yield from parts
        newer_done.wait(10)
        (sha256, offset) = list(sizes.items())[1]
        yield ab.UploadAdapterRequest(
            chunk=ab.UploadChunk(sha256=sha256, offset=offset, data=b"late")
        )

    older = stub.UploadAdapter.future(messages())
    while planned(stub, folders["lora"]) != sizes:
        pass
    assert client.upload(folders["lora"], "x").revision == 1
    newer_done.set()
    error = refusal(fake, older.result)
    assert type(error) is AbortedError
    assert error.reason is Reason.UPLOAD_TAKEN_OVER
    fake.registry.verify(client.get_adapter("x").digest)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploading, "RETRY_DELAYS", (0.01,) * 100)


@pytest.mark.usefixtures("impatient")
def test_the_client_goes_on_after_broken_connections(
    fake: RunningServer, shapes: ModelShapes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "CHUNK_BYTES", 4000)
    folder = write_lora(tmp_path / "large", shapes, rank=64)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert size > 450_000
    done: list[int] = []
    cuts: list[int] = []

    def arrived() -> None:
        """The server reads what is on the wire only as long as the connection is there."""
        cuts.append(100_000 * (len(cuts) + 1))
        staging = fake.registry._root / "staging"
        wait_until(
            lambda: sum(path.stat().st_size for path in staging.glob("*/*")) > cuts[-1], "bytes"
        )

    budgets = (150_000, 150_000, size * 2)
    with CuttingProxy(fake.address, budgets, arrived) as proxy, Client(proxy.address) as client:
        adapter = client.upload(folder, "x", progress=lambda now, _: done.append(now))
    assert len(cuts) == 2
    assert done[-1] == size
    restarts = [after for before, after in pairwise(done) if after < before]
    assert len(restarts) == 2
    assert restarts[0] > 100_000
    assert restarts[1] > 200_000
    assert adapter.revision == 1
    fake.registry.verify(adapter.digest)
    assert staged(fake) == []


@pytest.mark.usefixtures("impatient")
def test_the_client_gives_up_on_a_server_that_does_not_come_back(
    fake: RunningServer, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploading, "RETRY_DELAYS", (0.01, 0.01))
    cuts: list[None] = []
    with (
        CuttingProxy(fake.address, [4000] * 9, lambda: cuts.append(None)) as proxy,
        Client(proxy.address) as client,
        pytest.raises(UnavailableError),
    ):
        client.upload(folders["lora"], "x")
    assert 1 <= len(cuts) <= 3


@pytest.mark.usefixtures("impatient")
def test_the_client_sends_what_was_deleted_since_its_plan(
    client: Client, fake: RunningServer, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.upload(folders["lora"], "other")
    plan = client._adapters.PlanUpload

    def plan_and_lose(request: ab.PlanUploadRequest) -> ab.PlanUploadResponse:
        planned = plan(request)
        assert not planned.needed
        monkeypatch.setattr(client._adapters, "PlanUpload", plan)
        client.delete_adapter("other")
        return planned

    monkeypatch.setattr(client._adapters, "PlanUpload", plan_and_lose)
    digest = client.upload(folders["lora"], "x").digest
    fake.registry.verify(digest)


def test_a_silent_upload_ends_and_its_bytes_wait(
    start_fake: StartFake,
    folders: Folders,
    short: tuple[list[ab.UploadAdapterRequest], dict[str, int]],
) -> None:
    """Whoever comes back goes on; meanwhile nothing is held for it but the bytes."""
    fake, (parts, sizes) = start_fake(transfer_idle=0.5), short
    ended = threading.Event()

    def messages() -> Iterator[ab.UploadAdapterRequest]:
        yield from parts
        ended.wait(PATIENCE)

    with grpc.insecure_channel(fake.address) as channel, Client(fake.address) as client:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        error = refusal(fake, stub.UploadAdapter, messages())
        ended.set()
        assert type(error) is AbortedError
        assert error.reason is Reason.TRANSFER_IDLE
        assert planned(stub, folders["lora"]) == sizes
        assert client.upload(folders["lora"], "x").revision == 1
        assert staged(fake) == []


def test_header_only_uploads_leave_nothing(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
) -> None:
    for number in range(20):
        header = messages_of(folders["lora"], f"x{number}")[0]
        assert refusal(fake, stub.UploadAdapter, iter([header])).reason is Reason.UPLOAD_INCOMPLETE
    assert staged(fake) == []
    assert fake.registry._uploads.running == {}
    assert fake.registry.staging_bytes() == 0


def test_an_honest_upload_beside_a_flood(
    fake: RunningServer,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    monkeypatch: pytest.MonkeyPatch,
    short: tuple[list[ab.UploadAdapterRequest], dict[str, int]],
) -> None:
    """All places are taken by uploads that stand still: the one that stood longest makes way."""
    monkeypatch.setattr(places, "STALLED", 0.0)
    fake.server._uploads._places._per_caller = 4
    error = refusal(fake, stub.UploadAdapter, iter(short[0]))
    assert error.reason is Reason.UPLOAD_INCOMPLETE
    over = threading.Event()

    def messages(number: int) -> Iterator[ab.UploadAdapterRequest]:
        yield messages_of(folders["lora"], f"flood{number}")[0]
        over.wait(PATIENCE)

    calls = [stub.UploadAdapter.future(messages(number)) for number in range(4)]
    wait_until(lambda: len(fake.registry._uploads.running) == 4, "all have begun")
    assert planned(stub, folders["lora"]) == short[1]
    with Client(fake.address) as client:
        assert client.upload(folders["lora"], "x").revision == 1
    wait_until(lambda: any(call.done() for call in calls), "one of them made way")
    over.set()
    codes = {call.code() for call in calls}
    assert codes == {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.ABORTED}


@pytest.mark.usefixtures("impatient")
def test_the_client_goes_on_when_there_is_room(
    client: Client, fake: RunningServer, folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals = [Reason.STAGING_FULL, Reason.TOO_MANY_TRANSFERS]
    honest = Staging.write

    def write(staging: Staging, sha256: str, offset: int, data: bytes) -> None:
        if refusals:
            raise ResourceExhaustedError("later", reason=refusals.pop())
        honest(staging, sha256, offset, data)

    monkeypatch.setattr(Staging, "write", write)
    assert client.upload(folders["lora"], "x").revision == 1
    assert refusals == []
