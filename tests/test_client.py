"""The client: errors come back as our classes, uploads send what is missing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lorastack.client import Client, folder_files
from lorastack.client.uploading import file_spec, send_files
from lorastack.errors import InternalError, InvalidArgumentError, Reason, UnavailableError
from lorastack.v1 import adapters_pb2 as ab
from lorastack.v1 import generation_pb2 as pb
from tests.service.conftest import (  # noqa: F401 - fixtures
    client,
    fake,
    folders,
    shapes,
    start_fake,
    tokenizer,
)
from tests.service.fakes import RunningServer


def test_nobody_there_says_how_to_start_one() -> None:
    with Client("127.0.0.1:1") as lonely:
        for call in (lonely.model_info, lonely.list_adapters):
            with pytest.raises(UnavailableError, match="lorastack serve") as caught:
                call()
            assert "127.0.0.1:1" in caught.value.message
        with pytest.raises(UnavailableError):
            next(lonely.stream(pb.GenerateRequest(prompt="x")))


def test_an_unknown_reason_keeps_the_class(
    client: Client,  # noqa: F811
    fake: RunningServer,  # noqa: F811
) -> None:
    """A newer server may have reasons that this client does not know."""
    error = InvalidArgumentError("new rule", field="x")
    error.reason = SimpleNamespace(value="BRAND_NEW")  # type: ignore[assignment]
    fake.engine.refusal = error
    with pytest.raises(InvalidArgumentError, match="new rule") as caught:
        client.generate(pb.GenerateRequest(prompt="x"))
    assert caught.value.reason is Reason.INVALID_REQUEST
    assert caught.value.metadata["field"] == "x"


def test_a_server_that_asks_for_what_was_not_announced(tmp_path: Path) -> None:
    class Faulty:
        def PlanUpload(self, request: ab.PlanUploadRequest) -> ab.PlanUploadResponse:
            return ab.PlanUploadResponse(needed=[ab.NeededBlob(sha256="f" * 64)])

    path = tmp_path / "adapter_config.json"
    path.write_text("{}")
    header = ab.UploadHeader(id="x", files=[file_spec(path)])
    with pytest.raises(InternalError, match="there:1 asks for the blob 'ffff"):
        send_files(Faulty(), "there:1", header, [path], None)


def test_upload_sends_only_what_is_missing(
    client: Client,  # noqa: F811
    folders: dict[str, Path],  # noqa: F811
) -> None:
    progress: list[tuple[int, int]] = []
    client.upload(folders["lora"], "a", progress=lambda *done: progress.append(done))
    total = sum(path.stat().st_size for path in folders["lora"].iterdir())
    assert progress[-1] == (total, total)
    assert [done for done, _ in progress] == sorted({done for done, _ in progress})
    progress.clear()
    client.upload(folders["lora"], "b", progress=lambda *done: progress.append(done))
    assert progress == []
    assert client.get_adapter("a").digest == client.get_adapter("b").digest


def test_two_equal_files_are_sent_once(
    client: Client,  # noqa: F811
    folders: dict[str, Path],  # noqa: F811
    tmp_path: Path,
) -> None:
    for path in folders["lora"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name in ("README.md", "NOTES.md"):
        (tmp_path / name).write_text("the same")
    (tmp_path / ".hidden").write_text("not sent")
    (tmp_path / "checkpoints").mkdir()
    assert client.upload(tmp_path, "a").rank == 8


def test_folders_without_files_are_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InvalidArgumentError, match=str(folder)):
            folder_files(folder)


def test_a_closed_client_ends_its_calls(fake: RunningServer) -> None:  # noqa: F811
    closed = Client(fake.address)
    closed.close()
    with pytest.raises(ValueError, match="closed"):
        closed.model_info()
