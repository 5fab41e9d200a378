"""A store and two adapter folders of its own for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lorastack.adapters.store.registry import Registry
from tests.adapters.folders import SHAPES, H
from tests.adapters.pools import Bench, bench
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


@pytest.fixture(params=[1, 2])
def medusa_version(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def bundle(tmp_path: Path, medusa_version: int) -> Path:
    folder = write_lora(tmp_path / "bundle", SHAPES, rank=3, dtype=torch.bfloat16)
    return write_heads(
        folder,
        SHAPES.hidden_size,
        num_heads=2,
        num_blocks=2,
        vocab_size=SHAPES.vocab_size if medusa_version == 1 else None,
        draft_vocabulary=range(SHAPES.vocab_size) if medusa_version == 2 else (),
    )


@pytest.fixture
def ten() -> Iterator[Bench]:
    with bench() as made:
        yield made
