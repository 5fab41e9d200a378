"""The numbers that the attention of Triton reads, against the rows that they stand for."""

from __future__ import annotations

import random
from collections import defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lorastack.kernels.attention import RowSpan
from lorastack.kernels.attention_plan import plan_attention as plan_reference
from lorastack.kernels.triton.attention_plan import AttentionArrays, AttentionShape, plan_attention

PAGE, POISON, MAX_TOKENS = 4, -7, 64


@st.composite
def parents(draw: st.DrawFn) -> tuple[int, ...]:
    count = draw(st.integers(1, 7))
    return tuple(-1 if j == 0 else draw(st.integers(0, j - 1)) for j in range(count))


@st.composite
def steps(draw: st.DrawFn) -> list[RowSpan]:
    """Single tokens, trees and chunks in any order, on pages in any order."""
    rows: list[RowSpan] = []
    for _ in range(draw(st.integers(1, 4))):
        tree = draw(st.one_of(st.none(), parents()))
        count = draw(st.integers(1, 16)) if tree is None else len(tree)
        committed, start = draw(st.integers(0, 90)), rows[-1].end if rows else 0
        # A row may have more pages than it needs.
        table = random.Random(start).sample(range(99), -(-(committed + count) // PAGE) + 1)
        rows.append(RowSpan(start, start + count, table, committed, tree))
    return rows


def plan(
    rows: list[RowSpan], shape: AttentionShape, max_parts: int
) -> AttentionArrays[np.ndarray[tuple[int, ...], np.dtype[np.int32]]]:
    """Arrays cut to what is filled; all else stays as it was."""
    lengths = AttentionArrays.lengths(MAX_TOKENS, max_parts, 400)
    into = AttentionArrays(
        **{key: np.full(size, POISON, np.int32) for key, size in lengths.items()}
    )
    used = plan_attention(rows, shape, max_parts, into)
    num_tokens, num_items = into.counts
    assert num_tokens == rows[-1].end
    for array in (into.position_T, into.slot_T, into.item_T):
        assert (array[num_tokens:] == POISON).all()
    assert (into.items[num_items:] == POISON).all()
    assert (into.lists[used:] == POISON).all()
    return into


@settings(deadline=None)
@given(steps())
def test_positions_and_slots_are_those_of_the_reference(rows: list[RowSpan]) -> None:
    into = plan(rows, AttentionShape(4, 2, 8, PAGE, None), 9)
    wanted = plan_reference(rows, page_size=PAGE, share=2, window=None)
    num_tokens = rows[-1].end
    assert into.position_T[:num_tokens].tolist() == wanted.positions
    assert into.slot_T[:num_tokens].tolist() == wanted.slots


@settings(deadline=None)
@given(steps())
def test_nodes_of_trees_find_their_ancestors(rows: list[RowSpan]) -> None:
    into = plan(rows, AttentionShape(4, 2, 8, PAGE, None), 9)
    for row in rows:
        for node, parent in enumerate(row.parents or ()):
            lineage = [node]
            while parent >= 0:
                lineage.insert(0, parent)
                parent = row.parents[parent]  # type: ignore[index]
            begin = into.line_T[row.start + node]
            assert into.lists[begin : begin + len(lineage)].tolist() == lineage


@settings(deadline=None)
@given(
    steps(), st.sampled_from((None, 1, 20)), st.sampled_from((0, 2, 5, 30)), st.sampled_from((1, 4))
)
def test_items_cover_every_split_that_a_token_sees(
    rows: list[RowSpan], window: int | None, max_parts: int, share: int
) -> None:
    shape = AttentionShape(2 * share, 2, 8, PAGE, window, block=16, split=16)
    into = plan(rows, shape, max_parts)
    items = into.items[: into.counts[1]].tolist()
    splits: dict[int, list[int]] = defaultdict(list)  # of each tile, by its first token
    parts: list[int] = []
    for start, count, last, first, end, part, committed, chain, pages in items:
        row = next(row for row in rows if row.start <= start < row.end)
        assert start + count <= row.end
        assert count <= shape.tokens_a_tile
        assert last == into.position_T[start : start + count].max()
        assert (committed, chain) == (row.committed, row.parents is None)
        needed = -(-row.num_slots // PAGE)
        assert into.lists[pages : pages + needed].tolist() == list(row.block_table[:needed])
        assert part == -1 or end == first + 1
        parts += [part] * (part >= 0)
        splits[start] += range(first, end)
    assert sorted(parts) == list(range(len(parts)))
    assert len(parts) <= max_parts
    for token, item in enumerate(into.item_T[: rows[-1].end]):
        start, count, _, first, _, part, *_ = items[item]
        assert start <= token < start + count
        position = into.position_T[token]
        lowest = 0 if window is None else max(position - window + 1, 0)
        seen = range(lowest // 16, position // 16 + 1)
        assert set(seen) <= set(splits[start])
        # In the order of splits and without gaps, from the tile's first item on.
        assert splits[start] == list(range(first, first + len(splits[start])))
        ofs = [line[5] for line in items if line[0] == start]
        assert ofs == [-1] or ofs == list(range(part, part + len(ofs)))


def test_the_longest_are_spread_where_room_is_short() -> None:
    shape = AttentionShape(4, 2, 8, PAGE, None, block=16, split=16)
    rows = [RowSpan(0, 1, range(9), 33, None), RowSpan(1, 2, range(9, 40), 99, None)]
    into = plan(rows, shape, 8)
    assert into.counts[1] == 1 + 7
    assert into.items[: into.counts[1], 0].tolist() == [0, *[1] * 7]
