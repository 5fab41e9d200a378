"""AdapterService: uploads that store all or nothing, look-ups, paging, deletion."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lorastack.client import Client, to_error
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    Reason,
)
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import adapters_pb2_grpc
from lorastack.v1 import generation_pb2 as pb
from tests.service.fakes import RunningServer

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


def test_upload_show_list_delete(client: Client, folders: Folders, fake: RunningServer) -> None:
    lora = client.upload(folders["lora"], "team/lora")
    assert (lora.id, lora.kind, lora.revision, lora.rank) == ("team/lora", ab.Adapter.LORA, 1, 8)
    assert lora.digest.startswith("sha256:")
    assert list(lora.target_modules) == ["q_proj"]
    assert lora.compatible
    assert lora.residency == ab.Adapter.DISK
    assert lora.size_bytes == sum(path.stat().st_size for path in folders["lora"].iterdir())
    assert lora.created_at.seconds > 1_600_000_000
    heads = client.upload(folders["heads"], "heads")
    assert (heads.kind, heads.num_heads, heads.medusa_version) == (ab.Adapter.MEDUSA, 3, 2)
    bundle = client.upload(folders["bundle"], "bundle")
    assert bundle.kind == ab.Adapter.LORA_WITH_MEDUSA
    assert client.get_adapter("team/lora") == lora
    assert client.get_adapter(f"team/lora@{lora.digest}") == lora
    assert client.list_adapters() == [bundle, heads, lora]
    assert client.list_adapters("team/") == [lora]
    client.delete_adapter("heads")
    assert client.list_adapters() == [bundle, lora]
    for call in (client.get_adapter, client.delete_adapter):
        with pytest.raises(NotFoundError, match="heads") as unknown:
            call("heads")
        assert unknown.value.metadata["request_id"]
    assert staged(fake) == []


def test_a_new_revision(client: Client, folders: Folders) -> None:
    first = client.upload(folders["lora"], "x")
    again = client.upload(folders["lora"], "x")
    assert (again.revision, again.digest) == (1, first.digest)  # the same bytes change nothing
    second = client.upload(folders["other"], "x", if_digest=first.digest)
    assert (second.revision, second.id) == (2, "x")
    with pytest.raises(AbortedError):
        client.upload(folders["lora"], "x", if_digest=first.digest)
    with pytest.raises(AlreadyExistsError):
        client.upload(folders["lora"], "x", if_digest="")
    assert client.get_adapter("x") == second


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


def test_paging(
    client: Client, folders: Folders, stub: adapters_pb2_grpc.AdapterServiceStub
) -> None:
    names = [f"a{index}" for index in range(5)]
    for name in reversed(names):
        client.upload(folders["lora"], name)
    seen: list[list[str]] = []
    request = ab.ListAdaptersRequest(page_size=2)
    while True:
        page = stub.ListAdapters(request)
        seen.append([adapter.id for adapter in page.adapters])
        if not page.next_page_token:
            break
        request.page_token = page.next_page_token
    assert seen == [["a0", "a1"], ["a2", "a3"], ["a4"]]
    assert not stub.ListAdapters(ab.ListAdaptersRequest(page_size=5)).next_page_token


def test_a_foreign_page_token_is_refused(
    fake: RunningServer, stub: adapters_pb2_grpc.AdapterServiceStub
) -> None:
    for token in ("%%%", "é", "_w=="):
        error = refusal(fake, stub.ListAdapters, ab.ListAdaptersRequest(page_token=token))
        assert type(error) is InvalidArgumentError


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
        [header],
        [header, header],
        [header, chunks[0]],
        [header, wrong],
        [header, huge],
        [header, chunks[0], *chunks],
        [header, flipped, *chunks[1:]],
    ):
        error = refusal(fake, stub.UploadAdapter, iter(messages))
        assert type(error) is InvalidArgumentError, error
        assert error.metadata["request_id"]
    assert client.list_adapters() == []
    assert staged(fake) == []


def test_a_broken_off_upload_leaves_nothing(
    client: Client,
    folders: Folders,
    stub: adapters_pb2_grpc.AdapterServiceStub,
    fake: RunningServer,
) -> None:
    """The caller goes in the middle of its upload."""
    header, first, *_ = messages_of(folders["lora"], "x")
    sent = []

    def messages() -> Iterator[ab.UploadAdapterRequest]:
        yield header
        yield first
        called.wait(10)  # this runs on a thread that may be ahead of the line that makes `call`
        sent.append(call)
        call.cancel()

    called = threading.Event()
    call = stub.UploadAdapter.future(messages())
    called.set()
    with pytest.raises(grpc.FutureCancelledError):
        call.result()
    for _ in range(50):  # every answer comes after the server has seen what came before it
        assert client.list_adapters() == []
        if not staged(fake):
            break
    assert staged(fake) == []


def test_where_an_adapter_is(client: Client, folders: Folders, fake: RunningServer) -> None:
    digest = client.upload(folders["lora"], "x").digest
    fake.host.copies[digest] = 1000
    assert client.get_adapter("x").residency == ab.Adapter.HOST
    fake.pool.residents.append((digest, 2000, 1))
    fake.engine.hold()
    running = client.stream(
        pb.GenerateRequest(prompt="a", lora_id="x", stop=pb.StopParams(max_new_tokens=2))
    )
    fake.engine.wait(lambda: bool(fake.engine.rows))
    found = client.get_adapter("x")
    assert (found.residency, found.device_bytes) == (ab.Adapter.DEVICE, 2000)
    assert found.in_flight == 1
    fake.engine.go_on()
    assert list(running)[-1].final.adapters.loras[0].digest == digest
    assert client.get_adapter("x").in_flight == 0


def test_deleting_the_default_is_refused(
    fake: RunningServer, client: Client, folders: Folders
) -> None:
    client.upload(folders["heads"], "heads")
    fake.server._adapters._default_medusa = "heads"
    with pytest.raises(FailedPreconditionError, match="heads") as caught:
        client.delete_adapter("heads")
    assert caught.value.reason is Reason.ADAPTER_IN_USE
    assert client.get_adapter("heads").id == "heads"
