"""What a machine has left, and the refusal of models that need more."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.config import GIB, MIB, EngineConfig, ModelConfig
from lorastack.errors import FailedPreconditionError
from lorastack.kernels.quantize import Kind
from lorastack.model.backends.load import load_backend
from lorastack.model.config import load_config
from lorastack.model.kv import page_nbytes
from lorastack.model.size import weights_nbytes
from lorastack.startup import model
from lorastack.startup.memory import Demand, check_fits, host_memory, pinned_memory

SIZES = st.integers(0, 64 * GIB)
CPU = torch.device("cpu")


@given(SIZES, SIZES, SIZES, SIZES)
def test_a_demand_passes_exactly_when_it_is_available(
    weights: int, kv: int, adapters: int, available: int
) -> None:
    demand = Demand(weights=weights, kv=kv, adapters=adapters)
    if weights + kv + adapters <= available:
        check_fits(demand, available, {})
    else:
        with pytest.raises(FailedPreconditionError):
            check_fits(demand, available, {})


def test_half_of_what_a_host_has_is_page_locked_at_most(caplog: pytest.LogCaptureFixture) -> None:
    assert pinned_memory(8 * GIB, None) == pinned_memory(8 * GIB, 16 * GIB) == 8 * GIB
    assert not caplog.text
    assert pinned_memory(8 * GIB, 10 * GIB) == 5 * GIB
    assert "--host-adapter-memory: 8.0 GiB" in caplog.text and "get 5.0 GiB" in caplog.text


@given(SIZES, SIZES, SIZES, SIZES, SIZES)
def test_each_advice_would_do(
    weights: int, kv: int, adapters: int, available: int, smaller: int
) -> None:
    """Followed by what `--kv-memory 5MiB` and the like say, the same check passes."""
    demand = Demand(weights=weights, kv=kv, adapters=adapters)
    try:
        check_fits(demand, available, {"--quantize int8": smaller})
        return
    except FailedPreconditionError as error:
        advice = error.message.rpartition(": ")[2].split(", or ")
    for each in advice:
        if each.startswith("take a smaller model"):
            assert len(advice) == 1
            continue
        words = each.split()
        given = dict(pairwise(words))
        check_fits(
            Demand(
                weights=smaller if "--quantize" in given else weights,
                kv=_bytes(given.get("--kv-memory"), kv),
                adapters=_bytes(given.get("--device-adapter-memory"), adapters),
            ),
            available,
            {},
        )


def _bytes(text: str | None, otherwise: int) -> int:
    return otherwise if text is None else int(text.removesuffix("MiB")) * MIB


def test_the_refusal_names_sizes_and_what_would_do() -> None:
    demand = Demand(weights=14 * GIB, kv=4 * GIB, adapters=2 * GIB)
    with pytest.raises(FailedPreconditionError) as error:
        check_fits(demand, 17 * GIB, {"--quantize int8": 8 * GIB, "--quantize int4": 12 * GIB})
    assert error.value.message == (
        "the weights take 14.0 GiB, --kv-memory 4.0 GiB and --device-adapter-memory 2.0 GiB, "
        "20.0 GiB together, but 17.0 GiB are available here: give --kv-memory 1024MiB, or "
        "--quantize int8, which needs 14.0 GiB in all"
    )
    with pytest.raises(
        FailedPreconditionError, match="take a smaller model or a machine with more"
    ):
        check_fits(demand, 3 * GIB, {"--quantize int8": 8 * GIB})


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": "MemTotal: 999 kB\nMemAvailable: 500 kB\n", **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = "sys/fs/cgroup"
V1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 500 * 1024),
        # Version 2: the tightest of the cgroups on the way up; memory of files can go.
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/memory.max": "300000\n",
                f"{V2}/a/memory.current": "250000\n",
                f"{V2}/a/memory.stat": "anon 1\nactive_file 10000\ninactive_file 20000\n",
                f"{V2}/a/b/memory.max": "max\n",
                f"{V2}/a/b/memory.current": "250000\n",
            },
            80000,
        ),
        # A container sees its own cgroup at the top, under whatever path the host gave it.
        (
            {
                "proc/self/cgroup": "0::/system.slice/docker-1\n",
                f"{V2}/memory.max": "100000\n",
                f"{V2}/memory.current": "40000\n",
                f"{V2}/memory.stat": "",
            },
            60000,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/x\n0::/\n",
                f"{V1}/x/memory.limit_in_bytes": "90000\n",
                f"{V1}/x/memory.usage_in_bytes": "95000\n",
                f"{V1}/x/memory.stat": "active_file 1\ntotal_active_file 8000\n",
            },
            3000,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/x\n",
                f"{V1}/x/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/x/memory.usage_in_bytes": "95000\n",
            },
            500 * 1024,
        ),
    ],
)
def test_what_the_host_has_left(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    assert host_memory(machine(tmp_path, files)) == expected


def test_a_system_that_says_nothing_is_not_asked(tmp_path: Path) -> None:
    assert host_memory(tmp_path) is None
    found = host_memory()
    assert found is None or 0 < found < 1 << 50


@pytest.mark.parametrize("quantize", [None, "int8"])
def test_a_model_that_does_not_fit_is_refused_before_it_is_read(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, quantize: str | None
) -> None:
    monkeypatch.setattr(model, "available_memory", lambda device: 3 * GIB)
    monkeypatch.setattr(model, "read_backend", None)
    config = ModelConfig(model=str(tiny_llama), device="cpu", quantize=quantize)
    with pytest.raises(FailedPreconditionError, match=r"2\.5 GiB.*give --kv-memory 2\d{3}MiB"):
        model.load_model(config, EngineConfig(kv_memory=5 * GIB // 2), adapter_memory=GIB)


@pytest.mark.parametrize(("left", "expected"), [(9, 4 * GIB), (3, 2 * GIB)])
def test_what_is_left_is_for_keys_and_values(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, left: int, expected: int
) -> None:
    monkeypatch.setattr(model, "available_memory", lambda device: left * GIB)
    config = ModelConfig(model=str(tiny_llama), device="cpu")
    loaded = model.load_model(config, EngineConfig(), adapter_memory=GIB)
    assert loaded.kv_memory == pytest.approx(expected, rel=0.01)


def test_memory_counts_for_each_of_the_devices_that_share_a_model(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes on a CPU share its memory; a page holds a device's part of the heads."""
    monkeypatch.setattr(model, "available_memory", lambda device: 6 * GIB)
    monkeypatch.setattr(model, "read_backend", lambda *_: one)
    one = load_backend(tiny_llama, device=CPU, dtype=torch.float32, max_context=None, native=False)
    config = ModelConfig(model=str(tiny_llama), device="cpu", tensor_parallel=2)
    with pytest.raises(FailedPreconditionError, match=r"3\.0 GiB are available for each of 2 dev"):
        model.load_model(config, EngineConfig(kv_memory=5 * GIB // 2), adapter_memory=GIB)
    loaded = model.load_model(config, EngineConfig(), adapter_memory=GIB)
    assert loaded.kv_memory == pytest.approx(2 * GIB, rel=0.01)
    assert loaded.num_pages == loaded.kv_memory * 2 // page_nbytes(one.shapes, 16, torch.float32)


@pytest.mark.parametrize("kind", [None, *Kind])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("native", [True, False])
def test_the_size_of_weights_is_what_the_decoder_holds(
    tiny_mistral: Path, kind: Kind | None, dtype: torch.dtype, native: bool
) -> None:
    """Within padding (to 32 rows), norms and the matrix that is on its way."""
    config = load_config(tiny_mistral, None)
    decoder = load_backend(
        tiny_mistral, device=CPU, dtype=dtype, max_context=None, native=native, quantize=kind
    )
    held = _tensor_bytes(decoder._weights)  # type: ignore[attr-defined]
    shapes = config.shapes
    largest = max(shapes.vocab_size, 2 * shapes.intermediate_size) * shapes.hidden_size
    estimate = weights_nbytes(config, dtype, kind, CPU) - largest * dtype.itemsize
    assert held == pytest.approx(estimate, rel=0.2)


def _tensor_bytes(held: object) -> int:
    if isinstance(held, torch.Tensor):
        return held.numel() * held.element_size()
    parts = held if isinstance(held, tuple) else getattr(held, "__slots__", ())
    values = parts if isinstance(held, tuple) else [getattr(held, name) for name in parts]
    return sum(_tensor_bytes(value) for value in values)
