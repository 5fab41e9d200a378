"""The LoRA kernels as devices get them, for projections of Mistral-7B."""

from __future__ import annotations

import pytest
import torch

from lorastack.kernels.triton import lora
from lorastack.kernels.triton.lora_plan import PAIR_FIELDS, TILE_FIELDS, LoraArrays
from tests.helpers.compiled import ARCHITECTURES, MAX_SHARED, Compiled, Recorder

HIDDEN, KEYS, INNER, VOCABULARY = 4096, 1024, 14336, 32768
QKV = [HIDDEN, KEYS, KEYS]
STEP = LoraArrays(
    counts=torch.zeros(2, dtype=torch.int32),
    adapted_T=torch.zeros(1, dtype=torch.int32),
    tiles=torch.zeros(1, TILE_FIELDS, dtype=torch.int32),
    pairs=torch.zeros(1, PAIR_FIELDS, dtype=torch.int64),
)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(lora, "launch", recorder)
    return recorder


def check(found: Compiled, architecture: int) -> None:
    assert found.spills == 0
    assert found.registers <= 168
    assert found.shared <= MAX_SHARED[architecture]
    assert found.instructions["HMMA"] > 0
    assert found.wide_loads > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shrink(architecture: int, recorder: Recorder) -> None:
    x_TI, shrunk_CS = torch.zeros(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(4, 64)
    lora.shrink(x_TI, STEP, 0, shrunk_CS, 1)
    found = recorder.launches[0].compiled(architecture)
    check(found, architecture)
    assert found.instructions["LDGSTS"] > 0  # inputs and A are fetched ahead


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_expand(architecture: int, recorder: Recorder) -> None:
    delta_TO, shrunk_CS = torch.zeros(1, sum(QKV)), torch.zeros(4, 64)
    lora.expand(shrunk_CS, STEP, 0, QKV, HIDDEN, torch.bfloat16, delta_TO, 1)
    check(recorder.launches[0].compiled(architecture), architecture)


def test_expand_of_many_chunks(recorder: Recorder) -> None:
    delta_TO, shrunk_CS = torch.zeros(1, HIDDEN), torch.zeros(INNER // lora.CHUNK, 64)
    lora.expand(shrunk_CS, STEP, 0, [HIDDEN], INNER, torch.bfloat16, delta_TO, 1)
    check(recorder.launches[0].compiled(80), 80)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_embeddings(architecture: int, recorder: Recorder) -> None:
    token_ids_T, hidden_TH = torch.zeros(1, dtype=torch.int32), torch.zeros(1, HIDDEN)
    lora.add_embedding(token_ids_T, STEP, 0, VOCABULARY, torch.bfloat16, hidden_TH, 1)
    check(recorder.launches[0].compiled(architecture), architecture)
