"""The best token of each row, in every way that runs here, against plain Python."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.best import best_native, best_torch
from tests.helpers.guarded import guarded
from tests.helpers.isas import FLOAT32, each_of

Way = Callable[[Tensor], tuple[Tensor, Tensor]]
TORCH = pytest.param(best_torch, torch.float32, id="torch")
NATIVE = [
    pytest.param(*each.values, torch.float32, id=each.id, marks=each.marks)
    for each in each_of(*FLOAT32, made=partial(partial, best_native))
]
DOUBLE = pytest.param(best_torch, torch.float64, id="float64")


def first_of_the_best(row: Sequence[float]) -> int:
    place = 0
    for other, value in enumerate(row):
        if value > row[place]:
            place = other
    return place


@pytest.mark.parametrize(("way", "dtype"), [TORCH, *NATIVE, DOUBLE])
@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 2**20))
def test_the_lowest_id_of_the_best_with_ties_and_infinities(
    way: Way, dtype: torch.dtype, rows: int, columns: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor([-torch.inf, -1.0, 0.0, 2.0, 2.5, torch.inf], dtype=dtype)
    picked = torch.randint(len(levels), (rows, columns), generator=generator)
    logits_XV = guarded(levels[picked])
    values_X, ids_X = way(logits_XV)
    expected = [first_of_the_best(row) for row in logits_XV.tolist()]
    assert ids_X.dtype == torch.int64 and ids_X.tolist() == expected
    assert values_X.dtype == dtype
    assert values_X.tolist() == [
        row[i] for row, i in zip(logits_XV.tolist(), expected, strict=True)
    ]


@pytest.mark.parametrize(("way", "dtype"), [DOUBLE])
def test_float64_is_not_rounded(way: Way, dtype: torch.dtype) -> None:
    logits_XV = torch.tensor([[1.0, 1.0 + 1e-12, 1.0]], dtype=dtype)
    assert way(logits_XV)[1].tolist() == [1]


@pytest.mark.parametrize(("way", "dtype"), [TORCH, *NATIVE, DOUBLE])
@given(st.integers(0, 99), st.sampled_from([0.0, torch.inf]))
def test_a_row_with_nan_says_so(way: Way, dtype: torch.dtype, place: int, most: float) -> None:
    logits_XV = torch.zeros(3, 100, dtype=dtype)
    logits_XV[:, 50] = most
    logits_XV[1, place] = torch.nan
    values_X, _ = way(logits_XV)
    assert [math.isnan(value) for value in values_X.tolist()] == [False, True, False]
