"""Why steps run in plain torch is said: the library is not built, or the CPU cannot run it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native import build
from lorastack.kernels.native import library as native
from lorastack.kernels.native.library import Isa, missing
from lorastack.startup import model

ENGINE = EngineConfig(kv_memory=MIB)

LOAD = native._load


def only(monkeypatch: pytest.MonkeyPatch, *found: Isa, built: bool = True) -> None:
    monkeypatch.setattr(native, "_load", (lambda path: (object(), "")) if built else LOAD)
    monkeypatch.setattr(build, "LIBRARY", Path("/nowhere.so"))
    monkeypatch.setattr(native, "supported", lambda isa: isa in found)


def test_each_reason_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    only(monkeypatch, built=False)
    assert "python -m lorastack.kernels.native.build" in missing(torch.float32)
    only(monkeypatch)
    assert missing(torch.bfloat16) == missing(torch.float32) == "this CPU lacks AVX512"
    only(monkeypatch, Isa.AVX512)
    assert missing(torch.float32) == ""
    assert "AVX512-BF16" in missing(torch.bfloat16)
    assert "float16" in missing(torch.float16)


def test_a_start_says_why_it_is_slow(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tiny_llama: Path
) -> None:
    only(monkeypatch)
    with caplog.at_level(logging.INFO, "lorastack.startup.model"):
        model.load_model(ModelConfig(model=str(tiny_llama)), ENGINE, MIB)
    wanted = "this CPU lacks AVX512: steps run in plain torch (float32)"
    assert [wanted in record.getMessage() for record in caplog.records].count(True) == 1
    caplog.clear()
    model.load_model(ModelConfig(model=str(tiny_llama), backend="torch"), ENGINE, MIB)
    assert "AVX512" not in caplog.text  # it was asked for
    with pytest.raises(InvalidArgumentError, match=r"--backend native: this CPU lacks AVX512"):
        model.load_model(ModelConfig(model=str(tiny_llama), backend="native"), ENGINE, MIB)
    only(monkeypatch, built=False)
    with pytest.raises(InvalidArgumentError, match=r"--backend native: .* not built"):
        model.load_model(ModelConfig(model=str(tiny_llama), backend="native"), ENGINE, MIB)
