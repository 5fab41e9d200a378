"""The plain form of `sampler.draw`, for tests: sorts everything, one token at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lorastack.kernels.gumbel import hash_reference, uniform_reference
from lorastack.request import SamplingParams


def survivors(logits: Sequence[float], params: SamplingParams) -> dict[int, float]:
    """Token id -> logit / T of the tokens that the filters leave; temperature above 0."""
    scaled = {token: logit / params.temperature for token, logit in enumerate(logits)}
    ranked = sorted(scaled, key=lambda token: (-scaled[token], token))
    if params.top_k > 0:
        ranked = ranked[: params.top_k]
    peak = scaled[ranked[0]]
    weights = [math.exp(scaled[token] - peak) for token in ranked]
    enough = params.top_p * math.fsum(weights) if params.top_p < 1 else math.inf
    left, mass = {}, 0.0
    for token, weight in zip(ranked, weights, strict=True):
        if mass < enough and weight >= params.min_p:
            left[token] = scaled[token]
        mass += weight
    return left


def draw_reference(logits: Sequence[float], params: SamplingParams, index: int) -> int:
    """One row's token."""
    if params.greedy:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    left = survivors(logits, params)

    def score(token: int) -> float:
        uniform = uniform_reference(hash_reference(params.seed, index, token))
        return left[token] - math.log(-math.log(uniform))

    return max(left, key=score)
