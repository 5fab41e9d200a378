"""PullAdapter and DownloadAdapter, from the client to the store and back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from lorastack.adapters.store.staging import Staging
from lorastack.client import Client, to_error
from lorastack.config import MIB
from lorastack.errors import (
    AbortedError,
    AlreadyExistsError,
    DataLossError,
    FailedPreconditionError,
    InvalidArgumentError,
    LorastackError,
    NotFoundError,
    PermissionDeniedError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.layout import ModelShapes
from lorastack.service.edge import status
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import adapters_pb2_grpc
from tests.helpers.adapters import write_lora
from tests.helpers.fake_hub import PATIENCE, FakeHub
from tests.helpers.live import wait_until
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, folders: Folders) -> Iterator[FakeHub]:
    with FakeHub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        hub.add_folder("acme/lora", folders["lora"])
        yield hub


@pytest.fixture
def fake(start_fake: StartFake, folders: Folders) -> RunningServer:
    return start_fake(pull_orgs=("acme",), pull_roots=(folders["lora"].parent,))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def staged_bytes(fake: RunningServer) -> int:
    staging = fake.registry._root / "staging"
    return sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())


def test_a_pull_is_an_upload(
    client: Client, folders: Folders, hub: FakeHub, tmp_path: Path
) -> None:
    uploaded = client.upload(folders["lora"], "uploaded")
    news: list[tuple[int, int]] = []
    pulled = client.pull("p/hub", hub_id="acme/lora", progress=lambda *done: news.append(done))
    assert (pulled.id, pulled.digest, pulled.kind) == ("p/hub", uploaded.digest, ab.Adapter.LORA)
    assert news == sorted(news)
    assert news[-1] == (pulled.size_bytes, pulled.size_bytes)
    assert client.pull("p/folder", folder=str(folders["lora"])).digest == uploaded.digest
    assert client.pull("heads", folder=str(folders["heads"])).kind == ab.Adapter.MEDUSA
    assert [adapter.id for adapter in client.list_adapters("p/")] == ["p/folder", "p/hub"]
    client.download("p/hub", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folders["lora"])


def test_stored_bytes_are_not_fetched_again(client: Client, folders: Folders, hub: FakeHub) -> None:
    client.upload(folders["lora"], "x")
    client.pull("x", hub_id="acme/lora")
    assert [name for name, _ in hub.transfers] == ["adapter_config.json"]


def test_conditions_hold_as_for_uploads(
    client: Client, folders: Folders, hub: FakeHub, shapes: object, fake: RunningServer
) -> None:
    folder = str(folders["lora"])
    first = client.pull("x", folder=folder, if_digest="")
    with pytest.raises(AlreadyExistsError):
        client.pull("x", hub_id="acme/lora", if_digest="")
    second = client.pull("x", folder=str(folders["other"]), if_digest=first.digest)
    assert second.revision == 2
    with pytest.raises(InvalidArgumentError):
        client.pull("none", folder=folder)
    other_base = write_lora(
        folders["lora"].parent / "other-base",
        shapes,  # type: ignore[arg-type]
        targets=("q_proj",),
        base_model_name_or_path="someone/else",
    )
    with pytest.raises(FailedPreconditionError) as caught:
        client.pull("y", folder=str(other_base))
    assert caught.value.reason is Reason.BASE_MODEL_DIFFERS
    assert client.pull("y", folder=str(other_base), accept_base=True).base_model == "someone/else"
    assert staged_bytes(fake) == 0


def test_pulls_are_off_unless_allowed(start_fake: StartFake, folders: Folders) -> None:
    with Client(start_fake().address) as client:
        for source, flag in (
            ({"hub_id": "acme/lora"}, "--pull-org"),
            ({"folder": str(folders["lora"])}, "--pull-root"),
        ):
            with pytest.raises(PermissionDeniedError, match=flag) as caught:
                client.pull("x", **source)  # type: ignore[arg-type]
            assert caught.value.reason is Reason.PULL_NOT_ALLOWED


def test_bad_requests(client: Client, folders: Folders) -> None:
    folder = str(folders["lora"])
    for bad in (
        {},
        {"folder": folder, "revision": "main"},
        {"folder": folder, "token": "x"},
        {"folder": "lora"},
        {"hub_id": "lora"},
        {"hub_id": "acme/lora", "revision": "a b"},
        {"hub_id": "acme/lora", "token": "a\nb"},
        {"folder": folder, "if_digest": "sha256:x"},
    ):
        with pytest.raises(InvalidArgumentError):
            client.pull("x", **bad)  # type: ignore[arg-type]
    for outside in (str(folders["lora"].parent.parent), "/etc", f"{folder}/../../.."):
        with pytest.raises(PermissionDeniedError):
            client.pull("x", folder=outside)
    assert client.list_adapters() == []


def test_a_bad_adapter_stores_nothing(
    client: Client, folders: Folders, hub: FakeHub, fake: RunningServer
) -> None:
    files = contents(folders["lora"])
    hub.add("acme/bad", files | {"adapter_config.json": b'{"peft_type": "LORA"}'})
    with pytest.raises(InvalidArgumentError) as caught:
        client.pull("x", hub_id="acme/bad")
    assert caught.value.reason is Reason.INVALID_ADAPTER
    assert client.list_adapters() == []
    assert staged_bytes(fake) == 0


def test_a_full_disk_is_not_kept_full(
    client: Client, folders: Folders, fake: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise ResourceExhaustedError("full", reason=Reason.STORE_FULL)

    monkeypatch.setattr(Staging, "write", full)
    with pytest.raises(ResourceExhaustedError):
        client.pull("x", folder=str(folders["lora"]))
    assert list((fake.registry._root / "staging").iterdir()) == []


def test_a_broken_transfer_is_resumed(
    client: Client, folders: Folders, hub: FakeHub, fake: RunningServer
) -> None:
    name = "adapter_model.safetensors"
    half = (folders["lora"] / name).stat().st_size // 2
    hub.cut = half
    with pytest.raises(UnavailableError) as caught:
        client.pull("x", hub_id="acme/lora")
    assert caught.value.reason is Reason.HUB_FAILED
    assert client.list_adapters() == []
    kept = staged_bytes(fake)
    assert 0 < kept <= half + len((folders["lora"] / "adapter_config.json").read_bytes())
    hub.cut = None
    adapter = client.pull("x", hub_id="acme/lora")
    assert (name, f"bytes={half}-") in hub.transfers
    assert adapter.digest == client.upload(folders["lora"], "y").digest


def test_a_caller_who_goes_ends_the_pull(
    client: Client, folders: Folders, hub: FakeHub, fake: RunningServer
) -> None:
    hub.hold.clear()
    with grpc.insecure_channel(fake.address) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        call = stub.PullAdapter(ab.PullAdapterRequest(id="x", hub_id="acme/lora"))
        assert next(call).total_bytes > 0
        wait_until(lambda: staged_bytes(fake) > 0, "bytes arrive")
        # Meanwhile the server does everything else.
        assert client.upload(folders["other"], "other").id == "other"
        call.cancel()
        assert hub.ended_early.wait(PATIENCE)
    assert [adapter.id for adapter in client.list_adapters()] == ["other"]
    hub.hold.set()
    assert client.pull("x", hub_id="acme/lora").id == "x"


def test_tokens_are_not_logged(
    client: Client, folders: Folders, hub: FakeHub, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    hub.add_folder("acme/private", folders["lora"], private=True)
    with pytest.raises(NotFoundError, match="token"):
        client.pull("x", hub_id="acme/private")
    assert client.pull("x", hub_id="acme/private", token=hub.token).id == "x"
    hub.status = 500
    errors: list[LorastackError] = []
    for token in (hub.token, hub.token + "\n"):
        with pytest.raises(LorastackError) as caught:
            client.pull("x", hub_id="acme/private", token=token)
        errors.append(caught.value)
    shown = [caplog.text, *(f"{error.message} {error.metadata}" for error in errors)]
    assert not [text for text in shown if hub.token in text]


def test_downloads(client: Client, folders: Folders, tmp_path: Path) -> None:
    first = client.upload(folders["lora"], "x")
    client.upload(folders["bundle"], "x")
    news: list[tuple[int, int]] = []
    client.download("x", tmp_path / "new" / "x", progress=lambda *done: news.append(done))
    assert contents(tmp_path / "new" / "x") == contents(folders["bundle"])
    assert news == sorted(news)
    assert news[-1][0] == news[-1][1]
    (tmp_path / "empty").mkdir()
    old = client.download(f"x@{first.digest}", tmp_path / "empty")
    assert old.revision == 1
    assert contents(tmp_path / "empty") == contents(folders["lora"])
    with pytest.raises(FailedPreconditionError, match="empty"):
        client.download("x", tmp_path / "empty")
    assert contents(tmp_path / "empty") == contents(folders["lora"])
    with pytest.raises(NotFoundError):
        client.download("y", tmp_path / "y")
    assert sorted(os.listdir(tmp_path / "new")) == ["x"]
    assert not (tmp_path / "y").exists()


def test_a_deletion_does_not_break_a_download(
    client: Client, folders: Folders, fake: RunningServer
) -> None:
    client.upload(folders["lora"], "x")
    with grpc.insecure_channel(fake.address) as channel:
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        call = stub.DownloadAdapter(ab.DownloadAdapterRequest(id="x"))
        parts = [next(call)]
        client.delete_adapter("x")
        parts += list(call)
    assert b"".join(part.data for part in parts) == b"".join(
        path.read_bytes() for path in sorted(folders["lora"].iterdir())
    )


def test_an_unread_download_holds_no_files_and_ends(
    start_fake: StartFake, tmp_path: Path, shapes: ModelShapes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "ABORT_SECONDS", 0.05)
    folder = write_lora(tmp_path / "large", shapes, rank=64)
    for number in range(24):  # more bytes than gRPC takes in
        (folder / f"{number}.md").write_bytes(os.urandom(MIB))
    fake = start_fake(transfer_idle=0.5)
    blobs = str(fake.registry._root / "blobs")

    def open_blobs() -> list[str]:
        links = (os.path.realpath(path) for path in Path("/proc/self/fd").iterdir())
        return [link for link in links if link.startswith(blobs)]

    downloads = fake.server._transfers.downloads
    with Client(fake.address) as client, grpc.insecure_channel(fake.address) as channel:
        digest = client.upload(folder, "x").digest
        stub = adapters_pb2_grpc.AdapterServiceStub(channel)
        call = stub.DownloadAdapter(ab.DownloadAdapterRequest(id="x"))
        assert next(call).file.name
        wait_until(lambda: any(place.stalled() for place in downloads._taken), "nobody reads")
        wait_until(lambda: open_blobs() == [], "no file is open")
        client.delete_adapter("x")  # its bytes stay for as long as the download lasts
        assert client.disk_usage() == (0, 0)
        assert len(os.listdir(blobs + "/sha256")) == 26
        wait_until(lambda: not downloads._taken, "it is ended")
        wait_until(lambda: not os.listdir(blobs + "/sha256"), "its bytes go")
        # Its status waits behind what was not read, but no call of ours does.
        wait_until(lambda: fake.server._guard._num_calls == 0, "the call is over")
        with pytest.raises(grpc.RpcError) as caught:
            list(call)
        error = to_error(caught.value, fake.address)
        assert (type(error), error.reason) == (AbortedError, Reason.TRANSFER_IDLE)
        assert client.upload(folder, "y").digest == digest


def test_what_is_left_out_is_named(
    client: Client, folders: Folders, fake: RunningServer, tmp_path: Path
) -> None:
    """A folder as a trainer leaves it, uploaded and pulled: the same adapter."""
    folder = folders["lora"].parent / "trained"
    shutil.copytree(folders["lora"], folder)
    (folder / "README.md").write_text("# mine")
    (folder / "tokenizer.json").write_text("{}")
    left = [
        *(".DS_Store", "adapter_model.bin", "all_results.json", "checkpoint-5/", "global_step7/"),
        *("optimizer.pt", "rng_state.pth", "runs/", "scheduler.pt", "trainer_state.json"),
        "training_args.bin",
    ]
    for name in left:
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_bytes(b"PK")
    (folder / "checkpoint-5" / "adapter_config.json").write_text("{}")
    told: list[list[str]] = []
    uploaded = client.upload(folder, "x", left_out=lambda names: told.append(list(names)))
    pulled = client.pull("y", folder=str(folder), left_out=lambda names: told.append(list(names)))
    assert told == [left, left]
    assert uploaded.digest == pulled.digest
    client.download("x", tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == [
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
    ]
    quiet: list[object] = []
    client.upload(folders["lora"], "z", left_out=quiet.append)
    assert quiet == []
    shutil.rmtree(folder)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named_and_nothing_is_written(
    client: Client, folders: Folders, fake: RunningServer, tmp_path: Path, damage: str
) -> None:
    adapter = client.upload(folders["lora"], "x")
    blob = fake.registry.files(adapter.digest)["adapter_model.safetensors"]
    data = blob.read_bytes()
    if damage == "remove":
        blob.unlink()
    else:
        blob.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if damage == "flip" else b""))
    with pytest.raises(DataLossError, match=blob.name):
        client.download("x", tmp_path / "x")
    assert list(tmp_path.glob("x*")) == []
    assert list(tmp_path.glob(".x*")) == []


def test_a_damaged_readme_is_named_and_uploaded_again(
    client: Client, folders: Folders, fake: RunningServer, tmp_path: Path
) -> None:
    """It is outside the digest, and healed like any file."""
    source = tmp_path / "source"
    shutil.copytree(folders["lora"], source)
    (source / "README.md").write_text("mine")
    client.upload(source, "x")
    (source / "README.md").write_text("yours")
    client.upload(source, "y")
    (spec,) = fake.registry.resolve("x").other_files
    fake.registry.path(spec).write_text("mime")
    with pytest.raises(DataLossError, match=spec.sha256):
        client.download("x", tmp_path / "x")
    (source / "README.md").write_text("mine")
    client.upload(source, "x")
    for name, text in (("x", "mine"), ("y", "yours")):
        client.download(name, tmp_path / name)
        assert (tmp_path / name / "README.md").read_text() == text
