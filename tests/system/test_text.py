"""The text of replies, over a live server whose tokenizer is SentencePiece's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from lorastack.config import AdapterConfig
from lorastack.errors import InvalidArgumentError
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.helpers.tiny import build_llama, write_json
from tests.text.test_grammar import spaces_backend

PAD = "[PAD]"  # a token of the tokenizer that the model does not have


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backend = spaces_backend()
    size = backend.get_vocab_size()
    folder = tmp_path_factory.mktemp("spaces") / "model"
    build_llama(folder, vocab_size=size, eos_token_id=2)
    backend.add_special_tokens([PAD])
    assert backend.token_to_id(PAD) == size
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    write_json(folder / "tokenizer_config.json", config)
    write_json(folder / "generation_config.json", {"eos_token_id": 2})
    return folder


@pytest.fixture(scope="module")
def spaces(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    store = tmp_path_factory.mktemp("spaces-store") / "store"
    with LiveServer(model, engine=ROOMY, adapters=AdapterConfig(store=store)) as server:
        yield server


def expected_text(model: Path, prompt: Sequence[int], output: Sequence[int]) -> str | None:
    """None: the output changes the text of the prompt's last bytes."""
    decode: Any = AutoTokenizer.from_pretrained(model).decode
    before = decode(list(prompt), skip_special_tokens=True)
    whole: str = decode([*prompt, *output], skip_special_tokens=True)
    return whole[len(before) :] if whole.startswith(before) else None


def test_a_reply_goes_on_where_its_prompt_ends(spaces: LiveServer, model: Path) -> None:
    backend = Backend.from_file(str(model / "tokenizer.json"))
    a, half = backend.token_to_id("▁a"), backend.token_to_id("<0xE4>")
    prompts: list[str | list[int]] = ["a ab", "ab é", [a], [1], [1, a, 2], [a, half], [half, half]]
    num_spaced = 0
    for seed, prompt in enumerate(prompts * 3):
        sampling = {"temperature": 2.0, "seed": seed, "logit_bias": {a: 12.0}}
        given = {"max_new_tokens": 12, "sampling": sampling}
        reply = spaces.client.generate(ask(prompt, **given))
        for other in (
            spaces.client.generate(ask(prompt, off=True, **given)),
            spaces.stream(ask(prompt, **given)),
        ):
            assert (other.text, list(other.token_ids)) == (reply.text, list(reply.token_ids))
        ids = spaces.tokenize(prompt) if isinstance(prompt, str) else prompt
        wanted = expected_text(model, ids, reply.token_ids)
        assert wanted is None or reply.text == wanted
        num_spaced += reply.text.startswith(" ")
    assert num_spaced
    spaces.assert_idle()


def test_a_stop_sequence_may_stand_at_the_seam(spaces: LiveServer, model: Path) -> None:
    a = Backend.from_file(str(model / "tokenizer.json")).token_to_id("▁a")
    sampling = {"logit_bias": {a: 100.0}}
    reply = spaces.client.generate(ask("ab", stop=[" a"], sampling=sampling))
    assert (reply.text, reply.stop_match) == ("", " a")
    assert reply.finish_reason == pb.GenerateResponse.STOP_SEQUENCE


@pytest.mark.parametrize("prompt", ["ab", [1]], ids=["text", "no text"])
@pytest.mark.parametrize("regex", [" a{1,5}", "[ab]{3}", " {0,3}é?b", "( ab|ab)+"])
def test_a_grammar_is_followed_by_the_text_of_the_reply(
    spaces: LiveServer, prompt: str | list[int], regex: str
) -> None:
    num_ended = 0
    for seed in range(6):
        sampling = {"temperature": 3.0, "seed": seed}
        wanted = pb.ResponseFormat(regex=regex)
        given = {"sampling": sampling, "response_format": wanted, "max_new_tokens": 60}
        reply = spaces.client.generate(ask(prompt, **given))
        if reply.finish_reason == pb.GenerateResponse.EOS:
            num_ended += 1
            assert re.fullmatch(regex, reply.text), reply.text
    assert num_ended


def test_a_token_that_the_model_lacks_ends_no_other_row(spaces: LiveServer) -> None:
    other = spaces.client.stream(ask("ab", max_new_tokens=40, ignore_eos=True))
    parts = [next(other)]
    with pytest.raises(InvalidArgumentError, match=re.escape(f"'{PAD}'")):
        spaces.client.generate(ask(f"ab {PAD}", max_new_tokens=2))
    parts += other
    assert sum(len(part.token_ids) for part in parts) == 40
    spaces.assert_idle()
