"""Penalties, biases and grammars on logits, against a plain reference and transformers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import RepetitionPenaltyLogitsProcessor

from lorastack.request import SamplingParams
from lorastack.sampling.processors import Processor, needs_processor
from lorastack.sampling.reference import processed

SIZE = 40
TOKENS = st.integers(0, SIZE - 1)
PATHS = st.lists(TOKENS, max_size=5)
PENALTIES = st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 2.0])
PARAMS = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([0.5, 1.0, 1.25, 4.0]),
    frequency_penalty=PENALTIES,
    presence_penalty=PENALTIES,
    logit_bias=st.dictionaries(TOKENS, st.sampled_from([-100.0, -1.5, 2.0, 100.0]), max_size=4).map(
        lambda biases: tuple(biases.items())
    ),
)
SEEDS = st.integers(0, 2**32)


class ParityMatcher:
    """A grammar whose tokens are congruent to the sum of those before, modulo 3."""

    error = ""
    finished = False

    def __init__(self) -> None:
        self._committed: list[int] = []
        self._path: list[int] = []

    def seek(self, path: Sequence[int]) -> None:
        self._path = list(path)

    def commit(self, tokens: Sequence[int]) -> None:
        self._committed += tokens
        self._path = []

    def mask(self) -> bytes:
        place = sum(self._committed + self._path) % 3
        bits = sum(1 << token for token in range(SIZE) if token % 3 == place)
        return bits.to_bytes(-(-SIZE // 32) * 4, "little")

    def forced(self, limit: int) -> tuple[int, ...]:
        raise AssertionError

    def matcher(self) -> ParityMatcher:
        return ParityMatcher()


def make_logits(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    logits_V = 3 * torch.randn(SIZE, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    logits_V[seed % SIZE] = 0.0
    logits_V[(seed + 1) % SIZE] = -math.inf
    return logits_V


@given(
    SEEDS,
    PARAMS,
    st.lists(TOKENS, max_size=30),
    st.lists(st.tuples(PATHS, st.lists(PATHS, max_size=4)), max_size=4),
    st.booleans(),
)
def test_every_path_sees_what_plain_generation_would_see(
    seed: int,
    params: SamplingParams,
    prompt: list[int],
    steps: list[tuple[list[int], list[list[int]]]],
    constrained: bool,
) -> None:
    """Steps of paths in any order, one of which the row then takes."""
    processor = Processor(params, prompt, ParityMatcher() if constrained else None)
    output: list[int] = []
    for taken, paths in steps:
        for path in (*paths, taken, []):
            logits_V = make_logits(seed)
            found_V = processor.apply(logits_V, path)
            logits = logits_V.tolist()
            if constrained:
                place = sum(output + path) % 3
                logits = [v if token % 3 == place else -math.inf for token, v in enumerate(logits)]
            expected = processed(logits, params, prompt, output + path)
            assert found_V.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            assert torch.equal(logits_V, make_logits(seed)), "the model's own logits stay"
        processor.commit(taken)
        output += taken


@given(SEEDS, PARAMS, PATHS, PATHS, PATHS)
def test_a_path_gives_the_bits_that_committing_it_gives(
    seed: int, params: SamplingParams, prompt: list[int], output: list[int], path: list[int]
) -> None:
    drafted, plain = Processor(params, prompt, None), Processor(params, prompt, None)
    drafted.apply(make_logits(seed), [*path, 1])
    drafted.commit(output)
    for token in output + path:
        plain.commit([token])
    logits_V = make_logits(seed, torch.float32)
    assert torch.equal(drafted.apply(logits_V, path), plain.apply(logits_V, []))


@given(SEEDS, st.lists(TOKENS, min_size=1, max_size=30), st.sampled_from([0.3, 1.0, 1.7]))
def test_the_repetition_penalty_is_that_of_transformers(
    seed: int, tokens: list[int], penalty: float
) -> None:
    logits_V = make_logits(seed, torch.float32)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([tokens]), logits_V[None])[0]
    half = len(tokens) // 2
    processor = Processor(SamplingParams(repetition_penalty=penalty), tokens[:half], None)
    processor.commit(tokens[half:-1])
    torch.testing.assert_close(processor.apply(logits_V, tokens[-1:]), theirs)


def test_thousands_of_distinct_tokens_are_counted() -> None:
    params = SamplingParams(frequency_penalty=1.0, repetition_penalty=2.0)
    processor = Processor(params, range(1000), None)
    tokens = [*range(500, 4000), *range(3000, 3500)]
    for start in range(0, len(tokens), 7):
        processor.commit(tokens[start : start + 7])
    found_V = processor.apply(torch.full((5000,), 8.0, dtype=torch.float64), range(4000, 4500))
    counts = Counter([*tokens, *range(4000, 4500)])
    seen = {*range(1000), *counts}
    assert found_V.tolist() == [(4.0 if t in seen else 8.0) - counts[t] for t in range(5000)]


def test_a_mask_is_as_long_as_the_vocabulary() -> None:
    """Ids of padding, behind the last of the tokenizer's, and bits behind the last id."""

    class ShortMatcher(ParityMatcher):
        def mask(self) -> bytes:
            return b"\xff" * 4

    found_V = Processor(SamplingParams(), (), ShortMatcher()).apply(torch.zeros(40), [])
    assert found_V.tolist() == [0.0] * 32 + [-math.inf] * 8
    found_V = Processor(SamplingParams(), (), ShortMatcher()).apply(torch.zeros(30), [])
    assert found_V.tolist() == [0.0] * 30


def test_extreme_penalties_never_make_nan() -> None:
    logits_V = torch.tensor([-1.0, 0.0, 1.0, -math.inf, 3e38, -3e38])
    for penalty in (1e-45, 3.4e38):
        params = SamplingParams(
            repetition_penalty=penalty, frequency_penalty=-2.0, logit_bias=((3, 100.0),)
        )
        found_V = Processor(params, range(6), None).apply(logits_V, [3, 4])
        assert not found_V.isnan().any()


@pytest.mark.parametrize(
    ("params", "needed"),
    [
        (SamplingParams(temperature=0.7, top_k=3, top_p=0.5, min_p=0.1, typical_p=0.9), False),
        (SamplingParams(repetition_penalty=1.1), True),
        (SamplingParams(frequency_penalty=-1.0), True),
        (SamplingParams(presence_penalty=0.1), True),
        (SamplingParams(logit_bias=((1, 2.0),)), True),
    ],
)
def test_who_needs_a_processor(params: SamplingParams, needed: bool) -> None:
    assert needs_processor(params, None) is needed
    assert needs_processor(params, ParityMatcher())
