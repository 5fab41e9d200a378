"""A model from flags to Triton's backend, in the interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.startup.model import load_model
from tests.helpers.tiny import build_llama
from tests.helpers.triton_world import SMALL

ENGINE = EngineConfig(kv_memory=MIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("models") / "tiny", **SMALL)


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_it_is_bfloat16_and_may_be_quantised(
    folder: Path, device: torch.device, quantize: str | None
) -> None:
    config = ModelConfig(model=str(folder), device=device.type, backend="triton", quantize=quantize)
    backend = load_model(config, ENGINE, MIB).backend
    assert (backend.name, backend.dtype) == ("triton", torch.bfloat16)
    assert backend.quantization == (quantize or "")


def test_what_it_cannot_run_is_refused_by_name(folder: Path, device: torch.device) -> None:
    config = ModelConfig(model=str(folder), device=device.type, backend="triton", dtype="float16")
    with pytest.raises(InvalidArgumentError, match="not float16"):
        load_model(config, ENGINE, MIB)
