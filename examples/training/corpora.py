"""Reads the data folder, and holds a part of GSM8K out."""

import json
from pathlib import Path
from typing import Any

HELD_OUT_GSM8K = 300


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines end with a newline only: str.splitlines would also cut at U+2028 inside a text."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def gsm8k(data_dir: Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(for training, held out): the last 300 rows are never trained on."""
    rows = read_jsonl(data_dir / "gsm8k_train.jsonl")
    return rows[:-HELD_OUT_GSM8K], rows[-HELD_OUT_GSM8K:]
