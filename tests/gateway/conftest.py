"""A live server with its gateway: the tiny model, and adapters that say who they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from lorastack.config import AdapterConfig, GatewayConfig
from lorastack.layout import ModelShapes
from tests.helpers.live import ROOMY, LiveServer
from tests.helpers.zoo import build_zoo
from tests.service.conftest import (  # noqa: F401 - fixtures
    fake,
    folders,
    shapes,
    start_fake,
    tokenizer,
)

GATEWAY = GatewayConfig(port=0, adapter_management=True)


@pytest.fixture(scope="session")
def zoo(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    """Adapter id -> folder."""
    return build_zoo(tmp_path_factory.mktemp("zoo"), tiny_llama, tiny_llama_shapes)


@pytest.fixture(scope="session")
def served(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, zoo: dict[str, Path]
) -> Iterator[LiveServer]:
    """One server with the whole zoo, shared: leave its adapters as they are."""
    adapters = AdapterConfig(store=tmp_path_factory.mktemp("served") / "store")
    with LiveServer(tiny_llama, engine=ROOMY, adapters=adapters, http=GATEWAY) as server:
        server.upload_all(zoo)
        yield server


@pytest.fixture(scope="session")
def base_url(served: LiveServer) -> str:
    """Where HTTP clients find it."""
    return f"http://{served.server.http_address}"


@pytest.fixture
def http(base_url: str) -> Iterator[httpx.Client]:
    """A plain HTTP client of the gateway."""
    with httpx.Client(base_url=base_url, timeout=120) as client:
        yield client


@pytest.fixture
def client(base_url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{base_url}/v1", api_key="x", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="session")
def base(served: LiveServer) -> str:
    """The base model's name."""
    return served.client.model_info().base_model
