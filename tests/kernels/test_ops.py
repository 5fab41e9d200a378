"""Which ops a model gets. What they compute is tested beside each kernel."""

from __future__ import annotations

import pytest
import torch

from lorastack.kernels import ops as module
from lorastack.kernels.native import isa as isa_module
from lorastack.kernels.native.isa import Isa
from lorastack.kernels.ops import NativeOps, Ops, fastest_ops
from lorastack.kernels.sample import Sample
from lorastack.request import SamplingParams

CPU = torch.device("cpu")
HERE = (Isa.AVX512_BF16, Isa.AVX512, Isa.AVX2, Isa.PLAIN)


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has AVX512-BF16 but no AMX."""
    monkeypatch.setattr(isa_module, "supported", HERE.__contains__)


@pytest.mark.usefixtures("able")
@pytest.mark.parametrize(
    ("dtype", "hidden_size", "heads"),
    [
        (torch.bfloat16, 64, Isa.AVX512_BF16),
        (torch.float32, 64, Isa.AVX512),
        (torch.float16, 64, None),
        (torch.float32, 40, None),
    ],
    ids=str,
)
def test_native_ops_take_what_the_library_has(
    dtype: torch.dtype, hidden_size: int, heads: Isa | None
) -> None:
    ops = fastest_ops(dtype, hidden_size, CPU)
    assert isinstance(ops, NativeOps) and (ops._isa, ops._heads) == (Isa.AVX512, heads)


@pytest.mark.usefixtures("able")
def test_native_ops_use_nothing_better_than_they_may() -> None:
    for at_most, isa, heads in (
        (Isa.AVX512_BF16, Isa.AVX512, Isa.AVX512_BF16),
        (Isa.AVX512, Isa.AVX512, Isa.AVX512),
        (Isa.AVX2, Isa.AVX2, Isa.AVX2),
    ):
        ops = fastest_ops(torch.bfloat16, 64, CPU, at_most)
        assert isinstance(ops, NativeOps) and (ops._isa, ops._heads) == (isa, heads)


@pytest.mark.usefixtures("able")
def test_float64_and_other_devices_are_left_to_torch() -> None:
    assert type(fastest_ops(torch.float64, 64, CPU)) is Ops
    assert type(fastest_ops(torch.float32, 64, torch.device("cuda"))) is Ops


def test_without_a_library_all_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa_module, "supported", lambda isa: False)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert type(fastest_ops(dtype, 64, CPU)) is Ops


def test_native_ops_leave_typical_tokens_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And greedy ones to nobody; tokens come in the order that they were asked for in."""
    monkeypatch.setattr(module, "sample_native", lambda *args: [s.row + 100 for s in args[-1]])
    monkeypatch.setattr(module, "sample_torch", lambda _, samples: [s.row + 200 for s in samples])
    greedy, plain = SamplingParams(), SamplingParams(temperature=1.0)
    typical = SamplingParams(temperature=1.0, typical_p=0.5)
    params = [typical, greedy, plain, plain, typical, greedy]
    samples = [Sample(row, each, 0) for row, each in enumerate(params)]
    logits_XV, best_X = torch.zeros(6, 9), [10, 11, 12, 13, 14, 15]
    drawn = NativeOps(Isa.PLAIN, None).sample(logits_XV, best_X, samples)
    assert drawn == [200, 11, 102, 103, 204, 15]
