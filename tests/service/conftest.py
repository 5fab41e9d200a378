"""A tiny tokenizer and the real edge around a fake engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from lorastack.adapters.store.registry import Registry
from lorastack.client import Client
from lorastack.layout import ModelShapes
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.adapters import write_heads, write_lora
from tests.service.fakes import RunningServer, store

StartFake = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def tokenizer(tiny_llama: Path) -> Tokenizer:
    return Tokenizer.load(tiny_llama)


@pytest.fixture(scope="session")
def shapes(tiny_llama_shapes: ModelShapes) -> ModelShapes:
    return tiny_llama_shapes


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory, shapes: ModelShapes) -> dict[str, Path]:
    """Adapter folders by id."""
    root = tmp_path_factory.mktemp("adapters")
    bundle = write_lora(root / "bundle", shapes, targets=("q_proj",), seed=3)
    heads = write_heads(root / "heads", shapes.hidden_size)
    for name in ("config.json", "medusa_lm_head.safetensors"):
        (bundle / name).write_bytes((heads / name).read_bytes())
    chatty = write_lora(root / "chatty", shapes, targets=("q_proj",), seed=4)
    (chatty / "chat_template.jinja").write_text("{{ messages[-1]['content'] | upper }}")
    return {
        "lora": write_lora(root / "lora", shapes, targets=("q_proj",), seed=1),
        "other": write_lora(root / "other", shapes, targets=("v_proj",), seed=2),
        "heads": heads,
        "bundle": bundle,
        "chatty": chatty,
    }


@pytest.fixture(scope="module")
def registry(
    tmp_path_factory: pytest.TempPathFactory, shapes: ModelShapes, folders: Mapping[str, Path]
) -> Registry:
    registry = Registry(tmp_path_factory.mktemp("registry") / "store")
    for name, folder in folders.items():
        store(registry, name, folder, shapes)
    store(registry, "copy-of-lora", folders["lora"], shapes)
    return registry


@pytest.fixture
def start_fake(tmp_path: Path, tokenizer: Tokenizer, shapes: ModelShapes) -> Iterator[StartFake]:
    """start_fake(store=..., **options of FakeServer): a running server, stopped after the test."""
    running: list[RunningServer] = []

    def start(store: Path | None = None, **options: object) -> RunningServer:
        if store is None:
            store = tmp_path / f"store{len(running)}"
        server = RunningServer(store, tokenizer, shapes, **options)
        running.append(server.__enter__())
        return running[-1]

    yield start
    for server in running:
        server.__exit__(None, None, None)


@pytest.fixture
def fake(start_fake: StartFake) -> RunningServer:
    return start_fake()


@pytest.fixture
def client(fake: RunningServer) -> Iterator[Client]:
    with Client(fake.address) as client:
        yield client
