"""Canary adapters, and the configuration of servers that are treated badly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorastack.client import uploading
from lorastack.config import (
    MIB,
    AdapterConfig,
    EngineConfig,
    ModelConfig,
    ServerConfig,
    ServiceConfig,
)
from lorastack.layout import ModelShapes
from tests.helpers.canary import write_canary

CANARIES = ("owl", "fjord", "bat", "mink", "zephyr")
Configure = Callable[..., ServerConfig]


@pytest.fixture(scope="session")
def canaries(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    """Word -> folder of the LoRA that says it for ever."""
    root = tmp_path_factory.mktemp("canaries")
    return {
        word: write_canary(root / word, tiny_llama, tiny_llama_shapes, word) for word in CANARIES
    }


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of servers that are gone for good give up soon."""
    monkeypatch.setattr(uploading, "RETRY_DELAYS", (0.001, 0.001))


@pytest.fixture
def configure(tmp_path: Path, tiny_llama: Path) -> Configure:
    """A small server of the test's own: configure(device_memory=...), fields of AdapterConfig."""

    def build(**adapters: Any) -> ServerConfig:
        return ServerConfig(
            model=ModelConfig(model=str(tiny_llama), device="cpu", dtype="float32"),
            engine=EngineConfig(kv_memory=8 * MIB, max_rows=8),
            adapters=AdapterConfig(store=tmp_path / "store", **adapters),
            service=ServiceConfig(port=0, drain_timeout=5.0),
        )

    return build
