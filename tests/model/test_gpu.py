"""The torch backend on a GPU: the tokens of a CPU, and one wait a step."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, Outputs, RowSpan
from lorastack.model.kv import KVCache
from tests.helpers.tiny import VOCAB_SIZE

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PAGE, NUM_PAGES = 16, 40
PROMPTS = (40, 9, 70)  # tokens
TREE = (-1, 0, 0, 1)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def load(folder: Path, device: torch.device, dtype: torch.dtype) -> Backend:
    return load_backend(folder, device=device, dtype=dtype, max_context=None, native=False)


def cache(backend: Backend) -> KVCache:
    kv = backend.make_kv(NUM_PAGES, PAGE)
    kv.data.fill_(torch.nan)
    return kv


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist()


def table(row: int) -> range:
    return range(8 * row, 8 * row + 8)


def read_prompts(backend: Backend, kv: KVCache) -> Outputs:
    ids = [token for row, count in enumerate(PROMPTS) for token in tokens(count, row)]
    rows, start = [], 0
    for row, count in enumerate(PROMPTS):
        rows.append(RowSpan(start, start + count, table(row), 0))
        start += count
    return backend.forward(ForwardBatch(ids, tuple(rows), range(start)), kv)


def decoding() -> ForwardBatch:
    """A single token, a tree, and a chunk behind a prompt."""
    rows, start = [], 0
    for row, (count, parents) in enumerate(((1, None), (4, TREE), (5, None))):
        rows.append(RowSpan(start, start + count, table(row), PROMPTS[row], parents))
        start += count
    return ForwardBatch(tokens(start, 9), tuple(rows), range(start))


def run(backend: Backend) -> list[Tensor]:
    """The logits of a step of prompts, and of one behind it."""
    kv = cache(backend)
    with torch.inference_mode():
        steps = [read_prompts(backend, kv), backend.forward(decoding(), kv)]
    for step in steps:
        assert step.logits_XV.dtype == torch.float32
        assert torch.equal(step.best_X, step.logits_XV.argmax(-1).cpu())
    return [step.logits_XV.cpu() for step in steps]


def test_float32_is_what_a_cpu_computes(tiny_mistral: Path) -> None:
    for found, expected in zip(
        run(load(tiny_mistral, CUDA, torch.float32)),
        run(load(tiny_mistral, CPU, torch.float32)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, atol=3e-4, rtol=1e-4)


def test_logits_of_bfloat16_are_not_rounded(tiny_mistral: Path) -> None:
    logits_XV, _ = run(load(tiny_mistral, CUDA, torch.bfloat16))
    assert not torch.equal(logits_XV, logits_XV.bfloat16().float())


def test_rows_of_lm_head_are_gathered_on_the_device(tiny_llama: Path) -> None:
    ids, out = [5, 0, VOCAB_SIZE - 1], []
    for device in (CUDA, CPU):
        backend = load(tiny_llama, device, torch.bfloat16)
        rows_NH = torch.empty(3, backend.shapes.hidden_size, dtype=torch.bfloat16, device=device)
        backend.head_rows(ids, rows_NH)
        out.append(rows_NH.cpu())
    assert torch.equal(*out)


@pytest.mark.parametrize("wanted", [range(10), range(0)], ids=["decoding", "a prompt's chunk"])
def test_the_host_waits_once_a_step(tiny_mistral: Path, wanted: range) -> None:
    backend = load(tiny_mistral, CUDA, torch.float32)
    kv, step = cache(backend), decoding()
    batch = ForwardBatch(step.token_ids, step.rows, wanted)
    with torch.inference_mode():
        read_prompts(backend, kv)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as waits:
                warnings.simplefilter("always")
                backend.forward(batch, kv)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len([each for each in waits if "synchroniz" in str(each.message)]) == 1
