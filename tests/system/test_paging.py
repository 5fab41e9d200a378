"""Loading, pinning, replacing and deleting on a live server, and what its metrics say of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from lorastack.adapters.memory.arena import DeviceArena
from lorastack.adapters.memory.space import Move
from lorastack.adapters.memory.stream import Streams
from lorastack.client import Adapter
from lorastack.config import MIB, AdapterConfig
from lorastack.engine import views
from lorastack.errors import FailedPreconditionError, Reason, ResourceExhaustedError
from lorastack.layout import ModelShapes
from tests.helpers.adapters import write_heads, write_lora
from tests.helpers.live import ROOMY, LiveServer, ask, wait_until
from tests.helpers.streams import FakeDevice

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("paging")
    written = {
        name: write_lora(root / name, tiny_llama_shapes, seed=seed, rank=8)
        for seed, name in enumerate(NAMES)
    }
    written["large"] = write_lora(root / "large", tiny_llama_shapes, seed=9, rank=64)
    written["heads"] = write_heads(root / "heads", tiny_llama_shapes.hidden_size)
    return written


@pytest.fixture(scope="module")
def device_bytes(tiny_llama: Path, folders: dict[str, Path], tmp_path_factory: object) -> int:
    """What one of NAMES takes on the device."""
    assert isinstance(tmp_path_factory, pytest.TempPathFactory)
    config = AdapterConfig(store=tmp_path_factory.mktemp("store"))
    with LiveServer(tiny_llama, engine=ROOMY, adapters=config) as server:
        server.upload("a", folders["a"])
        return int(server.client.load("a").device_bytes)


@pytest.fixture(params=["on a CPU", "on a device of its own"])
def server(
    request: pytest.FixtureRequest,
    tiny_llama: Path,
    folders: dict[str, Path],
    tmp_path: Path,
    device_bytes: int,
) -> Iterator[LiveServer]:
    """Room for two of NAMES."""
    config = AdapterConfig(store=tmp_path / "store", device_memory=device_bytes * 5 // 2)
    streams = None if request.param == "on a CPU" else FakeDevice(lazy=True).streams
    with LiveServer(tiny_llama, engine=ROOMY, adapters=config, streams=streams) as live:
        live.upload_all(folders)
        yield live
        live.assert_idle()


def scraped(server: LiveServer) -> str:
    return generate_latest(server.server.metrics).decode()


def test_load_answers_when_it_is_there(server: LiveServer) -> None:
    loaded = server.client.load("a")
    assert loaded.residency == Adapter.DEVICE
    reply = server.client.generate(ask(stack=[("a", 1.0)]))
    assert reply.timings.adapter_wait_ms == 0
    assert server.client.get_adapter("a").last_used_at.seconds > 1_700_000_000
    assert f'lorastack_adapter_device_bytes{{digest="{loaded.digest}"}}' in scraped(server)
    assert 'lorastack_adapter_lookups_total{result="hit"} 1.0' in scraped(server)
    unloaded = server.client.unload("a")
    assert unloaded.residency == Adapter.DISK
    assert loaded.digest not in scraped(server)


def test_no_step_makes_what_it_reads_an_adapter_by(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    backend = type(server.engine._runner._backend)
    watch(monkeypatch, threads, backend, "adopt")
    watch(monkeypatch, threads, views, "heads_weights")
    watch(monkeypatch, threads, views.AdapterViews, "__init__")
    server.client.load("a")
    server.client.generate(ask(stack=[("a", 1.0)], max_new_tokens=4))
    server.client.load("heads")
    server.client.generate(ask(heads="heads", max_new_tokens=4))
    assert len(threads) == 5
    assert {name.rstrip("_0") for name in threads} <= {"adapter-loads", "adapter-views"}


def watch(monkeypatch: pytest.MonkeyPatch, threads: list[str], place: object, name: str) -> None:
    """threads: gets the names of those that call it."""
    call = getattr(place, name)

    def record(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        return call(*args)

    monkeypatch.setattr(place, name, record)


def test_a_pin_lasts_until_it_is_taken(server: LiveServer) -> None:
    assert server.client.load("a", pin=True).pinned
    for name in ("b", "c", "b", "c"):
        server.client.generate(ask(stack=[(name, 1.0)], max_new_tokens=3))
    pinned = server.client.get_adapter("a")
    assert (pinned.residency, pinned.pinned) == (Adapter.DEVICE, True)
    assert "lorastack_adapter_evictions_total 0.0" not in scraped(server)
    assert not server.client.unload("a").pinned


def test_pins_that_fill_the_device_are_named(server: LiveServer) -> None:
    for name in ("a", "b"):
        server.client.load(name, pin=True)
    for call in (
        lambda: server.client.load("c"),
        lambda: server.client.generate(ask(stack=[("c", 1.0)])),
    ):
        with pytest.raises(ResourceExhaustedError) as caught:
            call()
        assert caught.value.reason is Reason.DEVICE_MEMORY_PINNED
        assert caught.value.metadata["adapter_ids"] == "a, b"
    server.client.unload("a")
    assert server.client.load("c").residency == Adapter.DEVICE


def test_what_is_larger_than_the_device_is_refused(server: LiveServer) -> None:
    for call in (
        lambda: server.client.load("large"),
        lambda: server.client.generate(ask(stack=[("large", 1.0)])),
    ):
        with pytest.raises(FailedPreconditionError) as caught:
            call()
        assert caught.value.reason is Reason.ADAPTER_TOO_LARGE


def test_a_replaced_adapter_leaves_when_its_last_row_ends(
    server: LiveServer, folders: dict[str, Path]
) -> None:
    long = ask(stack=[("a", 1.0)], max_new_tokens=400, ignore_eos=True)
    old = server.digests["a"]
    expected = server.client.generate(ask(stack=[("a", 1.0)]))
    stream = server.client.stream(long)
    next(stream)
    server.upload("a", folders["c"])  # both ids point to the same content now
    assert server.digests["a"] == server.digests["c"]
    new = server.client.generate(ask(stack=[("a", 1.0)]))
    assert new.adapters.loras[0].digest == server.digests["c"]
    assert new.token_ids != expected.token_ids
    final = list(stream)[-1].final
    assert final.adapters.loras[0].digest == old
    wait_until(lambda: old not in scraped(server), "the old one leaves the device")
    again = server.client.generate(ask(stack=[(f"a@{old}", 1.0)]))
    assert again.token_ids == expected.token_ids
    server.client.delete_adapter("a")
    wait_until(lambda: old not in scraped(server), "the deleted one leaves the device")
    assert server.client.generate(ask(stack=[("c", 1.0)])).token_ids == new.token_ids


def test_default_heads_draft(server: LiveServer) -> None:
    server.client.set_default_medusa("heads")
    server.client.load("heads", pin=True)
    reply = server.client.generate(ask(heads="", max_new_tokens=24, ignore_eos=True))
    assert reply.adapters.medusa_id == "heads"
    assert reply.speculation.drafted_tokens > 0
    digest = server.digests["heads"]
    assert f'lorastack_heads_drafted_tokens_total{{digest="{digest}"}}' in scraped(server)
    server.client.set_default_medusa("")
    assert server.client.generate(ask(heads="")).adapters.medusa_id == ""


def test_tokens_are_the_same_through_a_small_device(
    tiny_llama: Path, tiny_llama_shapes: ModelShapes, tmp_path: Path
) -> None:
    """Adapters of three sizes page through an arena that holds a third of them."""
    folders = {
        f"a{seed}": write_lora(
            tmp_path / f"a{seed}", tiny_llama_shapes, seed=seed, rank=4 + 4 * (seed % 3)
        )
        for seed in range(6)
    }
    requests = [ask(stack=[(f"a{i % 6}", 1.0)], max_new_tokens=5) for i in range(24)]

    def tokens(name: str, memory: int, streams: Streams | None) -> list[list[int]]:
        config = AdapterConfig(store=tmp_path / name, device_memory=memory)
        with LiveServer(tiny_llama, engine=ROOMY, adapters=config, streams=streams) as live:
            live.upload_all(folders)
            with ThreadPoolExecutor(12) as callers:
                replies = list(callers.map(live.client.generate, requests))
            live.assert_idle()
            sizes.append(sum(each.nbytes for each in live.pool.stats().adapters))
            evictions.append(live.pool.stats().evictions)
            return [list(reply.token_ids) for reply in replies]

    sizes: list[int] = []
    evictions: list[int] = []
    expected = tokens("host", MIB, None)
    small = sizes[0] // 3
    assert tokens("device", small, FakeDevice(lazy=True).streams) == expected
    assert evictions[0] == 0 < evictions[1] and sizes[1] <= small


def test_an_adapter_that_moves_gives_the_same_tokens(
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    folders: dict[str, Path],
    tmp_path: Path,
    device_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three fill the device, the first and the last leave, and one of twice their size comes."""
    wide = write_lora(tmp_path / "wide", tiny_llama_shapes, seed=5, rank=16)
    config = AdapterConfig(store=tmp_path / "store", device_memory=3 * device_bytes)
    moved: list[int] = []
    move = DeviceArena.move

    def record(self: DeviceArena, moves: Sequence[Move]) -> None:
        moved.append(len(moves))
        move(self, moves)

    monkeypatch.setattr(DeviceArena, "move", record)
    streams = FakeDevice(lazy=True).streams
    with LiveServer(tiny_llama, engine=ROOMY, adapters=config, streams=streams) as live:
        live.upload_all({name: folders[name] for name in NAMES} | {"wide": wide})
        for name in NAMES:
            live.client.load(name)
        expected = [live.client.generate(ask(stack=[(name, 1.0)])).token_ids for name in NAMES]
        assert expected[0] != expected[1] != expected[2]
        for name in ("a", "c"):
            live.client.unload(name)
        assert not moved
        live.client.load("wide")
        assert moved == [1]
        assert live.client.generate(ask(stack=[("b", 1.0)])).token_ids == expected[1]
        assert live.client.get_adapter("b").residency == Adapter.DEVICE
        live.assert_idle()


def test_the_log_says_how_the_store_was_found(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "ids").mkdir()
    (tmp_path / "ids" / "broken.json").write_text("?")
    with (
        caplog.at_level(logging.INFO),
        LiveServer(tiny_llama, engine=ROOMY, adapters=AdapterConfig(store=tmp_path)),
    ):
        (line,) = (record for record in caplog.records if record.msg.startswith("store "))
    assert line.levelno == logging.WARNING
    assert "broken.json" in line.getMessage()


def test_a_start_is_told_and_an_orderly_store_is_not(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        caplog.at_level(logging.INFO),
        LiveServer(tiny_llama, engine=ROOMY, adapters=AdapterConfig(store=tmp_path)),
    ):
        messages = [record.getMessage() for record in caplog.records]
    ours = [message for message in messages if "store" in message]
    assert len(ours) == 1
    assert ours[0].startswith("lorastack ")
    assert str(tiny_llama) in ours[0]
    assert str(tmp_path) in ours[0]
