"""A CUDA device, made up: what is found, what it gets, what is left of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lorastack.config import GIB, MIB, EngineConfig, ModelConfig
from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.model.backends import load
from lorastack.startup.device import ON_CPU, ON_CUDA, device_defaults, find_device
from lorastack.startup.memory import KV_SHARE, RESERVE, available_memory, default_kv
from lorastack.startup.model import load_model
from tests.helpers.gpu import give_gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Read(Exception):
    """The weights would be read now. args: the choice."""


def test_auto_is_the_gpu_if_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU
    with pytest.raises(InvalidArgumentError, match=r"--device cuda: .*use cpu"):
        find_device("cuda")
    give_gpu(monkeypatch, GIB, GIB)
    assert find_device("auto") == find_device("cuda") == CUDA
    assert find_device("cpu") == CPU


def test_more_gpus_than_there_are_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    give_gpu(monkeypatch, GIB, GIB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert find_device("auto", 3) == CUDA
    with pytest.raises(InvalidArgumentError, match="--tensor-parallel 4: torch finds 3 CUDA dev"):
        find_device("auto", 4)
    assert find_device("cpu", 4) == CPU


def test_a_gpu_gets_more_rows_and_adapters(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_defaults(CPU) == ON_CPU
    give_gpu(monkeypatch, 139 * GIB, 140 * GIB)
    assert device_defaults(CUDA) == ON_CUDA
    give_gpu(monkeypatch, 19 * GIB, 20 * GIB)
    assert device_defaults(CUDA) == (ON_CUDA.max_rows, 2 * GIB)


def test_a_reserve_of_a_gpu_is_for_neither_weights_nor_keys(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    give_gpu(monkeypatch, 10 * GIB, 12 * GIB)
    assert available_memory(CUDA) == 10 * GIB - RESERVE
    give_gpu(monkeypatch, GIB, 12 * GIB)
    assert available_memory(CUDA) == 0


def test_keys_and_values_get_a_share_of_a_gpu() -> None:
    assert default_kv(CUDA, 100 * GIB, GIB) == int(KV_SHARE * 100 * GIB)
    assert default_kv(CUDA, -GIB, GIB) == default_kv(CPU, -GIB, GIB) == 64 * MIB
    assert default_kv(CPU, 100 * GIB, 2 * GIB) == 2 * GIB


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(checkpoint: object, config: object, choice: object) -> None:
        raise Read(choice)

    monkeypatch.setattr("lorastack.startup.model.read_backend", refuse)


@pytest.mark.usefixtures("unread")
def test_the_log_says_what_is_lossless_on_a_gpu(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    give_gpu(monkeypatch, 10 * GIB, 12 * GIB)
    caplog.set_level("INFO", "lorastack.startup.model")
    said = {}
    for dtype in ("auto", "float32", "bfloat16"):
        caplog.clear()
        with pytest.raises(Read) as read:
            load_model(ModelConfig(model=str(tiny_llama), dtype=dtype), EngineConfig(), GIB)
        (choice,) = read.value.args
        assert choice.device == CUDA and choice.lossless is (dtype != "bfloat16")
        said[dtype] = caplog.text
    assert "float32 here: bfloat16 in plain torch is not lossless" in said["auto"]
    assert "bfloat16" not in said["float32"]
    assert "8192 MiB free: weights get 0, adapters 1024, keys and values " in said["float32"]
    assert "near-tie" in said["bfloat16"]


@pytest.mark.usefixtures("unread")
def test_what_a_gpu_cannot_run_is_refused_with_a_remedy(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_gpu(monkeypatch, 10 * GIB, 12 * GIB)
    model = ModelConfig(model=str(tiny_llama), backend="native")
    with pytest.raises(InvalidArgumentError, match=r"--backend native: .*not on cuda"):
        load_model(model, EngineConfig(), GIB)
    model = ModelConfig(model=str(tiny_llama), quantize="int8")
    with pytest.raises(InvalidArgumentError, match=r"--quantize int8: .*leave it out"):
        load_model(model, EngineConfig(), GIB)


@pytest.mark.usefixtures("unread")
def test_a_gpu_without_room_is_told_of_bfloat16(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And not of weights in 8 bits, which it cannot multiply."""
    give_gpu(monkeypatch, RESERVE + 900 * MIB, 12 * GIB)
    monkeypatch.setattr(
        "lorastack.startup.model.weights_nbytes",
        lambda config, dtype, kind, device: dtype.itemsize * (100 if kind else 125) * MIB,
    )
    with pytest.raises(FailedPreconditionError, match="or --dtype bfloat16, which") as error:
        load_model(ModelConfig(model=str(tiny_llama)), EngineConfig(kv_memory=300 * MIB), 200 * MIB)
    assert "quantize" not in error.value.message


def test_a_model_on_cuda_is_made_with_exact_sums(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's settings are the process's: they are put back."""
    matmul, cuda = torch.backends.cuda.matmul, torch.backends.cuda
    names = ["allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction"]
    before = [getattr(matmul, name) for name in names]
    cudnn = cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    choice = SimpleNamespace(
        device=CUDA, dtype=torch.float32, kind=None, isa=None, native=False, shards=1, triton=False
    )
    files = load.Checkpoint(tiny_llama), load.load_config(tiny_llama, None)
    monkeypatch.setattr(load.TorchBackend, "load", lambda *args: args)
    try:
        load.read_backend(*files, choice)  # type: ignore[arg-type]
        assert not cuda.cudnn_sdp_enabled()
        assert not any(getattr(matmul, name) for name in names)
        assert not matmul.allow_tf32 and not torch.backends.cudnn.allow_tf32
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)
        cuda.enable_cudnn_sdp(cudnn[0])
        torch.backends.cudnn.allow_tf32 = cudnn[1]
