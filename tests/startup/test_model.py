"""What is decided before a weight is read, and how often a model's files are opened for it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.model import config as config_module
from lorastack.model.checkpoint import Checkpoint
from lorastack.model.weights import check_tensors
from lorastack.startup import model as model_module
from lorastack.startup.files import ModelFiles
from lorastack.startup.model import LoadedModel, load_model

SINGLE = "model.safetensors"


def load(folder: Path, kv_memory: int = MIB, **fields: str | int) -> LoadedModel:
    config = ModelConfig(model=str(folder), device="cpu", **fields)  # type: ignore[arg-type]
    return load_model(config, EngineConfig(kv_memory=kv_memory), MIB)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads a weight fails."""
    monkeypatch.setattr(Checkpoint, "read_into", None)


@pytest.fixture
def folder(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.mark.usefixtures("unread")
def test_a_backend_that_cannot_run_is_refused_before_a_weight_is_read(tiny_llama: Path) -> None:
    with pytest.raises(InvalidArgumentError, match="--backend native: "):
        load(tiny_llama, backend="native", dtype="float16")


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tensor_parallel": 3}, "--tensor-parallel 3 does not divide .*num_key_value_heads, 2"),
        ({"tensor_parallel": 2, "quantize": "int8"}, "does not go with --quantize"),
        (
            {"tensor_parallel": 2, "backend": "native"},
            "--backend native: --tensor-parallel 2 runs in torch",
        ),
    ],
)
def test_a_model_that_devices_cannot_share_is_refused_before_a_weight_is_read(
    tiny_llama: Path, fields: dict[str, str | int], words: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=words):
        load(tiny_llama, **fields)


@pytest.mark.usefixtures("unread")
def test_too_little_kv_memory_is_refused_before_a_weight_is_read(tiny_llama: Path) -> None:
    with pytest.raises(FailedPreconditionError, match="--kv-memory holds 0 pages"):
        load(tiny_llama, kv_memory=100)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize(
    ("name", "stored", "words"),
    [
        ("model.layers.0.self_attn.q_norm.weight", torch.ones(2), "q_norm.weight is not known"),
        ("model.norm.weight", None, "no tensor model.norm.weight"),
        ("model.norm.weight", torch.ones(3), "model.norm.weight has shape"),
        ("model.norm.weight", torch.ones(64, dtype=torch.int8), "model.norm.weight is I8"),
        ("lm_head.weight", torch.ones(3, 64), "lm_head.weight has shape"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_before_a_weight_is_read(
    folder: Path, name: str, stored: torch.Tensor | None, words: str
) -> None:
    tensors = load_file(folder / SINGLE)
    tensors.pop(name, None)
    if stored is not None:
        tensors[name] = stored
    save_file(tensors, folder / SINGLE)
    with pytest.raises(InvalidArgumentError, match=words):
        load(folder)


class AtOnce:
    """An executor whose jobs end within `submit`."""

    def __init__(self, num_threads: int) -> None: ...
    def __enter__(self) -> AtOnce:
        return self

    def __exit__(self, *error: object) -> None: ...
    def submit(self, job: Callable[..., Any], *args: object) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(job(*args))
        except Exception as error:
            future.set_exception(error)
        return future


def test_a_tokenizer_that_is_refused_ends_the_reading_of_the_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "tokenizer.json").write_text("{")
    monkeypatch.setattr(model_module, "ThreadPoolExecutor", AtOnce)
    reports: list[tuple[str, int, int]] = []
    config = ModelConfig(model=str(folder), device="cpu")
    with pytest.raises(InvalidArgumentError, match="tokenizer"):
        load_model(config, EngineConfig(kv_memory=MIB), MIB, lambda *report: reports.append(report))
    assert reports == []


@pytest.mark.usefixtures("unread")
def test_more_layers_than_anybody_has_are_refused_at_the_first_that_is_missing(
    folder: Path,
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2**31 - 1}))
    files = ModelFiles(folder)
    with pytest.raises(InvalidArgumentError, match=r"no tensor model\.layers\.2\."):
        check_tensors(files.checkpoint, files.config)


def test_config_and_headers_are_read_once(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(config_module, "read_object", counting("config", config_module.read_object))
    monkeypatch.setattr(Checkpoint, "__init__", counting("headers", Checkpoint.__init__))
    model = load(tiny_llama)
    model.files.base_weight("lm_head.weight")
    assert counts == {"config": 1, "headers": 1}


def test_what_is_read_later_is_no_progress_of_the_start(tiny_llama: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    config = ModelConfig(model=str(tiny_llama), device="cpu")
    model = load_model(
        config, EngineConfig(kv_memory=MIB), MIB, lambda *report: reports.append(report)
    )
    total = model.files.checkpoint.nbytes
    assert reports[-1] == ("loading the weights", total, total)
    count = len(reports)
    model.files.base_weight("lm_head.weight")
    assert len(reports) == count
