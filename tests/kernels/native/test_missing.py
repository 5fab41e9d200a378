"""Why steps run in plain torch is said: there is no library, or it has nothing for the model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from lorastack.config import MIB, EngineConfig, ModelConfig
from lorastack.errors import InvalidArgumentError
from lorastack.kernels.native import build
from lorastack.kernels.native import isa as isa_module
from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa, missing
from lorastack.startup import model

ENGINE = EngineConfig(kv_memory=MIB)
FLOAT16 = "there are no native kernels for float16"


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without a library."""
    monkeypatch.setattr(build, "LIBRARY", Path("/nowhere.so"))
    monkeypatch.setattr(isa_module, "supported", isa_module.supported.__wrapped__)


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with one, of which nothing is called."""
    monkeypatch.setattr(native, "_load", lambda path: (object(), ""))
    monkeypatch.setattr(isa_module, "supported", (Isa.AVX2, Isa.PLAIN).__contains__)


@pytest.mark.usefixtures("unbuilt")
def test_without_a_library_it_is_said_how_to_make_one() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert "python -m lorastack.kernels.native.build" in missing(dtype)


@pytest.mark.usefixtures("built")
def test_a_library_has_all_but_float16() -> None:
    assert missing(torch.float32) == missing(torch.bfloat16) == ""
    assert missing(torch.float16) == FLOAT16


@pytest.mark.usefixtures("built")
def test_a_start_says_why_it_is_slow(caplog: pytest.LogCaptureFixture, tiny_llama: Path) -> None:
    def load(**fields: str) -> None:
        model.load_model(ModelConfig(model=str(tiny_llama), dtype="float16", **fields), ENGINE, MIB)

    with caplog.at_level(logging.INFO, "lorastack.startup.model"):
        load()
    wanted = f"{FLOAT16}: steps run in plain torch (float16)"
    assert [wanted in record.getMessage() for record in caplog.records].count(True) == 1
    caplog.clear()
    load(backend="torch")
    assert "native" not in caplog.text  # it was asked for
    with pytest.raises(InvalidArgumentError, match=f"--backend native: {FLOAT16}"):
        load(backend="native")


@pytest.mark.usefixtures("unbuilt")
def test_native_kernels_that_are_asked_for_must_be_there(tiny_llama: Path) -> None:
    for option, value in (("backend", "native"), ("isa", "avx2")):
        config = ModelConfig(model=str(tiny_llama), **{option: value})
        with pytest.raises(InvalidArgumentError, match=f"--{option} .* not built"):
            model.load_model(config, ENGINE, MIB)


@pytest.mark.usefixtures("built")
@pytest.mark.parametrize("name", ["avx512", "neon", "Avx2", "", "av\nx2"])
def test_instructions_that_are_not_here_are_refused_with_what_is(
    name: str, tiny_llama: Path
) -> None:
    config = ModelConfig(model=str(tiny_llama), isa=name)
    with pytest.raises(InvalidArgumentError, match=r"--isa .* has avx2, plain; or leave --isa out"):
        model.load_model(config, ENGINE, MIB)
