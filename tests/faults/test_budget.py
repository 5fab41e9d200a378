"""Adapters that cannot be on the device: refused at once and by name, not waited for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorastack.config import MIB, AdapterConfig, EngineConfig
from lorastack.errors import FailedPreconditionError, Reason, ResourceExhaustedError
from tests.helpers.live import LiveServer, ask

TIMEOUT = 120.0  # seconds: a refusal that waits for room would wait for ever
Start = Callable[[int], LiveServer]


@pytest.fixture
def start(tmp_path: Path, tiny_llama: Path, canaries: dict[str, Path]) -> Iterator[Start]:
    """A server with so many bytes for adapters on the device, and all canaries in its store."""
    servers: list[LiveServer] = []

    def build(device_memory: int) -> LiveServer:
        config = AdapterConfig(store=tmp_path / "store", device_memory=device_memory)
        server = LiveServer(tiny_llama, engine=EngineConfig(kv_memory=MIB), adapters=config)
        servers.append(server.__enter__())
        server.upload_all(canaries)
        return server

    yield build
    for server in servers:
        server.assert_idle()
        server.close()


def device_bytes(server: LiveServer, name: str) -> int:
    server.client.load(name)
    nbytes = server.client.get_adapter(name).device_bytes
    server.client.unload(name)
    assert nbytes > 0
    return int(nbytes)


def assert_speaks(server: LiveServer, word: str) -> None:
    request = ask("7", stack=[(word, 1.0)], max_new_tokens=2 * len(word))
    assert server.client.generate(request, timeout=TIMEOUT).text == 2 * word


@pytest.fixture
def sizes(tmp_path: Path, tiny_llama: Path, canaries: dict[str, Path]) -> dict[str, int]:
    """Bytes on the device by word."""
    config = AdapterConfig(store=tmp_path / "measured", device_memory=MIB)
    with LiveServer(tiny_llama, engine=EngineConfig(kv_memory=MIB), adapters=config) as server:
        server.upload_all(canaries)
        return {word: device_bytes(server, word) for word in canaries}


def test_one_that_is_too_large(start: Start, sizes: dict[str, int]) -> None:
    assert sizes["zephyr"] > sizes["owl"]
    server = start(sizes["zephyr"] - 1)
    calls: tuple[Callable[[], object], ...] = (
        lambda: server.client.generate(ask("7", stack=[("zephyr", 1.0)]), timeout=TIMEOUT),
        lambda: list(server.client.stream(ask("7", stack=[("zephyr", 1.0)]), timeout=TIMEOUT)),
        lambda: server.client.load("zephyr", timeout=TIMEOUT),
    )
    for call in calls:
        with pytest.raises(FailedPreconditionError) as refusal:
            call()
        assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    assert_speaks(server, "owl")


def test_a_stack_that_is_too_large(start: Start, sizes: dict[str, int]) -> None:
    """Each fits alone; together they are a byte too many."""
    server = start(sizes["owl"] + sizes["bat"] - 1)
    request = ask("7", stack=[("owl", 1.0), ("bat", 0.5)])
    with pytest.raises(FailedPreconditionError) as refusal:
        server.client.generate(request, timeout=TIMEOUT)
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    assert_speaks(server, "owl")
    assert_speaks(server, "bat")


def test_beside_explicit_pins(start: Start, sizes: dict[str, int]) -> None:
    """The refusal names the pinned ones in the way; unpinning one helps."""
    server = start(sizes["owl"] + sizes["bat"] + sizes["mink"] - 1)
    client = server.client
    for name in ("owl", "bat"):
        assert client.load(name, pin=True, timeout=TIMEOUT).pinned
    alone, beside_owl = [("zephyr", 1.0)], [("owl", 1.0), ("mink", 1.0)]
    calls: tuple[tuple[Callable[[], object], set[str]], ...] = (
        (lambda: client.generate(ask("7", stack=alone), timeout=TIMEOUT), {"owl", "bat"}),
        (lambda: client.generate(ask("7", stack=beside_owl), timeout=TIMEOUT), {"bat"}),
        (lambda: client.load("zephyr", timeout=TIMEOUT), {"owl", "bat"}),
    )
    for call, in_the_way in calls:
        with pytest.raises(ResourceExhaustedError) as refusal:
            call()
        assert refusal.value.reason is Reason.DEVICE_MEMORY_PINNED
        assert {word for word in sizes if word in refusal.value.message} == in_the_way
    assert_speaks(server, "owl")
    client.unload("owl", timeout=TIMEOUT)
    assert_speaks(server, "zephyr")
