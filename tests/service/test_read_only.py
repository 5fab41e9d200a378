"""A server that only reads its store follows the one that writes it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from lorastack.client import Client
from lorastack.errors import FailedPreconditionError, NotFoundError, Reason
from lorastack.service.adapters import writer as writer_module
from lorastack.service.adapters.writer import StoreFollower
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import wait_until
from tests.service.conftest import StartFake
from tests.service.fakes import RunningServer

Folders = dict[str, Path]


@pytest.fixture
def reader(
    fake: RunningServer, start_fake: StartFake, monkeypatch: pytest.MonkeyPatch
) -> RunningServer:
    monkeypatch.setattr(writer_module, "REFRESH_SECONDS", 0.01)
    return start_fake(store=fake.registry._root, read_only_store=True)


def test_it_takes_nothing(client: Client, folders: Folders, reader: RunningServer) -> None:
    client.upload(folders["lora"], "x")
    with Client(reader.address) as reading:
        for call in (
            lambda: reading.upload(folders["other"], "y"),
            lambda: reading.delete_adapter("x"),
            lambda: reading.rollback("x", "sha256:" + "0" * 64),
            lambda: reading.set_default_medusa(""),
        ):
            with pytest.raises(FailedPreconditionError) as caught:
                call()
            assert caught.value.reason is Reason.STORE_READ_ONLY


def test_it_follows_the_writer(client: Client, folders: Folders, reader: RunningServer) -> None:
    first = client.upload(folders["lora"], "x").digest
    heads = client.upload(folders["heads"], "heads").digest
    client.set_default_medusa("heads")
    with Client(reader.address) as reading:
        wait_until(lambda: reading.model_info().default_medusa_digest == heads, "the default")
        reply = reading.generate(pb.GenerateRequest(prompt="a", lora_id="x"))
        assert reply.adapters.loras[0].digest == first
        second = client.upload(folders["other"], "x").digest
        wait_until(lambda: reading.get_adapter("x").digest == second, "the new revision")
        assert reader.engine.forgotten == [first]
        client.delete_adapter("x")
        wait_until(lambda: len(reading.list_adapters()) == 1, "the deletion")
        assert reader.engine.forgotten == [first, second]
        with pytest.raises(NotFoundError):
            reading.generate(pb.GenerateRequest(prompt="a", lora_id="x"))


def test_a_store_that_cannot_be_read_for_a_moment(
    client: Client,
    folders: Folders,
    reader: RunningServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = []

    def fail(self: StoreFollower) -> None:
        failures.append(1)
        raise RuntimeError("a network file system had a moment")

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR):
        patch.setattr(StoreFollower, "refresh", fail)
        wait_until(lambda: len(failures) > 1, "refreshing is tried again")
    assert "could not be read again" in caplog.text
    client.upload(folders["lora"], "x")
    with Client(reader.address) as reading:
        wait_until(lambda: len(reading.list_adapters()) == 1, "the upload")
