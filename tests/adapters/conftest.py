"""A store and two adapter folders of its own for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import SHAPES, H
from tests.helpers.adapters import write_heads, write_lora


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = Registry(root)
    yield registry
    registry.close()


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return write_lora(tmp_path / "lora", SHAPES, rank=4, targets=["q_proj", "up_proj"])


@pytest.fixture
def heads(tmp_path: Path) -> Path:
    return write_heads(tmp_path / "heads", H, num_heads=3)
