"""Live servers on the tiny model, with adapters that say who they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorastack.config import KIB, MIB, AdapterConfig, EngineConfig
from lorastack.layout import ModelShapes
from tests.helpers.live import ROOMY, LiveServer
from tests.helpers.zoo import build_zoo

# 22 pages for 8 rows and room for a few adapters only: rows preempt, adapters come and go.
TIGHT = EngineConfig(kv_memory=22 * 16 * KIB, max_rows=8, max_step_tokens=24, max_nodes=6)
TIGHT_ADAPTERS = 160 * KIB

StartServer = Callable[..., LiveServer]


@pytest.fixture(scope="session")
def zoo(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    """Adapter id -> folder."""
    return build_zoo(tmp_path_factory.mktemp("zoo"), tiny_llama, tiny_llama_shapes)


@pytest.fixture(scope="session")
def live(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """One server with the whole zoo, shared: leave its adapters as they are."""
    store = tmp_path_factory.mktemp("live") / "store"
    with LiveServer(tiny_llama, engine=ROOMY, adapters=AdapterConfig(store=store)) as server:
        server.upload_all(zoo)
        yield server


@pytest.fixture(scope="session")
def tight(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """The same with so little memory that rows are preempted and adapters evicted all the time."""
    adapters = AdapterConfig(
        store=tmp_path_factory.mktemp("tight") / "store",
        device_memory=TIGHT_ADAPTERS,
        host_memory=2 * TIGHT_ADAPTERS,
    )
    with LiveServer(tiny_llama, engine=TIGHT, adapters=adapters) as server:
        server.upload_all(zoo)
        yield server


@pytest.fixture
def start(tmp_path: Path, tiny_llama: Path) -> Iterator[StartServer]:
    """Starts a server of the test's own: start(max_rows=1, ...), fields of EngineConfig."""
    servers: list[LiveServer] = []

    def build(device_memory: int = MIB, **engine: int) -> LiveServer:
        config = EngineConfig(**({"kv_memory": 16 * MIB} | engine))
        store = AdapterConfig(store=tmp_path / "store", device_memory=device_memory)
        servers.append(LiveServer(tiny_llama, engine=config, adapters=store).__enter__())
        return servers[-1]

    yield build
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def nothing_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """After every test the shared servers hold no row, no page and no pin (invariant I6)."""
    yield
    for name in ("live", "tight"):
        if name in request.fixturenames:
            request.getfixturevalue(name).assert_idle()
