"""The default model, downloaded and converted, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorastack.model.backends.load import load_backend
from lorastack.model.context import ForwardBatch, RowSpan

pytestmark = pytest.mark.real
CPU = torch.device("cpu")
NUM_NEW = 64


def test_logits_and_greedy_tokens_equal_transformers(smollm: Path):
    decoder = load_backend(smollm, device=CPU, dtype=torch.float32, max_context=None)
    model = AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    chat = [{"role": "user", "content": "Why is the sea salty? Answer in three sentences."}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    with torch.inference_mode():
        expected = model.generate(
            torch.tensor([ids]),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        prompt_logits = model(torch.tensor([ids])).logits[0]

    kv = decoder.make_kv(32, 16)
    pages = list(range(31, -1, -1))
    batch = ForwardBatch(ids, (RowSpan(0, len(ids), pages, 0),), range(len(ids)))
    logits = decoder.forward(batch, kv).logits_XV
    assert (logits - prompt_logits).abs().max() < 1e-3
    output: list[int] = []
    for reference in expected.logits:
        assert (logits[-1] - reference[0]).abs().max() < 1e-3
        output.append(int(logits[-1].argmax()))
        row = RowSpan(0, 1, pages, len(ids) + len(output) - 1)
        logits = decoder.forward(ForwardBatch(output[-1:], (row,), (0,)), kv).logits_XV
    assert output == expected.sequences[0, len(ids) :].tolist()


def test_the_tokenizer_sets_digits_apart(smollm: Path):
    """As the model was trained: the blanks before a number are a token of their own."""
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
