"""What is made up is what it claims to be: the architecture by transformers, the tokenizer by its
authors' library, weights that give varied texts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from mistral_common.protocol.instruct.messages import UserMessage
from mistral_common.protocol.instruct.request import ChatCompletionRequest
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

from lorastack.model.backends.load import load_backend
from lorastack.text.tokenizer import Tokenizer
from tests.helpers.adapters import write_lora
from tests.helpers.native import CPU, RowPart, run
from tests.helpers.packed import read_weights
from tests.helpers.reference import Reference
from tests.integration.mistral_7b.checkpoint import FULL, HUB_ID, TWIN, write_checkpoint
from tests.integration.mistral_7b.tokenizer import SPECIALS

PAGE = 16
TEXTS = st.text().filter(lambda text: not any(token in text for token in SPECIALS))


@pytest.fixture(scope="module")
def shallow(
    full_size: bool, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Path:
    """The twin; at full size the first layer only, which fits in memory in float32, twice."""
    if not full_size:
        twin: Path = request.getfixturevalue("model")
        return twin
    size = replace(FULL, layers=1)
    return write_checkpoint(tmp_path_factory.mktemp("shallow") / HUB_ID, size)


@pytest.fixture(scope="module")
def tokenizer(shallow: Path) -> Tokenizer:
    return Tokenizer.load(shallow)


def test_logits_are_those_of_transformers(
    shallow: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """With a LoRA on all projections, too; in float32, and in bfloat16 as it is served."""
    ids = tokenizer.encode("The sky is blue because of the way that air scatters sunlight.")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.03)):
        decoder = load_backend(shallow, device=CPU, dtype=dtype, max_context=64)
        lora = write_lora(tmp_path / "lora", decoder.shapes, rank=16, dtype=torch.bfloat16)
        weights = [read_weights(lora, decoder.shapes, dtype)]
        kv = decoder.make_kv(8, PAGE)
        parts = [RowPart(ids, 0, range(4)), RowPart(ids, 0, range(4, 8), ((0, 1.0),))]
        outputs = run(decoder, weights, kv, parts)
        del decoder, kv
        reference = Reference(shallow, {"lora": lora})
        for mine_TV, stack in zip(outputs, ((), (("lora", 1.0),)), strict=True):
            theirs_TV = reference.logits(ids, stack)
            assert (mine_TV - theirs_TV).norm() < tolerance * theirs_TV.norm()
        assert (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm()
        # As spread as a real model's, every token followed by another one.
        assert 1 < outputs[0].std() < 10
        assert len(set(outputs[0].argmax(1).tolist())) > len(ids) // 2


@given(TEXTS)
@example("def add(a,  b):\n    return a   + b")  # runs of spaces
def test_tokens_are_those_of_the_published_model(tokenizer: Tokenizer, text: str) -> None:
    theirs = MistralTokenizer.v1().instruct_tokenizer.tokenizer
    ids = tokenizer.encode(text)
    assert ids == theirs.encode(text, bos=True, eos=False)
    if "▁" not in text:  # which stands for a space
        assert tokenizer.decode(ids) == text


def test_a_chat_is_that_of_the_published_model(tokenizer: Tokenizer) -> None:
    asked = "Why is  the sky blue?\nIn one line."
    request = ChatCompletionRequest(messages=[UserMessage(content=asked)])
    theirs = MistralTokenizer.v1().encode_chat_completion(request).tokens
    assert tokenizer.chat([("user", asked)]) == theirs


def test_a_write_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    whole = write_checkpoint(tmp_path / "whole", TWIN)
    cut = shutil.copytree(whole, tmp_path / "cut")
    index = "model.safetensors.index.json"
    shards = sorted(set(json.loads((cut / index).read_text())["weight_map"].values()))
    assert len(shards) > 1
    (cut / index).unlink()
    (cut / shards[-1]).rename(cut / f"{shards[-1]}.part")
    written = (cut / shards[0]).stat().st_mtime_ns
    write_checkpoint(cut, TWIN)
    assert (cut / shards[0]).stat().st_mtime_ns == written
    for name in (*shards, index):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
