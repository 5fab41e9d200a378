"""Which tokens are chosen, how much they cover, and where each one's row is."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorastack.errors import InvalidArgumentError
from lorastack.layout import MAX_DRAFT_VOCABULARY, MAX_RANK
from lorastack.train.corpus import NO_TARGET
from lorastack.train.vocabulary import choose_vocabulary, count_tokens, coverage, output_of

SIZE = MAX_RANK + 20


@given(st.lists(st.integers(0, SIZE - 1), min_size=1), st.integers(MAX_RANK, SIZE - 1))
def test_no_other_choice_covers_more(tokens: list[int], size: int) -> None:
    half = len(tokens) // 2
    count_V = count_tokens(
        [torch.tensor(tokens[:half], dtype=torch.int64), torch.tensor(tokens[half:])], SIZE
    )
    ids_N = choose_vocabulary(count_V, size)
    assert ids_N is not None and ids_N.dtype == torch.int64
    ids = ids_N.tolist()
    assert ids == sorted(set(ids)) and len(ids) == size
    best = sum(count for _, count in Counter(tokens).most_common(size))
    assert coverage(ids_N, count_V) == pytest.approx(best / len(tokens))


def test_tokens_that_never_came_join_by_id() -> None:
    count_V = count_tokens([torch.tensor([70, 50, 70, 80, 80, 50])], 90)
    ids_N = choose_vocabulary(count_V, MAX_RANK)
    assert ids_N is not None and ids_N.tolist() == [*range(62), 70, 80]


def test_all_tokens_and_sizes_that_no_server_takes() -> None:
    count_V = torch.ones(40_000, dtype=torch.int64)
    assert choose_vocabulary(count_V, 0) is None
    assert choose_vocabulary(count_V[:100], 100) is None
    for size in (-1, 1, MAX_RANK - 1, MAX_DRAFT_VOCABULARY + 1):
        with pytest.raises(InvalidArgumentError, match="or 0 for all"):
            choose_vocabulary(count_V, size)


def test_each_token_has_its_row_or_none() -> None:
    lm_head_VH = torch.randn(9, 4)
    tokens = torch.tensor([[8, 2], [0, NO_TARGET]])
    some = output_of(
        lm_head_VH, torch.tensor([2, 5, 8]), device=torch.device("cpu"), dtype=torch.float32
    )
    assert torch.equal(some.rows_NH, lm_head_VH[[2, 5, 8]])
    assert some.columns(tokens).tolist() == [[2, 0], [NO_TARGET, NO_TARGET]]
    all_of_them = output_of(lm_head_VH, None, device=torch.device("cpu"), dtype=torch.float32)
    assert torch.equal(all_of_them.rows_NH, lm_head_VH)
    assert all_of_them.columns(tokens).tolist() == tokens.tolist()
