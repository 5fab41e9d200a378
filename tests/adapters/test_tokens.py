"""Folders whose tokenizer is not the base's: refused where it matters, a warning otherwise."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.formats.facts import Facts
from lorastack.adapters.formats.validate import Validator
from lorastack.errors import InvalidArgumentError
from tests.adapters.folders import SHAPES, files_of
from tests.helpers.adapters import write_heads, write_lora

BASE = {"<s>": 1, "</s>": 2, "<tool>": 30}
Write = Callable[[Path, dict[str, int]], None]


def _no_copies(name: str) -> Any:
    raise AssertionError(name)


VALIDATE = Validator(
    shapes=SHAPES, base_names=("tiny",), base_weight=_no_copies, base_token=BASE.get
)


def write_tokenizer(folder: Path, tokens: dict[str, int]) -> None:
    """In the order that the tokenizers package writes: megabytes of vocabulary come behind."""
    added = [{"id": number, "content": text, "special": True} for text, number in tokens.items()]
    content = {"version": "1.0", "truncation": None, "added_tokens": added, "model": {"vocab": {}}}
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=2) + " " * (5 << 20))


def write_config(folder: Path, tokens: dict[str, int]) -> None:
    added = {str(number): {"content": text} for text, number in tokens.items()}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added}))


def write_added(folder: Path, tokens: dict[str, int]) -> None:
    (folder / "added_tokens.json").write_text(json.dumps(tokens))


@pytest.fixture(params=[write_tokenizer, write_config, write_added])
def write(request: pytest.FixtureRequest) -> Write:
    written: Write = request.param
    return written


def validated(folder: Path, validate: Validator = VALIDATE) -> Facts:
    return validate(files_of(folder)).facts


def refused(folder: Path, named: str) -> None:
    with pytest.raises(InvalidArgumentError, match=named) as refusal:
        validated(folder)
    assert refusal.value.message.isprintable()


def test_a_copy_of_the_base_s_tokenizer_is_no_matter(lora: Path) -> None:
    for write in (write_tokenizer, write_config, write_added):
        write(lora, BASE)
    assert validated(lora).warnings == ()
    for name in ("tokenizer.json", "tokenizer_config.json", "added_tokens.json"):
        (lora / name).write_text("{}")
    assert validated(lora).warnings == ()


def test_added_tokens_are_a_warning(lora: Path, heads: Path, write: Write) -> None:
    added = {"[PAD]": 32, "<a>": 33, "\x1b[31m": 34, "<é>": 35}
    for folder in (lora, heads):
        write(folder, BASE | added)
        (warning,) = validated(folder).warnings
        assert warning.startswith("its tokenizer adds '[PAD]', '<a>', ")
        assert "and 1 more" in warning and warning.isprintable()
        assert validated(folder, replace(VALIDATE, base_token=None)).warnings == ()


def test_a_token_with_another_id_is_refused(lora: Path, write: Write) -> None:
    write(lora, BASE | {"<tool>": 29})
    refused(lora, "gives token '<tool>' the id 29, but the base model's .* gives it 30")


def test_an_added_token_that_the_template_uses_is_refused(lora: Path, write: Write) -> None:
    (lora / "chat_template.jinja").write_text("<s>{{ messages[0].content }}<tool>")
    write(lora, BASE)
    assert validated(lora).warnings == ()
    (lora / "chat_template.jinja").write_text("<|im_start|>{{ messages[0].content }}")
    write(lora, BASE | {"<|im_start|>": 31})
    refused(lora, r"chat template uses token '<\|im_start\|>'")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_added_token_whose_row_is_adapted_is_refused(tmp_path: Path, target: str) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, rank=1, targets=["q_proj", target])
    write_added(folder, BASE | {"<new>": SHAPES.vocab_size - 1})
    refused(folder, f"embedding or lm_head of token '<new>', id {SHAPES.vocab_size - 1}")
    write_added(folder, BASE | {"<new>": SHAPES.vocab_size})  # a padding token, say
    assert validated(folder).warnings


MALFORMED = {
    "list": ("tokenizer.json", '{"added_tokens": {}}'),
    "entry": ("tokenizer.json", '{"added_tokens": [3]}'),
    "content": ("tokenizer.json", '{"added_tokens": [{"id": 3, "content": []}]}'),
    "id": ("tokenizer.json", '{"added_tokens": [{"id": true, "content": "a"}]}'),
    "cut": ("tokenizer.json", '{"added_tokens": [{"id": 3,'),
    "surrogate": ("tokenizer.json", '{"added_tokens": [{"id": 3, "content": "\\uDfff"}]}'),
    "decoder": ("tokenizer_config.json", '{"added_tokens_decoder": [1]}'),
    "key": ("tokenizer_config.json", '{"added_tokens_decoder": {"-1": {"content": "a"}}}'),
    "text": ("tokenizer_config.json", '{"added_tokens_decoder": {"1": {"content": 1}}}'),
    "number": ("added_tokens.json", '{"a": "1"}'),
    "negative": ("added_tokens.json", '{"a": -1}'),
    "no object": ("added_tokens.json", "[]"),
}


@pytest.mark.parametrize(("name", "text"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused_by_name(lora: Path, name: str, text: str) -> None:
    (lora / name).write_text(text)
    refused(lora, name)


def test_heads_of_a_base_with_its_tokenizer(tmp_path: Path) -> None:
    folder = write_heads(tmp_path / "x", SHAPES.hidden_size)
    write_tokenizer(folder, BASE)
    assert validated(folder).warnings == ()
