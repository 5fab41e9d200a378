"""Text of a folder that is refused: chat templates, and names that cannot be printed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.formats.validate import Validator
from lorastack.errors import InvalidArgumentError
from tests.adapters.folders import (
    HEADS_CONFIG,
    LORA_CONFIG,
    LORA_FILE,
    SHAPES,
    edit_json,
    files_of,
    refused,
)


def no_copies(name: str) -> Any:
    raise AssertionError(name)


VALIDATE = Validator(shapes=SHAPES, base_names=("tiny",), base_weight=no_copies)


TEMPLATES: dict[str, tuple[str, str, str]] = {
    "template number": ("tokenizer_config.json", '{"chat_template": 3}', "must be text"),
    "template table": (
        "tokenizer_config.json",
        '{"chat_template": {"default": "x"}}',
        "must be text",
    ),
    "name list": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": [], "template": "x"}]}',
        "must be text",
    ),
    "template in a list": ("tokenizer_config.json", '{"chat_template": ["x"]}', "must be text"),
    "named number": (
        "tokenizer_config.json",
        '{"chat_template": [{"name": "default", "template": 3}]}',
        "must be text",
    ),
    "surrogate": ("tokenizer_config.json", '{"chat_template": "\\udC00"}', "surrogate"),
    "long": ("chat_template.jinja", "x" * 70_000, "longer than 65536"),
}


@pytest.mark.parametrize(("name", "text", "named"), TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_are_refused_by_name(lora: Path, name: str, text: str, named: str) -> None:
    (lora / name).write_text(text)
    with pytest.raises(InvalidArgumentError, match=named):
        VALIDATE(files_of(lora))


@pytest.mark.parametrize("name", ["x\n2026-01-01 CRITICAL", "\x1b]0;owned\x07", "\u202e", "a\0"])
def test_base_names_that_cannot_be_printed(lora: Path, heads: Path, name: str) -> None:
    """They would forge lines of a log, or speak to a terminal."""
    for folder, config in ((lora, LORA_CONFIG), (heads, HEADS_CONFIG)):
        edit_json(folder / config, base_model_name_or_path=name)
        with pytest.raises(InvalidArgumentError, match="base_model_name_or_path") as refusal:
            VALIDATE(files_of(folder), accept_base=True)
        assert refusal.value.message.isprintable()


@pytest.mark.parametrize("name", ["\ud800", "a\nb", "\x1b[31m", "\u202e"])
def test_tensor_names_that_cannot_be_printed(lora: Path, name: str) -> None:
    data = (lora / LORA_FILE).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.dumps({name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}})
    header = header[:-1] + ", " + data[8 : 8 + length].decode().lstrip("{")
    raw = header.encode()
    (lora / LORA_FILE).write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
    assert refused(lora, "surrogate|cannot be printed").message.isprintable()
