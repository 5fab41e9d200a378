"""Paged tree attention against its token-by-token reference."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.kernels.attention import AttentionPlan, RowSpan, attend, attend_reference
from lorastack.kernels.attention_plan import SHORT_ROW, plan_attention
from lorastack.kernels.upload import upload

PAGE, NUM_PAGES, KV_HEADS, HEADS, DIM = 4, 64, 2, 6, 8
CPU = torch.device("cpu")


@st.composite
def parents(draw: st.DrawFn) -> tuple[int, ...]:
    count = draw(st.integers(1, 7))
    return tuple(-1 if j == 0 else draw(st.integers(0, j - 1)) for j in range(count))


@st.composite
def batches(draw: st.DrawFn) -> list[RowSpan]:
    """Single tokens, trees and chunks in any order, on shuffled pages that no two rows share."""
    pages = list(range(NUM_PAGES))
    random.Random(draw(st.integers(0, 9))).shuffle(pages)
    rows: list[RowSpan] = []
    start = 0
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(("single", "tree", "chunk")))
        tree = draw(parents()) if kind == "tree" else None
        count = {"single": 1, "tree": len(tree or ()), "chunk": draw(st.integers(1, 9))}[kind]
        committed = draw(st.integers(0, 30))
        num_pages = -(-(committed + count) // PAGE)
        table, pages = pages[:num_pages], pages[num_pages:]
        rows.append(RowSpan(start, start + count, table, committed, tree))
        start += count
    return rows


def plan(rows: list[RowSpan], window: int | None = None) -> AttentionPlan:
    host = plan_attention(rows, page_size=PAGE, share=HEADS // KV_HEADS, window=window)
    return host.placed(iter(upload(host.parts, CPU)), torch.float32)


def run(rows: list[RowSpan], window: int | None, kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(3)
    q_THD = torch.randn(rows[-1].end, HEADS, DIM, generator=generator)
    planned = plan(rows, window)
    return attend(q_THD, kv, planned), attend_reference(q_THD, kv, rows, window).float()


def random_kv(num_pages: int = NUM_PAGES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(num_pages, 2, KV_HEADS, PAGE, DIM, generator=generator)


@settings(deadline=None)
@given(batches(), st.sampled_from((None, 1, 2, 5, 16)))
def test_equals_the_reference(rows: list[RowSpan], window: int | None):
    result, expected = run(rows, window, random_kv())
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(batches())
def test_what_lies_in_other_pages_never_matters(rows: list[RowSpan]):
    """Even NaN: a masked score does not remove it."""
    kv = random_kv()
    clean, _ = run(rows, None, kv)
    used = [page for row in rows for page in row.block_table]
    kv[[page for page in range(NUM_PAGES) if page not in used]] = torch.nan
    poisoned, _ = run(rows, None, kv)
    assert torch.equal(clean, poisoned)


@pytest.mark.parametrize("tree", [None, (-1, 0, 0)])
def test_rows_of_very_different_lengths_are_split(tree: tuple[int, ...] | None):
    count = 1 if tree is None else len(tree)
    lengths = (3, 2 * SHORT_ROW, 7, SHORT_ROW + 9, SHORT_ROW // 2)
    pages = list(range(1000))
    random.Random(0).shuffle(pages)
    rows = []
    for index, length in enumerate(lengths):
        table = [pages.pop() for _ in range(-(-(length + count) // PAGE))]
        rows.append(RowSpan(index * count, (index + 1) * count, table, length, tree))
    planned = plan(rows)
    assert [group.num_rows for group in planned.groups] == [2, 3]
    result, expected = run(rows, None, random_kv(1000))
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)


def test_positions_slots_and_fresh_pages():
    rows = [
        RowSpan(0, 4, [9, 5, 7], 6, (-1, 0, 0, 2)),
        RowSpan(4, 7, [3, 8], 3, None),
        RowSpan(7, 8, [1], 1, None),
    ]
    planned = plan(rows)
    assert planned.positions_T.tolist() == [6, 7, 7, 8, 3, 4, 5, 1]
    assert planned.slots_T.tolist() == [5 * 4 + 2, 5 * 4 + 3, 7 * 4, 7 * 4 + 1, 15, 32, 33, 5]
    assert planned.fresh_pages.tolist() == [7, 8]


def test_single_rows_of_one_length_need_no_mask():
    rows = [RowSpan(i, i + 1, [2 * i, 2 * i + 1], 6) for i in range(3)]
    planned = plan(rows)
    (group,) = planned.groups
    assert group.mask is None and group.valid is None and isinstance(group.tokens, slice)
