"""Before the first row every kernel has its code: a compilation takes seconds, for all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from lorastack.kernels.heads import HeadsGroup
from lorastack.lora.segments import LoraBatch, Segment
from tests.helpers.compiled import Recorder
from tests.helpers.launches import launching
from tests.helpers.mock_mistral import (
    DTYPE,
    META,
    SHAPES,
    MockMistral,
    mock_heads,
    mock_lora,
)

Version = tuple[object, ...]


@contextmanager
def versions() -> Iterator[set[Version]]:
    """What Triton would have to compile for the launches inside, once they are through."""
    recorder, found = Recorder(), set[Version]()
    with launching(recorder):
        yield found
    found.update(each.version for each in recorder.launches)


@pytest.fixture(scope="module")
def mistral() -> MockMistral:
    return MockMistral()


@pytest.fixture(scope="module")
def prepared(mistral: MockMistral) -> set[Version]:
    with versions() as found:
        mistral.backend.prepare(mistral.kv)
    return found


def _states(rows: int) -> Tensor:
    return torch.empty(rows, SHAPES.hidden_size, dtype=DTYPE, device=META)


def _logits(rows: int) -> Tensor:
    return torch.empty(rows, SHAPES.vocab_size, device=META)


def rows_alone(mistral: MockMistral) -> None:
    for rows, nodes in ((1, 1), (5, 3), (100, 1), (20, 16)):
        mistral.backend.forward(mistral.step(rows, (), nodes), mistral.kv)


def rows_with_loras(mistral: MockMistral) -> None:
    loras = [mock_lora(16), mock_lora(33, beside_layers=True)]
    for rows in (1, 5, 100):
        mistral.backend.forward(mistral.step(rows, loras[-rows:]), mistral.kv)


def rows_with_heads(mistral: MockMistral) -> None:
    for kind in ((1, 5, 1), (3, 4096, 2), (4, 5, 1, 16), (1, 4096, 2, 5)):
        heads = mock_heads(*kind)
        for rows in (1, 5):
            mistral.backend.forward(mistral.step(rows, (), 2, heads), mistral.kv)


def logits_of_states(mistral: MockMistral) -> None:
    lora = mock_lora(16, beside_layers=True)
    for rows in (1, 3, 70):
        for segments in ((), (Segment(0, rows, lora, 1.0),)):
            mistral.backend.logits(_states(rows), LoraBatch(segments))


def calls_of_ops(mistral: MockMistral) -> None:
    ops = mistral.backend.ops
    for rows in (1, 2, 4, 5):
        ops.best(_logits(rows))
        for num in (1, 5, 20):
            ops.top(_logits(rows), num)
        for heads in (mock_heads(3, 4096, 2), mock_heads(3, 4096, 2, 16)):
            ops.states(_states(rows), [HeadsGroup(0, rows, heads)])
            for num in (1, 5, 20):
                ops.propose(_states(rows), [HeadsGroup(0, rows, heads)], num)


@pytest.mark.parametrize(
    "asked", [rows_alone, rows_with_loras, rows_with_heads, logits_of_states, calls_of_ops]
)
def test_nothing_is_left_to_compile(
    asked: Callable[[MockMistral], None], mistral: MockMistral, prepared: set[Version]
) -> None:
    with versions() as found:
        asked(mistral)
    assert found and not found - prepared
