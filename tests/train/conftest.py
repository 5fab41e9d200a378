"""A store for the tiny model, and its engine in this process."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.formats.validate import Validator
from lorastack.adapters.store.manifest import FileSpec
from lorastack.adapters.store.registry import Registry
from lorastack.config import KIB, MIB, AdapterConfig, EngineConfig, ModelConfig
from lorastack.layout import EMBED, LAYER_TARGETS, LM_HEAD, ModelShapes
from lorastack.startup.files import ModelFiles
from lorastack.train import pipeline
from lorastack.train.local import LocalEngine, open_engine
from tests.helpers.adapters import write_lora
from tests.helpers.costs import cheap_drafts
from tests.helpers.guessing import train_heads

FAMILIAR = ("hello there", "1 + 1 = ", "Why? " * 9)  # what the heads know the model's outputs of
TEMPLATE = "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
# 22 pages for 8 rows: they are preempted; prompts go in chunks.
TIGHT = EngineConfig(kv_memory=22 * 16 * KIB, max_rows=8, max_step_tokens=24, max_nodes=6)
ROOMY = EngineConfig(kv_memory=16 * MIB, max_rows=8, max_step_tokens=64, max_nodes=6)

OpenTiny = Callable[..., AbstractContextManager[LocalEngine]]


@pytest.fixture(scope="session")
def adapter_folders(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> dict[str, Path]:
    """Adapter id -> folder."""
    root, shapes = tmp_path_factory.mktemp("adapters"), tiny_llama_shapes
    everything = (*LAYER_TARGETS, EMBED, LM_HEAD)
    folders = {
        "lora-a": write_lora(root / "lora-a", shapes, seed=11),
        "lora-b": write_lora(root / "lora-b", shapes, seed=12, rank=3, targets=everything),
        "loud": write_lora(root / "loud", shapes, seed=13, rank=4),
        "heads": train_heads(root / "heads", tiny_llama, FAMILIAR, steps=6),
        "both": root / "both",
    }
    (folders["loud"] / "chat_template.jinja").write_text(TEMPLATE)
    folders["both"].mkdir()
    parts = [{"lora_id": "lora-a", "scale": 1.0}, {"lora_id": "lora-b", "scale": 0.5}]
    alias = json.dumps({"loras": parts, "medusa_id": "heads"})
    (folders["both"] / "alias.json").write_text(alias)
    return folders


@pytest.fixture(scope="session")
def store(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_llama: Path,
    tiny_llama_shapes: ModelShapes,
    adapter_folders: dict[str, Path],
) -> Path:
    """A store with all of them, and the heads as its default."""
    root = tmp_path_factory.mktemp("store") / "store"
    files = ModelFiles(tiny_llama)
    validate = Validator(
        shapes=tiny_llama_shapes, base_names=("tiny",), base_weight=files.base_weight
    )
    registry = Registry(root)
    for adapter_id, folder in adapter_folders.items():
        data = {path.name: path.read_bytes() for path in folder.iterdir()}
        specs = {
            name: FileSpec(name=name, size=len(content), sha256=hashlib.sha256(content).hexdigest())
            for name, content in data.items()
        }
        upload = registry.begin_upload(adapter_id, list(specs.values()))
        for name, spec in specs.items():
            if spec.sha256 in upload.needed:
                upload.write(spec.sha256, 0, data[name])
        upload.commit(validate, base_fingerprint=files.fingerprint())
    registry.set_default_medusa("heads")
    registry.close()
    return root


@pytest.fixture(scope="session")
def open_tiny(tiny_llama: Path, store: Path) -> OpenTiny:
    """open_tiny(config, backend=..., store_at=..., ...): the tiny model's engine, in float32.

    Drafts cost next to nothing, so that whether there are any does not depend on the machine.
    """

    @contextmanager
    def opened(
        config: EngineConfig = ROOMY,
        *,
        backend: str = "auto",
        with_store: bool = True,
        store_at: Path = store,
        **model: Any,
    ) -> Iterator[LocalEngine]:
        fields = {"dtype": "float32", "device": "cpu", "threads": 1} | model
        adapters = AdapterConfig(store=store_at, device_memory=MIB, host_memory=MIB)
        with (
            cheap_drafts(),
            open_engine(
                ModelConfig(model=str(tiny_llama), backend=backend, **fields),
                config,
                adapters if with_store else None,
            ) as engine,
        ):
            yield engine

    return opened


@pytest.fixture(scope="module")
def cheap_steps() -> Iterator[None]:
    """What is drafted depends on the text alone, not on what steps cost here."""
    with cheap_drafts():
        yield


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if a model is loaded."""

    def loads(*_: Any) -> Any:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(pipeline, "open_engine", loads)
