import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lorastack.request import SamplingParams
from lorastack.sampling import sampler
from lorastack.sampling.gumbel import gumbel
from lorastack.sampling.reference import draw_reference, survivors
from lorastack.sampling.sampler import draw, token_logprobs

params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 12, 40]),
    top_p=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 2**64 - 1),
)


def make_logits(seed: int, rows: int, size: int, levels: int | None) -> Tensor:
    """Random; with `levels`, few different values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (rows, size), generator=generator).float()
    return 3 * torch.randn(rows, size, generator=generator)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.tuples(params_strategy, st.integers(0, 10**6)), min_size=1, max_size=5),
    st.sampled_from([None, 2, 5]),
)
def test_draws_equal_the_reference(
    seed: int, rows: list[tuple[SamplingParams, int]], levels: int | None
) -> None:
    logits_BV = make_logits(seed, len(rows), 20, levels)
    tokens = draw(logits_BV, [params for params, _ in rows], [index for _, index in rows])
    assert tokens == [
        draw_reference(row.tolist(), params, index)
        for row, (params, index) in zip(logits_BV, rows, strict=True)
    ]


@settings(deadline=None)
@given(st.integers(0, 2**32), st.lists(params_strategy, min_size=2, max_size=6))
def test_a_row_ignores_the_others(seed: int, params: list[SamplingParams]) -> None:
    logits_BV = make_logits(seed, len(params), 30, None)
    together = draw(logits_BV, params, range(len(params)))
    alone = [draw(logits_BV[[row]], [params[row]], [row])[0] for row in range(len(params))]
    backwards = draw(logits_BV.flip(0), params[::-1], range(len(params))[::-1])
    assert together == alone == backwards[::-1]


def test_greedy_ties_go_to_the_lowest_id() -> None:
    logits_BV = torch.zeros(3, 4000)
    logits_BV[1, 1999:] = 1.0
    logits_BV[2, 7] = logits_BV[2, 3999] = 2.0
    assert draw(logits_BV, [SamplingParams()] * 3, [0, 1, 2]) == [0, 1999, 7]


def test_forbidden_tokens_are_never_drawn() -> None:
    logits_BV = torch.full((1, 50), -math.inf)
    logits_BV[0, 3] = logits_BV[0, 9] = 0.0
    for top_p, top_k in ((1.0, 0), (0.9, 0), (0.9, 5)):
        params = SamplingParams(temperature=1.0, top_p=top_p, top_k=top_k)
        drawn = {draw(logits_BV, [params], [index])[0] for index in range(50)}
        assert drawn == {3, 9}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_row_leaves_the_others_alone(value: float) -> None:
    logits_BV = make_logits(1, 3, 20, None)
    params = [SamplingParams(temperature=1.0, top_p=0.9, top_k=k, seed=k) for k in (5, 3, 0)]
    whole = draw(logits_BV, params, [0, 0, 0])
    logits_BV[1] = value
    first, broken, last = draw(logits_BV, params, [0, 0, 0])
    assert [first, last] == [whole[0], whole[2]]
    assert 0 <= broken < 20


def test_temperatures_next_to_zero_are_greedy() -> None:
    logits_BV = make_logits(2, 4, 20, None)
    params = [SamplingParams(temperature=t) for t in (0.0, 1e-6, 1e-300, 5e-324)]
    best = logits_BV.argmax(-1).tolist()
    assert draw(logits_BV, params, range(4)) == best


def test_float32_rounding_of_the_logits_does_not_change_draws() -> None:
    logits_BV = make_logits(3, 300, 1000, None)
    noisy_BV = logits_BV * (1 + 1e-7 * make_logits(4, 300, 1000, None))
    params = [SamplingParams(temperature=1.0, seed=5)] * 300
    assert draw(logits_BV, params, range(300)) == draw(noisy_BV, params, range(300))


# 0.9999 quantiles of chi-square by degrees of freedom: one honest run in ten thousand fails, and
# the seeds are fixed.
CHI_SQUARE_9999 = {4: 23.51, 5: 25.74, 11: 37.37}
NUM_DRAWS = 4000
CASES = [
    SamplingParams(temperature=1.0, seed=11),
    SamplingParams(temperature=0.6, top_k=6, seed=12),
    SamplingParams(temperature=2.0, top_p=0.8, top_k=6, min_p=0.3, seed=13),
]
LOGITS_V = torch.tensor([0.1, 1.3, -0.4, 0.8, 0.8, -1.0, 0.3, 1.1, -0.2, 0.5, -0.6, 0.0])


def chi_square(params: SamplingParams) -> tuple[float, int]:
    """The statistic of NUM_DRAWS draws against the filtered softmax, and its degrees of freedom."""
    logits_BV = LOGITS_V.expand(NUM_DRAWS, -1)
    counts = Counter(draw(logits_BV, [params] * NUM_DRAWS, range(NUM_DRAWS)))
    left = survivors(LOGITS_V.tolist(), params)
    assert set(counts) <= set(left)
    total = sum(math.exp(value) for value in left.values())
    expected = {token: NUM_DRAWS * math.exp(value) / total for token, value in left.items()}
    return sum((counts[t] - e) ** 2 / e for t, e in expected.items()), len(left) - 1


@pytest.mark.parametrize("params", CASES, ids=str)
def test_draws_follow_the_filtered_softmax(params: SamplingParams) -> None:
    statistic, freedom = chi_square(params)
    assert statistic < CHI_SQUARE_9999[freedom]


@pytest.mark.parametrize("params", CASES, ids=str)
def test_the_chi_square_test_catches_wrong_noise(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler, "gumbel", lambda seed, index, ids: 0.5 * gumbel(seed, index, ids))
    statistic, freedom = chi_square(params)
    assert statistic > CHI_SQUARE_9999[freedom]


def test_positions_are_independent_draws() -> None:
    """Pairs of neighbouring draws follow the product distribution."""
    logits_BV = torch.zeros(4000, 4)
    params = [SamplingParams(temperature=1.0, seed=2)] * 4000
    tokens = draw(logits_BV, params, range(4000))
    pairs = Counter(zip(tokens[::2], tokens[1::2], strict=True))
    expected = 2000 / 16
    statistic = sum((pairs[a, b] - expected) ** 2 / expected for a in range(4) for b in range(4))
    assert statistic < 44.3  # 0.9999 quantile, 15 degrees of freedom


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 25), st.sampled_from([None, 3]))
def test_logprobs_equal_log_softmax(seed: int, num_top: int, levels: int | None) -> None:
    logits_V = make_logits(seed, 1, 20, levels)[0]
    expected = logits_V.double().log_softmax(0).tolist()
    result = token_logprobs(logits_V, 7, num_top)
    ranked = sorted(range(20), key=lambda token: (-expected[token], token))[:num_top]
    assert result.logprob == pytest.approx(expected[7], abs=1e-12)
    assert [token for token, _ in result.top] == ranked
    assert [value for _, value in result.top] == pytest.approx([expected[t] for t in ranked])
