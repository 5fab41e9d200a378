"""Whose logits a token is drawn from, and log-probabilities; see tests/kernels for the draws."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lorastack.kernels.ops import NativeOps, Ops
from lorastack.kernels.sample import Sample
from lorastack.request import SamplingParams
from lorastack.sampling.processors import Processor
from lorastack.sampling.reference import sample_reference
from lorastack.sampling.sampler import NO_TOKEN, posterior, sample
from tests.helpers.isas import FLOAT32, each_of

WAYS = [
    pytest.param(Ops(), id="torch"),
    *each_of(*FLOAT32, made=lambda isa: NativeOps(isa, None)),
]
params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 12, 40]),
    top_p=st.sampled_from([1e-6, 0.3, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    typical_p=st.sampled_from([1.0, 1.0, 0.4]),
    seed=st.integers(0, 2**64 - 1),
)


def make_logits(seed: int, rows: int, size: int, levels: int | None) -> Tensor:
    """Random; with `levels`, few different values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed)
    if levels is not None:
        return torch.randint(levels, (rows, size), generator=generator).float()
    return 3 * torch.randn(rows, size, generator=generator)


@pytest.mark.parametrize(
    ("ops", "dtype"),
    [
        *(pytest.param(*way.values, torch.float32, id=way.id, marks=way.marks) for way in WAYS),
        pytest.param(Ops(), torch.float64, id="float64"),
    ],
)
@given(
    st.integers(0, 2**32),
    st.lists(
        st.builds(Sample, st.integers(0, 4), params_strategy, st.integers(0, 10**6)), max_size=6
    ),
    st.sampled_from([None, 2, 5]),
    st.data(),
)
def test_draws_equal_the_reference(
    ops: Ops,
    dtype: torch.dtype,
    seed: int,
    samples: list[Sample],
    levels: int | None,
    data: st.DataObject,
) -> None:
    """Some rows have a processor, which gave them logits of their own."""
    logits_XV = make_logits(seed, 5, 20, levels).to(dtype)
    others_XV = make_logits(seed + 1, len(samples), 20, levels).to(dtype)
    own = [other_V if data.draw(st.booleans()) else None for other_V in others_XV]
    assert sample(ops, logits_XV, ops.best(logits_XV)[1].tolist(), samples, own) == [
        sample_reference((logits_XV[row] if own_V is None else own_V).tolist(), params, index)
        for (row, params, index), own_V in zip(samples, own, strict=True)
    ]


@pytest.mark.parametrize("ops", WAYS)
def test_greedy_ties_go_to_the_lowest_id(ops: Ops) -> None:
    logits_XV = torch.zeros(3, 4000)
    logits_XV[1, 1999:] = 1.0
    logits_XV[2, 7] = logits_XV[2, 3999] = 2.0
    best_X = ops.best(logits_XV)[1].tolist()
    samples = [Sample(row, SamplingParams(), row) for row in range(3)]
    assert ops.sample(logits_XV, best_X, samples) == [0, 1999, 7]


@pytest.mark.parametrize("ops", WAYS)
@given(st.integers(0, 2**32), st.integers(0, 25), st.sampled_from([None, 3]))
def test_logprobs_equal_log_softmax(ops: Ops, seed: int, num_top: int, levels: int | None) -> None:
    logits_XV = make_logits(seed, 3, 20, levels)
    rows, tokens = [2, 0, 2], [7, 19, 0]
    results = ops.logprobs(logits_XV, rows, tokens, num_top)
    for result, row, token in zip(results, rows, tokens, strict=True):
        expected = logits_XV[row].double().log_softmax(0).tolist()
        ranked = sorted(range(20), key=lambda token: (-expected[token], token))[:num_top]
        assert result.logprob == pytest.approx(expected[token], abs=1e-12)
        assert [token for token, _ in result.top] == ranked
        assert [value for _, value in result.top] == pytest.approx([expected[t] for t in ranked])


@given(st.integers(0, 2**32), st.sampled_from([0.3, 1.0, 4.0]), st.lists(st.integers(0, 19)))
def test_a_posterior_is_medusas(seed: int, temperature: float, token_ids: list[int]) -> None:
    """FasterDecoding/Medusa, evaluate_posterior."""
    logits_V = make_logits(seed, 1, 20, None)[0]
    chances_V = torch.softmax(logits_V.double() / temperature, dim=-1)
    expected = -torch.sum(chances_V * torch.log(chances_V + 1e-5), dim=-1)
    entropy, chances = posterior(logits_V, temperature, token_ids)
    assert entropy == pytest.approx(float(expected), rel=1e-12)
    assert chances == pytest.approx([float(chances_V[token]) for token in token_ids], rel=1e-12)


def test_a_posterior_of_forbidden_tokens_is_nothing() -> None:
    logits_V = torch.tensor([0.0, -torch.inf, 0.0])
    entropy, chances = posterior(logits_V, 1.0, [1, 0])
    assert chances == [0.0, 0.5]
    assert entropy == pytest.approx(0.693, abs=1e-3)


extreme = st.sampled_from([1.4e-45, 1e-38, 1e-5, 1.0, 1e5, 3.4e38])
odd_logits = st.sampled_from(
    [0.0, -1.0, 3.0, 50.0, -3.4e38, 3.4e38, float("inf"), -float("inf"), float("nan")]
)


@pytest.mark.parametrize("ops", WAYS)
@given(
    st.lists(st.lists(odd_logits, min_size=9, max_size=9), min_size=1, max_size=3),
    st.sets(st.integers(0, 8)),
    st.builds(
        SamplingParams,
        temperature=st.one_of(st.just(0.0), extreme),
        top_k=st.sampled_from([0, 1, 3, 2**32 - 1]),
        top_p=st.sampled_from([1.4e-45, 0.5, 1.0]),
        min_p=st.sampled_from([0.0, 1.4e-45, 0.5, 1.0]),
        typical_p=st.sampled_from([1.4e-45, 0.5, 1.0]),
        repetition_penalty=extreme,
        frequency_penalty=st.sampled_from([-2.0, 0.0, 2.0]),
        logit_bias=st.just(((0, -100.0), (3, 100.0))),
        seed=st.integers(0, 2**64 - 1),
    ),
)
def test_whatever_the_values_a_token_is_allowed_or_there_is_none(
    ops: Ops, rows: list[list[float]], permitted: set[int], params: SamplingParams
) -> None:
    """As a grammar forbids: -inf. A row with a finite best gives a token, and one that is left."""
    logits_XV = torch.tensor(rows)
    processor = Processor(params, [1, 2, 3], None)
    processed = []
    for row_V in logits_XV:
        masked_V = row_V.clone()
        masked_V[[token for token in range(9) if token not in permitted]] = -torch.inf
        processed.append(processor.apply(masked_V, [3, 3]))
    samples = [Sample(row, params, 5) for row in range(len(rows))]
    found = sample(ops, logits_XV, ops.best(logits_XV)[1].tolist(), samples, processed)
    for token, row_V in zip(found, processed, strict=True):
        if row_V.max().isfinite():
            assert token in permitted and row_V[token].isfinite()
        else:
            assert token == NO_TOKEN
