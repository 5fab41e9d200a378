"""The plain reference keeps the tokens that transformers' warpers keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from lorastack.request import SamplingParams
from lorastack.sampling.reference import survivors


@given(
    st.integers(0, 2**32),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 7, 50]),
    st.sampled_from([0.2, 0.7, 0.95, 1.0]),
    st.sampled_from([0.0, 0.05, 0.4]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_survivors_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, typical_p: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_V = 2 * torch.randn(60, generator=generator, dtype=torch.float64)
    warpers = [TemperatureLogitsWarper(temperature)]
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    if typical_p < 1:
        warpers.append(TypicalLogitsWarper(typical_p))
    scores_XV = logits_V[None]
    for warper in warpers:
        scores_XV = warper(None, scores_XV)
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, typical_p=typical_p
    )
    left = survivors(logits_V.tolist(), params)
    kept = (scores_XV[0] > -torch.inf).nonzero()[:, 0].tolist()
    assert sorted(left) == kept
    assert [left[token] for token in kept] == pytest.approx(scores_XV[0, kept].tolist(), rel=1e-12)
