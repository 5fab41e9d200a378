"""The attention kernels as devices get them, for the heads of Mistral-7B and wider ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorastack.kernels.triton import attention
from lorastack.kernels.triton.attention_plan import AttentionArrays, AttentionShape
from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED, Launch, Recorder

CPU = torch.device("cpu")
MISTRAL = AttentionShape(32, 8, 128, 16, None)


def launches(
    monkeypatch: pytest.MonkeyPatch, shape: AttentionShape, dtype: torch.dtype
) -> list[Launch]:
    """Those of one call: the attention, and the sum over splits."""
    recorder = Recorder()
    monkeypatch.setattr(attention, "launch", recorder)
    lengths = AttentionArrays.lengths(1, 1, 16)
    step = AttentionArrays(
        **{name: torch.zeros(size, dtype=torch.int32) for name, size in lengths.items()}
    )
    kv = torch.zeros(1, 2, shape.num_kv_heads, shape.page_size, shape.head_dim, dtype=dtype)
    q_TX = torch.zeros(1, shape.num_heads * shape.head_dim, dtype=dtype)
    workspace = attention.AttentionWorkspace.of(shape, 1, 1, CPU)
    attention.attend(q_TX, kv, step, workspace, torch.zeros_like(q_TX), shape, 1)
    return recorder.launches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_multiprocessor_holds_three_programs(
    architecture: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = launches(monkeypatch, MISTRAL, torch.bfloat16)[0].compiled(architecture)
    assert found.spills == 0
    assert found.registers <= 168
    assert found.shared <= MAX_SHARED[80] // 2
    assert found.instructions["HMMA"] > 0
    assert found.instructions["LDGSTS"] > 0  # keys and values are fetched ahead
    assert found.wide_loads >= found.instructions["LDGSTS"]


def test_wide_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(MISTRAL, head_dim=256)
    found = launches(monkeypatch, shape, torch.bfloat16)[0].compiled(80)
    assert found.spills == 0
    assert found.shared <= MAX_SHARED[120]
    assert found.instructions["HMMA"] > 0


def test_float32_is_not_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(MISTRAL, head_dim=16)
    found = launches(monkeypatch, shape, torch.float32)[0].compiled(80)
    assert found.shared <= MAX_SHARED[120]
    assert found.instructions["HMMA"] == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_sum_over_splits(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = launches(monkeypatch, MISTRAL, torch.bfloat16)[1].compiled(architecture)
    assert found.spills == 0
    assert found.registers <= 64
