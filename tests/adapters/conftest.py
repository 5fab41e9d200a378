"""A store of its own for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorastack.adapters.registry import Registry


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    registry = Registry(root)
    yield registry
    registry.close()
