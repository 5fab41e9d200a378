"""Blobs that rot on the disk: DATA_LOSS that names them, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lorastack.client import Client
from lorastack.errors import DataLossError, Reason
from tests.adapters.folders import read_folder, sha256
from tests.faults.conftest import Configure
from tests.helpers.live import ask
from tests.helpers.process import ServerProcess

WEIGHTS = "adapter_model.safetensors"


def flip(blob: Path) -> None:
    data = bytearray(blob.read_bytes())
    data[len(data) // 2] ^= 1
    blob.write_bytes(data)


def shorten(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes()[:-1])


def lengthen(blob: Path) -> None:
    blob.write_bytes(blob.read_bytes() + b"\0")


@pytest.mark.parametrize("spoil", [flip, shorten, lengthen, Path.unlink])
def test_a_damaged_blob_is_named(
    spoil: Callable[[Path], None], configure: Configure, canaries: dict[str, Path]
) -> None:
    """Two ids share the damaged blob; others, and the row that runs on a copy, go on."""
    config = configure()
    blobs = config.adapters.store / "blobs" / "sha256"
    with ServerProcess(config) as server, Client(server.address) as client:
        for name, word in (("one", "owl"), ("two", "owl"), ("other", "fjord"), ("used", "bat")):
            client.upload(canaries[word], name)
        running = client.stream(ask("7", stack=[("used", 1.0)], max_new_tokens=600))
        text = next(running).text
        blob = sha256(read_folder(canaries["owl"])[WEIGHTS])
        spoil(blobs / blob)
        spoil(blobs / sha256(read_folder(canaries["bat"])[WEIGHTS]))
        for name in ("one", "two", "one"):
            with pytest.raises(DataLossError) as loss:
                client.generate(ask("7", stack=[(name, 1.0)]))
            assert loss.value.reason is Reason.CORRUPT_DATA
            assert blob in loss.value.message
            assert loss.value.metadata["digest"] == client.get_adapter(name).digest
        said = client.generate(ask("7", stack=[("other", 1.0)], max_new_tokens=10))
        assert said.text == 2 * "fjord"
        text += "".join(part.text for part in running)
        assert text == 200 * "bat"


@pytest.mark.parametrize("spoil", [flip, shorten, lengthen, Path.unlink])
def test_the_remedy_helps(
    spoil: Callable[[Path], None], configure: Configure, canaries: dict[str, Path]
) -> None:
    """What DATA_LOSS says to do, for one of two ids that share the blob."""
    config = configure()
    blob = sha256(read_folder(canaries["owl"])[WEIGHTS])
    with ServerProcess(config) as server, Client(server.address) as client:
        for name in ("one", "two"):
            client.upload(canaries["owl"], name)
        spoil(config.adapters.store / "blobs" / "sha256" / blob)
        with pytest.raises(DataLossError, match="upload the adapter again"):
            client.generate(ask("7", stack=[("one", 1.0)]))
        client.upload(canaries["owl"], "one")
        for name in ("one", "two"):
            said = client.generate(ask("7", stack=[(name, 1.0)], max_new_tokens=6))
            assert said.text == "owlowl"
