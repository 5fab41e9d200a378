"""Draws, natively and in plain torch, against the reference and against exact probabilities."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels import sample as module
from lorastack.kernels.native.isa import Isa
from lorastack.kernels.ops import NativeOps
from lorastack.kernels.sample import Sample, sample_torch
from lorastack.request import SamplingParams
from lorastack.sampling.reference import sample_reference, survivors
from tests.helpers.guarded import guarded
from tests.helpers.isas import FLOAT32, each_of
from tests.helpers.logits import LOGITS_KINDS, make_logits

Way = Callable[[Tensor, Sequence[Sample]], list[int]]


def sample_native(isa: Isa, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
    """As the native ops do it, which leave typical tokens to torch."""
    return NativeOps(isa, None).sample(logits_XV, (), samples)


NATIVE = each_of(*FLOAT32, made=partial(partial, sample_native))
WAYS = [pytest.param(sample_torch, id="torch"), *NATIVE]
SEEDS = st.integers(0, 2**64 - 1)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.05, 0.2, 0.7, 1.0, 3.0, 1e3, 1e50]),
    top_k=st.sampled_from([0, 1, 2, 5, 12, 17, 40, 200]),
    top_p=st.sampled_from([1e-6, 0.1, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 1.0, 1e-6, 0.2, 0.5, 0.95]),
    seed=SEEDS,
)
ROWS = st.lists(st.tuples(PARAMS, st.integers(0, 10**6)), min_size=1, max_size=6)
KINDS = st.sampled_from(LOGITS_KINDS)


def expected(logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
    return [
        sample_reference(logits_XV[row].tolist(), params, index) for row, params, index in samples
    ]


def many(params: SamplingParams, count: int) -> list[Sample]:
    """The first `count` tokens, all of row 0."""
    return [Sample(0, params, index) for index in range(count)]


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=200)
@given(SEEDS, ROWS, st.integers(1, 150), KINDS)
def test_draws_are_the_references(
    way: Way, seed: int, rows: list[tuple[SamplingParams, int]], size: int, kind: str
) -> None:
    logits_XV = guarded(make_logits(seed, len(rows), size, kind))
    samples = [Sample(row, params, index) for row, (params, index) in enumerate(rows)]
    assert way(logits_XV, samples) == expected(logits_XV, samples)


@given(SEEDS, ROWS, st.integers(1, 150), KINDS)
def test_float64_logits_are_drawn_from_as_they_are(
    seed: int, rows: list[tuple[SamplingParams, int]], size: int, kind: str
) -> None:
    """Not as the float32 next to them: steps of 1e-9 decide."""
    logits_XV = 1 + 1e-9 * make_logits(seed, len(rows), size, kind).double()
    samples = [
        Sample(row, replace(params, temperature=1e-9 * params.temperature), index)
        for row, (params, index) in enumerate(rows)
    ]
    assert sample_torch(guarded(logits_XV), samples) == expected(logits_XV, samples)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=10)
@given(SEEDS, PARAMS, KINDS)
def test_draws_of_a_large_vocabulary_are_the_references(
    way: Way, seed: int, params: SamplingParams, kind: str
) -> None:
    logits_XV = guarded(make_logits(seed, 1, 9001, kind))
    samples = [Sample(0, params, 3)]
    assert way(logits_XV, samples) == expected(logits_XV, samples)


@pytest.mark.parametrize("way", NATIVE)
@pytest.mark.parametrize("kind", ["normal", "wide", "5 levels", "holes"])
@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=50, top_p=0.95),
        SamplingParams(temperature=2.0, min_p=0.05),
        SamplingParams(temperature=5.0, top_k=2000, top_p=0.2),
    ],
    ids=str,
)
def test_native_draws_are_those_of_torch(way: Way, kind: str, params: SamplingParams) -> None:
    logits_XV = make_logits(3, 200, 3001, kind)
    samples = [Sample(row, replace(params, seed=row), row) for row in range(200)]
    found = way(logits_XV, samples)
    assert found == sample_torch(logits_XV, samples)
    assert len(set(found)) > 1


@pytest.mark.parametrize("way", WAYS)
@given(SEEDS, st.lists(PARAMS, min_size=2, max_size=6), st.integers(1, 3), st.data())
def test_a_row_ignores_the_others(
    way: Way, seed: int, params: list[SamplingParams], num_threads: int, data: st.DataObject
) -> None:
    """Rows may be used twice, or not at all."""
    logits_XV = make_logits(seed, 4, 300)
    samples = [
        Sample(data.draw(st.integers(0, 3)), wanted, index) for index, wanted in enumerate(params)
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        together = way(logits_XV, samples)
        backwards = way(logits_XV, samples[::-1])
    finally:
        torch.set_num_threads(before)
    alone = [way(logits_XV[[row]], [Sample(0, wanted, index)])[0] for row, wanted, index in samples]
    assert together == alone == backwards[::-1]


@pytest.mark.parametrize("way", WAYS)
def test_forbidden_tokens_are_never_drawn(way: Way) -> None:
    logits_XV = torch.full((1, 50), -math.inf)
    logits_XV[0, 3] = logits_XV[0, 9] = 0.0
    for temperature in (1.0, 1e3, 1e50, 1e300):
        for top_p, top_k in ((1.0, 0), (0.9, 0), (0.9, 5)):
            params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k)
            drawn = {way(logits_XV, [each])[0] for each in many(params, 50)}
            assert drawn == {3, 9}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("places", [slice(None), slice(7, 8), slice(19, None)], ids=str)
def test_a_broken_row_leaves_the_others_alone(way: Way, value: float, places: slice) -> None:
    logits_XV = make_logits(1, 3, 20)
    params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=k, seed=k) for k in (5, 3, 0)]
    samples = [Sample(row, wanted, 0) for row, wanted in enumerate(params)]
    whole = way(logits_XV, samples)
    logits_XV[1, places] = value
    first, broken, last = way(logits_XV, samples)
    assert [first, last] == [whole[0], whole[2]]
    assert 0 <= broken < 20


@pytest.mark.parametrize("way", WAYS)
def test_temperatures_next_to_zero_are_greedy(way: Way) -> None:
    logits_XV = make_logits(2, 3, 20)
    params = [SamplingParams(temperature=t) for t in (1e-6, 1e-300, 5e-324)]
    samples = [Sample(row, wanted, row) for row, wanted in enumerate(params)]
    assert way(logits_XV, samples) == logits_XV.argmax(-1).tolist()


@pytest.mark.parametrize("way", WAYS)
def test_equal_scores_go_to_the_first_in_rank(way: Way) -> None:
    """Beside 1e30 the noise is rounded away; the lowest of the best ids is left."""
    logits_XV = torch.tensor([[0.0, 1.0, 2.0, 2.0, 1.0, 2.0]])
    params = SamplingParams(temperature=1e-30)
    assert {way(logits_XV, [each])[0] for each in many(params, 50)} == {2}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-40, 1e40, 1e300])
def test_any_temperature_draws_among_equals(way: Way, temperature: float) -> None:
    logits_XV = torch.zeros(1, 40)
    logits_XV[0, 20:] = -1.0
    samples = many(SamplingParams(temperature=temperature, top_p=0.7), 30)
    assert way(logits_XV, samples) == expected(logits_XV, samples)


@pytest.mark.parametrize("way", WAYS)
def test_a_huge_temperature_makes_the_farthest_logits_equal(way: Way) -> None:
    logits_XV = torch.tensor([[3e38, -3e38, -math.inf]])
    assert set(way(logits_XV, many(SamplingParams(temperature=1e300), 30))) == {0, 1}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gap", [1e-3, 0.1, 0.3, 0.34, 0.35, 0.7, 1.0, 1.7, 2.3])
@pytest.mark.parametrize("error", [-1e-13, 1e-13])
def test_the_border_of_top_p_is_exact(way: Way, gap: float, error: float) -> None:
    """The first token has top_p but for a trifle; that decides about the second."""
    logits_XV = torch.tensor([[0.5, 0.5 - gap]])
    gap = float(logits_XV[0, 0].double() - logits_XV[0, 1].double())
    params = SamplingParams(temperature=1.0, top_p=(1 + error) / (1 + math.exp(-gap)))
    assert set(way(logits_XV, many(params, 99))) == ({0, 1} if error > 0 else {0})


@pytest.mark.parametrize("way", WAYS)
def test_rounding_of_the_logits_does_not_change_draws(way: Way) -> None:
    logits_XV = make_logits(3, 300, 1000)
    noisy_XV = logits_XV * (1 + 1e-7 * make_logits(4, 300, 1000))
    samples = [Sample(row, SamplingParams(temperature=1.0, seed=5), row) for row in range(300)]
    assert way(logits_XV, samples) == way(noisy_XV, samples)


# 0.9999 quantiles of chi-square by degrees of freedom: one honest run in ten thousand fails, and
# the seeds are fixed.
CHI_SQUARE_9999 = {4: 23.51, 5: 25.74, 11: 37.37, 15: 44.26}
CASES = [
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.6, top_k=6, seed=12),
    SamplingParams(temperature=2.0, top_p=0.8, top_k=6, min_p=0.3, seed=13),
]
# Typical tokens are always left to torch.
TYPICAL = SamplingParams(temperature=1.3, top_k=11, typical_p=0.6, seed=14)
LOGITS_V = torch.tensor([0.1, 1.3, -0.4, 0.8, 0.8, -1.0, 0.3, 1.1, -0.2, 0.5, -0.6, 0.0])
COUNTED = [
    pytest.param(sample_torch, 4000, id="torch"),
    *(pytest.param(*each.values, 100_000, id=each.id, marks=each.marks) for each in NATIVE),
]


def statistic(tokens: Sequence[int], probabilities: dict[int, float]) -> float:
    """Chi-square of drawn tokens; infinite if one of them has no probability."""
    counts = Counter(tokens)
    if not counts.keys() <= probabilities.keys():
        return math.inf
    wanted = {token: len(tokens) * share for token, share in probabilities.items()}
    return sum((counts[token] - count) ** 2 / count for token, count in wanted.items())


def probabilities_of(params: SamplingParams) -> dict[int, float]:
    left = survivors(LOGITS_V.tolist(), params)
    total = sum(math.exp(value) for value in left.values())
    return {token: math.exp(value) / total for token, value in left.items()}


def drawn(way: Way, params: SamplingParams, count: int) -> list[int]:
    return way(LOGITS_V[None], many(params, count))


@pytest.mark.parametrize(
    ("params", "way", "count"),
    [
        *(
            pytest.param(case, *way.values, marks=way.marks, id=f"{way.id}-{case.seed}")
            for case in CASES
            for way in COUNTED
        ),
        pytest.param(TYPICAL, sample_torch, 4000, id="typical"),
    ],
)
def test_draws_follow_the_filtered_softmax(params: SamplingParams, way: Way, count: int) -> None:
    wanted = probabilities_of(params)
    assert statistic(drawn(way, params, count), wanted) < CHI_SQUARE_9999[len(wanted) - 1]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_the_chi_square_test_catches_wrong_noise(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = module.gumbel
    monkeypatch.setattr(module, "gumbel", lambda seed, index, ids: 0.5 * right(seed, index, ids))
    wanted = probabilities_of(params)
    assert statistic(drawn(sample_torch, params, 4000), wanted) > CHI_SQUARE_9999[len(wanted) - 1]


@pytest.mark.parametrize("way", NATIVE)
@pytest.mark.parametrize("params", CASES, ids=str)
def test_the_chi_square_test_catches_a_wrong_temperature(way: Way, params: SamplingParams) -> None:
    wanted = probabilities_of(params)
    warmer = replace(params, temperature=1.1 * params.temperature)
    assert statistic(drawn(way, warmer, 100_000), wanted) > CHI_SQUARE_9999[len(wanted) - 1]


@pytest.mark.parametrize("way", WAYS)
def test_positions_are_independent_draws(way: Way) -> None:
    """Pairs of neighbouring draws follow the product distribution."""
    tokens = way(torch.zeros(1, 4), many(SamplingParams(temperature=1.0, seed=2), 4000))
    pairs = [4 * a + b for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    assert statistic(pairs, dict.fromkeys(range(16), 1 / 16)) < CHI_SQUARE_9999[15]
