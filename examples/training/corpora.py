"""Reads the data folder, and says what of it is never trained on."""

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


def general_held_out(data_dir: Path) -> list[str]:
    """First turns of Spec-Bench. The committed lora-style is older: it learnt from most of them."""
    return [str(row["turns"][0]) for row in read_jsonl(data_dir / "spec_bench_dev.jsonl")]
