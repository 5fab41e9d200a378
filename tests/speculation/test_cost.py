from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.speculation.cost import CostCurve

POINTS = [(1, 10.0), (8, 12.0), (16, 20.0), (32, 36.0)]


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    tokens = sorted(draw(st.sets(st.integers(1, 64), min_size=1, max_size=6)))
    return CostCurve([(at, draw(st.floats(0.1, 10.0))) for at in tokens])


steps = st.lists(st.tuples(st.integers(1, 80), st.floats(0.01, 100.0)), max_size=30)


def test_it_is_straight_between_points_flat_before_them_and_goes_on_behind() -> None:
    curve = CostCurve(POINTS)
    assert [curve.seconds(n) for n in (0, 1, 8, 12, 32)] == [10.0, 10.0, 12.0, 16.0, 36.0]
    assert curve.seconds(40) == pytest.approx(44.0)
    assert CostCurve([(4, 3.0)]).seconds(100) == 3.0


@given(curves(), steps)
def test_it_never_falls_whatever_it_sees(curve: CostCurve, seen: list[tuple[int, float]]) -> None:
    for tokens, seconds in seen:
        curve.record(tokens, seconds)
    costs = [curve.seconds(tokens) for tokens in range(90)]
    assert costs[0] > 0
    assert all(low <= high * (1 + 1e-9) for low, high in pairwise(costs))


@given(curves(), st.integers(1, 70))
def test_the_least_slope_bounds_every_number_of_more_tokens(curve: CostCurve, tokens: int) -> None:
    here = curve.seconds(tokens)
    slopes = [(curve.seconds(tokens + more) - here) / more for more in (*range(1, 100), 10**6)]
    least = curve.least_slope(tokens)
    assert all(least <= slope + 1e-9 for slope in slopes)
    assert min(slopes) <= least + 1e-3  # the last slope is reached at the end of time


def test_a_machine_twice_as_slow_is_soon_known_everywhere() -> None:
    curve, truth = CostCurve(POINTS), CostCurve([(n, 2 * s) for n, s in POINTS])
    for _ in range(60):
        curve.record(8, truth.seconds(8))
    assert curve.seconds(8) == pytest.approx(truth.seconds(8), rel=0.02)
    assert curve.seconds(32) == pytest.approx(truth.seconds(32), rel=0.2)


def test_the_shape_follows_in_the_long_run() -> None:
    curve, truth = CostCurve(POINTS), CostCurve([(1, 10.0), (8, 11.0), (16, 12.0), (32, 13.0)])
    for step in range(4000):
        tokens = 1 + step % 32
        curve.record(tokens, truth.seconds(tokens))
    for tokens in (1, 8, 12, 16, 24, 32):
        assert curve.seconds(tokens) == pytest.approx(truth.seconds(tokens), rel=0.05)


def test_one_stall_moves_it_little() -> None:
    curve = CostCurve(POINTS)
    curve.record(8, 5000.0)
    assert curve.seconds(8) < 1.1 * 12.0


def test_measured_points_that_fall_are_raised() -> None:
    assert CostCurve([(1, 3.0), (2, 1.0), (3, 4.0)]).points == [(1, 3.0), (2, 3.0), (3, 4.0)]
