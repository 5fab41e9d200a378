"""Any value in any field of any JSON file of a folder: accepted, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorastack.adapters.formats.fields import CONFIGS, READ, TRAINING
from lorastack.adapters.formats.validate import Validator
from lorastack.errors import FailedPreconditionError, InvalidArgumentError
from lorastack.service.edge.status import to_status
from tests.adapters.folders import HEADS_CONFIG, LORA_CONFIG, SHAPES, files_of
from tests.helpers.adapters import write_heads, write_lora

VALUES = [
    *("null", "true", "false", "0", "1", "-1", "2", "0.5", "-0.0", "1e300", "1e999", "-1e999"),
    *("NaN", "Infinity", "9" * 400, "9" * 4300, "9" * 9999, "[]", "{}", "[[]]", '[{}, "a", 1]'),
    *('{"a": null}', '{"": 1}', "[" * 500 + "]" * 500, "[" * 9999 + "]" * 9999, '""', '"none"'),
    *('"\\ud800"', '["\\udfff"]', '{"\\ud800": 1}', '"\\ud83d\\ude00"', '"a\\nb"', '"\\u001b[31m"'),
    *('"\\u202e"', '"' + "x" * 3000 + '"', '"(?R)*"', '"(.*)*x"', '"(a{1000}){1000}"', '"["'),
    *('{"(?R)*": 1}', '{"(.*)*x": 1, ".*": 1e300}', '{"q_proj": {}}', '{"q_proj": 1e400}'),
    *('"\\u0000"', "[1, true]", "[-1, 99999999999999999999]", '["q_proj", "\\n"]'),
]
BASE: dict[str, int] = {}


def _no_copies(name: str) -> Any:
    raise AssertionError(name)


VALIDATE = Validator(
    shapes=SHAPES, base_names=("tiny",), base_weight=_no_copies, base_token=BASE.get
)


def outcomes(folder: Path, file: str, fields: list[str], text: str) -> set[bool]:
    """Of one value after the other in one field after the other: whether it was accepted."""
    found = set()
    kept = json.loads(text)
    for field in fields:
        rest = json.dumps({name: value for name, value in kept.items() if name != field})[1:-1]
        for value in VALUES:
            comma = ", " if rest else ""
            (folder / file).write_text(f"{{{rest}{comma}{json.dumps(field)}: {value}}}")
            try:
                VALIDATE(files_of(folder))
                found.add(True)
            except (InvalidArgumentError, FailedPreconditionError) as refusal:
                assert refusal.message.isprintable(), (field, value)
                assert len(to_status(refusal, "id").SerializeToString()) < 6 << 10
                found.add(False)
    (folder / file).write_text(text)
    return found


@pytest.mark.parametrize("part", range(4))
def test_every_field_of_a_lora(tmp_path: Path, part: int) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, rank=1, targets=["q_proj"])
    fields = [*sorted(READ | TRAINING | CONFIGS), "unknown", "\ud800", "\x1b[2J"]
    config = (folder / LORA_CONFIG).read_text()
    assert outcomes(folder, LORA_CONFIG, fields[part::4], config) == {True, False}


def test_every_field_of_heads(tmp_path: Path) -> None:
    folder = write_heads(tmp_path / "x", SHAPES.hidden_size, num_heads=1)
    config = (folder / HEADS_CONFIG).read_text()
    fields = [*json.loads(config), "base_model_name_or_path", "unknown"]
    assert outcomes(folder, HEADS_CONFIG, fields, config) == {True, False}


@pytest.mark.parametrize(
    ("file", "field"),
    [
        *(("tokenizer_config.json", "chat_template"), ("tokenizer.json", "added_tokens")),
        *(("tokenizer_config.json", "added_tokens_decoder"), ("added_tokens.json", "a")),
    ],
)
def test_every_field_of_a_tokenizer_that_is_read(tmp_path: Path, file: str, field: str) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, rank=1, targets=["q_proj"])
    assert outcomes(folder, file, [field], "{}") == {True, False}


@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets", "__metadata__"])
def test_every_field_of_a_header(tmp_path: Path, field: str) -> None:
    folder = write_lora(tmp_path / "x", SHAPES, rank=1, targets=["q_proj"])
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__")
    name = min(header)
    for value in VALUES:
        entry = json.dumps(header[name] | {field: "@"}).replace('"@"', value)
        rest = json.dumps({other: header[other] for other in header if other != name})[1:]
        raw = f"{{{json.dumps(name)}: {entry}, {rest}".encode()
        if field == "__metadata__":
            raw = f'{{"__metadata__": {value}, {json.dumps(header)[1:]}'.encode()
        path.write_bytes(len(raw).to_bytes(8, "little") + raw + data[8 + length :])
        try:
            VALIDATE(files_of(folder))
            assert field == "__metadata__"
        except InvalidArgumentError as refusal:
            assert refusal.message.isprintable()
