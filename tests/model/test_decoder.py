"""The decoder against transformers on the same tiny weights, and its trees and pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from lorastack.kernels.native import isa
from lorastack.kernels.ops import NativeOps, Ops
from lorastack.lora.segments import LoraBatch
from lorastack.model.backends.base import Backend
from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, RowSpan
from lorastack.model.kv import KVCache, Move
from tests.helpers.tiny import VOCAB_SIZE, build_llama, build_mistral

CPU = torch.device("cpu")
PAGE, NUM_PAGES = 4, 128
TOLERANCE = {"atol": 3e-4, "rtol": 1e-4}
NO_LORA = LoraBatch()

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "untied": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "no-gqa": {"num_key_value_heads": 4},
    "one-kv-head": {"num_key_value_heads": 1},
    "head-dim": {"head_dim": 24},
    "sharded": {"max_shard_size": "100KB"},
    "linear": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        "max_position_embeddings": 32,
    },
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "llama3": {"rope_parameters": LLAMA3},
    "yarn": {"rope_parameters": YARN},
    "mistral": {"mistral": True},
    "mistral-full": {"mistral": True, "sliding_window": None},
}


def build(folder: Path, *, mistral: bool = False, **overrides: Any) -> Path:
    return (build_mistral if mistral else build_llama)(folder, **overrides)


def load(folder: Path) -> Backend:
    return load_backend(folder, device=CPU, dtype=torch.float32, max_context=None)


def cache(decoder: Backend) -> KVCache:
    kv = decoder.make_kv(NUM_PAGES, PAGE)
    kv.data.fill_(torch.nan)  # what an earlier owner left must not matter
    return kv


def shuffled_pages(seed: int = 0) -> list[int]:
    pages = list(range(NUM_PAGES))
    random.Random(seed).shuffle(pages)
    return pages


def tokens(count: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE, (count,), generator=generator).tolist()


def run(decoder: Backend, kv: KVCache, ids: list[int], *rows: RowSpan) -> Tensor:
    """[T, V] of one step."""
    return decoder.forward(ForwardBatch(ids, rows, range(len(ids))), kv).logits_XV


def transformers_logits(folder: Path, ids: list[int]) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
    return logits


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


def test_prefill_chunks_and_decode_equal_transformers(folder: Path):
    """One prompt three ways: at once, in chunks, in chunks and then token by token."""
    ids = tokens(70)
    expected = transformers_logits(folder, ids)
    decoder = load(folder)
    whole = run(decoder, cache(decoder), ids, RowSpan(0, 70, shuffled_pages(), 0))
    torch.testing.assert_close(whole, expected, **TOLERANCE)

    kv, pages = cache(decoder), shuffled_pages(1)
    ends = [1, 12, 13, 30, 49, *range(50, 71)]
    parts = [
        run(decoder, kv, ids[start:end], RowSpan(0, end - start, pages, start))
        for start, end in zip([0, *ends], ends, strict=False)
    ]
    torch.testing.assert_close(torch.cat(parts), expected, **TOLERANCE)


@pytest.mark.parametrize("start", [20, 32, 33, 60])
def test_dynamic_rope_follows_the_text_as_it_is_generated(tmp_path: Path, start: int):
    """Beyond the length before scaling a prompt has frequencies of its own, and so has each token
    behind it. start: tokens of the prompt."""
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    folder = build_llama(tmp_path / "model", rope_parameters=rope, max_position_embeddings=32)
    ids = tokens(70)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        step = model(torch.tensor([ids[:start]]), use_cache=True)
        expected = [step.logits[0]]
        for token in ids[start:]:
            past = step.past_key_values
            step = model(torch.tensor([[token]]), past_key_values=past, use_cache=True)
            expected.append(step.logits[0])
    decoder = load(folder)
    assert decoder.shapes.max_context == 128
    whole = run(decoder, cache(decoder), ids, RowSpan(0, 70, shuffled_pages(), 0, None, start))
    torch.testing.assert_close(whole, torch.cat(expected), **TOLERANCE)
    kv, pages = cache(decoder), shuffled_pages(1)
    parts = [
        run(decoder, kv, ids[begin:end], RowSpan(0, end - begin, pages, begin, None, start))
        for begin, end in ((0, 25), (25, 50), (50, 70))
    ]
    torch.testing.assert_close(torch.cat(parts), torch.cat(expected), **TOLERANCE)


def test_a_float64_model_gives_float64_logits(tiny_llama: Path):
    """For tests that leave rounding no say."""
    decoder = load_backend(tiny_llama, device=CPU, dtype=torch.float64, max_context=None)
    ids = tokens(30)

    def cached() -> KVCache:
        return KVCache(decoder.shapes, NUM_PAGES, PAGE, torch.float64, CPU)

    whole = run(decoder, cached(), ids, RowSpan(0, 30, shuffled_pages(), 0))
    kv, pages = cached(), shuffled_pages(1)
    parts = [
        run(decoder, kv, ids[start : start + 10], RowSpan(0, 10, pages, start))
        for start in (0, 10, 20)
    ]
    assert whole.dtype == torch.float64
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-11, rtol=0)


def test_greedy_tokens_equal_transformers(folder: Path):
    decoder, kv, pages = load(folder), None, shuffled_pages(2)
    kv = cache(decoder)
    ids = tokens(20, seed=5)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model.generate(
        torch.tensor([ids]), max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=0
    )[0, 20:].tolist()
    logits = run(decoder, kv, ids, RowSpan(0, 20, pages, 0))
    output: list[int] = []
    while len(output) < 30:
        logits[-1, decoder_eos(model)] = -torch.inf  # min_new_tokens forbids the end
        output.append(int(logits[-1].argmax()))
        length = 19 + len(output)
        logits = run(decoder, kv, output[-1:], RowSpan(0, 1, pages, length))
    assert output == expected


def decoder_eos(model: Any) -> list[int]:
    eos = model.generation_config.eos_token_id
    return eos if isinstance(eos, list) else [eos]


def test_rows_of_all_kinds_in_one_step(folder: Path):
    """A chunk, single tokens and a tree of several rows: each as if it were alone."""
    decoder = load(folder)
    kv, pages = cache(decoder), shuffled_pages(3)
    prompts = [tokens(length, seed=length) for length in (9, 33, 21, 40)]
    tables = [pages[20 * index : 20 * index + 20] for index in range(4)]
    for prompt, table in zip(prompts[1:], tables[1:], strict=True):
        run(decoder, kv, prompt, RowSpan(0, len(prompt), table, 0))
    next_ids = tokens(7, seed=99)
    tree = (-1, 0, 0, 1, 3)
    result = run(
        decoder,
        kv,
        [*prompts[0], next_ids[0], *next_ids[1:6], next_ids[6]],
        RowSpan(0, 9, tables[0], 0),
        RowSpan(9, 10, tables[1], 33),
        RowSpan(10, 15, tables[2], 21, tree),
        RowSpan(15, 16, tables[3], 40),
    )
    expected = [transformers_logits(folder, prompts[0])]
    expected.append(transformers_logits(folder, [*prompts[1], next_ids[0]])[-1:])
    for node in range(5):
        path, ancestor = [], node
        while ancestor >= 0:
            path.append(next_ids[1 + ancestor])
            ancestor = tree[ancestor]
        expected.append(transformers_logits(folder, [*prompts[2], *reversed(path)])[-1:])
    expected.append(transformers_logits(folder, [*prompts[3], next_ids[6]])[-1:])
    torch.testing.assert_close(result, torch.cat(expected), **TOLERANCE)


def test_accepted_path_is_moved_into_place(folder: Path):
    """A tree's path, moved behind the committed slots, continues as if it had been decoded."""
    decoder = load(folder)
    kv, pages = cache(decoder), shuffled_pages(4)
    prompt = tokens(26)
    run(decoder, kv, prompt, RowSpan(0, 26, pages, 0))
    nodes = tokens(6, seed=8)
    run(decoder, kv, nodes, RowSpan(0, 6, pages, 26, (-1, 0, 0, 0, 2, 4)))
    kv.move([Move(pages, [26 + 2, 26 + 4, 26 + 5], [26 + 1, 26 + 2, 26 + 3])])
    path = [nodes[0], nodes[2], nodes[4], nodes[5]]
    (last,) = tokens(1, seed=9)
    result = run(decoder, kv, [last], RowSpan(0, 1, pages, 30))
    expected = transformers_logits(folder, [*prompt, *path, last])[-1:]
    torch.testing.assert_close(result, expected, **TOLERANCE)


def test_a_row_does_not_depend_on_its_neighbours_pages(tiny_llama: Path):
    """NaN in KV of another row, and of a page's earlier owner, stays there."""
    decoder = load(tiny_llama)
    prompt = tokens(6)
    alone = run(decoder, cache(decoder), prompt, RowSpan(0, 6, [5, 3], 0))
    kv = cache(decoder)
    long = RowSpan(6, 7, list(range(20, 40)), 70)  # its KV is NaN: never written
    mixed = run(decoder, kv, [*prompt, 9], RowSpan(0, 6, [5, 3], 0), long)
    torch.testing.assert_close(mixed[:6], alone, atol=1e-5, rtol=1e-5)
    assert mixed[6].isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_float32_logits_near_transformers(
    tiny_mistral: Path, dtype: torch.dtype
):
    decoder = load_backend(tiny_mistral, device=CPU, dtype=dtype, max_context=None)
    kv = decoder.make_kv(NUM_PAGES, PAGE)
    ids = tokens(40)
    result = run(decoder, kv, ids, RowSpan(0, 40, shuffled_pages(), 0))
    assert result.dtype == torch.float32
    expected = transformers_logits(tiny_mistral, ids)
    assert torch.nn.functional.cosine_similarity(result, expected).min() > 0.99


@pytest.mark.parametrize("native", [True, False])
def test_without_native_everything_runs_in_plain_torch(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    """A float16 model, whose steps no native kernel runs, samples natively else."""
    monkeypatch.setattr(isa, "supported", lambda isa: True)
    decoder = load_backend(
        tiny_llama, device=CPU, dtype=torch.float16, max_context=None, native=native
    )
    assert decoder.name == "torch"
    assert type(decoder.ops) is (NativeOps if native else Ops)
