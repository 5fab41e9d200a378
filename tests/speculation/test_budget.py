from itertools import count, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.speculation.budget import allot, pays
from lorastack.speculation.cost import CostCurve

worths = st.lists(st.floats(0.0, 1.0), max_size=4).map(lambda row: sorted(row, reverse=True))


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 20), min_size=1, max_size=5)))
    return CostCurve([(at, draw(st.floats(0.1, 10.0))) for at in tokens])


def rate(
    rows: list[list[float]], counts: list[int], fixed: int, num_rows: int, cost: CostCurve
) -> float:
    gain = num_rows + sum(sum(row[:n]) for row, n in zip(rows, counts, strict=True))
    return gain / cost.seconds(fixed + sum(counts))


@given(st.lists(worths, max_size=3), st.integers(0, 8), curves(), st.integers(0, 12))
def test_no_other_numbers_of_nodes_give_more(
    rows: list[list[float]], fixed: int, cost: CostCurve, most: int
) -> None:
    num_rows = len(rows) + 1
    counts = allot(rows, fixed, num_rows, cost, most)
    assert sum(counts) <= most
    best = max(
        rate(rows, list(other), fixed, num_rows, cost)
        for other in product(*[range(len(row) + 1) for row in rows])
        if sum(other) <= most
    )
    assert rate(rows, counts, fixed, num_rows, cost) == pytest.approx(best, rel=1e-12)


@given(st.lists(worths, min_size=1, max_size=4), st.floats(0.01, 1.0), st.floats(0.0, 1.0))
def test_a_steeper_cost_never_allots_more(
    rows: list[list[float]], slope: float, more: float
) -> None:
    gentle, steep = (CostCurve([(0, 1.0), (100, 1.0 + 100 * s)]) for s in (slope, slope + more))
    num_rows = len(rows)
    assert sum(allot(rows, num_rows, num_rows, steep)) <= sum(
        allot(rows, num_rows, num_rows, gentle)
    )


def test_drafting_shrinks_to_nothing_row_by_row() -> None:
    cost = CostCurve([(1, 10.0), (8, 11.0), (16, 13.0), (32, 20.0), (64, 40.0)])
    row = [0.7, 0.5, 0.35, 0.2, 0.12, 0.08, 0.05]
    sizes = [sum(allot([row] * n, n, n, cost)) / n for n in range(1, 40)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] >= 5
    assert sum(0 < size < 1 for size in sizes) > 5
    assert sizes[-1] == 0


def test_a_dear_first_node_is_taken_for_the_sake_of_those_behind_it() -> None:
    cost = CostCurve([(4, 1.0), (5, 1.5), (16, 1.6), (17, 9.0)])
    assert allot([[0.25] * 12], 4, 4, cost) == [12]
    assert allot([[0.25] * 4], 4, 4, cost) == [0]


def test_sure_rows_get_the_nodes_and_nobody_reads_far_on() -> None:
    read = count()

    def stream() -> object:
        for worth in (0.9, 0.8, *[0.01] * 60):
            next(read)
            yield worth

    cost = CostCurve([(1, 10.0), (8, 11.0)])
    assert allot([stream(), [0.02]], 2, 2, cost) == [2, 0]  # type: ignore[list-item]
    assert next(read) < 12


@given(st.lists(worths, max_size=5), st.integers(0, 8), curves(), st.floats(0.0, 10.0))
def test_heads_run_only_where_that_is_faster(
    rows: list[list[float]], fixed: int, cost: CostCurve, heads_seconds: float
) -> None:
    num_rows = len(rows) + 1
    heads_cost = CostCurve([(1, heads_seconds), (2, 2 * heads_seconds)])
    paying = pays(rows, fixed, num_rows, cost, heads_cost)
    counts = [
        n if p else 0 for n, p in zip(allot(rows, fixed, num_rows, cost), paying, strict=True)
    ]
    seconds = cost.seconds(fixed + sum(counts))
    if any(paying):
        seconds += heads_cost.seconds(sum(paying))
    gain = num_rows + sum(sum(row[:n]) for row, n in zip(rows, counts, strict=True))
    assert gain / seconds >= num_rows / cost.seconds(fixed)
    assert all(counts[row] for row in range(len(rows)) if paying[row])


@given(st.lists(worths, max_size=5), st.integers(0, 8), curves())
def test_free_heads_run_for_all_rows_that_get_nodes_and_dear_ones_for_none(
    rows: list[list[float]], fixed: int, cost: CostCurve
) -> None:
    num_rows = len(rows) + 1
    free, dear = CostCurve([(1, 0.0)]), CostCurve([(1, 1e6)])
    counts = allot(rows, fixed, num_rows, cost)
    assert pays(rows, fixed, num_rows, cost, free) == [count > 0 for count in counts]
    assert not any(pays(rows, fixed, num_rows, cost, dear))


def test_rows_whose_drafts_are_poor_leave_first() -> None:
    cost = CostCurve([(1, 10.0), (32, 20.0)])
    good, poor = [0.8, 0.6, 0.5, 0.4], [0.15, 0.1]
    heads_cost = CostCurve([(1, 1.0), (8, 8.0)])
    assert pays([poor, good, poor], 3, 3, cost, heads_cost) == [False, True, False]
