"""Sizes as people write them."""

from __future__ import annotations

import pytest

from lorastack.config import GIB, KIB, MIB, TIB, parse_size


def test_units_and_fractions() -> None:
    for text, size in (
        ("0", 0), ("123", 123), ("7B", 7), ("64KiB", 64 * KIB), ("512MiB", 512 * MIB),
        ("2GiB", 2 * GIB), ("1.5GiB", 3 * GIB // 2), ("2TiB", 2 * TIB), ("0.25TiB", 256 * GIB),
    ):  # fmt: skip
        assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    ["", "GiB", "4GB", "4 GiB", "-1", "1e3", "nan", "infGiB", "1.5", "1.5B", ".5GiB", "1.GiB",
     "٤GiB", "8388608TiB", "9" * 20, "9" * 400 + "KiB", "1_000", "0x10", "1GiB\n"],
)  # fmt: skip
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|address space"):
        parse_size(text)
