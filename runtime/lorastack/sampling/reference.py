"""Processors and samples in plain Python, for tests: everything one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from lorastack.kernels.gumbel import hash_reference, uniform_reference
from lorastack.request import SamplingParams


def processed(
    logits: Sequence[float], params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> list[float]:
    """What `Processor.apply` gives for the token after these, without a grammar."""
    biases, counts, seen = dict(params.logit_bias), Counter(output), {*prompt, *output}
    results = []
    for token, logit in enumerate(logits):
        logit += biases.get(token, 0.0)
        if token in seen:
            penalty = params.repetition_penalty
            logit = logit / penalty if logit > 0 else logit * penalty
        logit -= params.frequency_penalty * counts[token]
        results.append(logit - params.presence_penalty if counts[token] else logit)
    return results


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
    return _typical(left, params.typical_p) if params.typical_p < 1 else left


def _typical(scaled: dict[int, float], mass: float) -> dict[int, float]:
    """The tokens whose surprise is nearest to the entropy, until they hold `mass`; ties stay."""
    peak = max(scaled.values())
    total = math.log(math.fsum(math.exp(value - peak) for value in scaled.values()))
    logprobs = {token: value - peak - total for token, value in scaled.items()}
    entropy = -math.fsum(
        math.exp(value) * value for value in logprobs.values() if value > -math.inf
    )
    distance = {token: abs(value + entropy) for token, value in logprobs.items()}
    held, last = 0.0, 0.0
    for token in sorted(distance, key=lambda token: distance[token]):
        last = distance[token]
        held += math.exp(logprobs[token])
        if held >= mass:
            break
    return {token: value for token, value in scaled.items() if distance[token] <= last}


def sample_reference(logits: Sequence[float], params: SamplingParams, index: int) -> int:
    """What `Ops.sample` gives for one row."""
    if params.greedy:
        return max(range(len(logits)), key=lambda token: (logits[token], -token))
    left = survivors(logits, params)

    def score(token: int) -> float:
        uniform = uniform_reference(hash_reference(params.seed, index, token))
        return left[token] - math.log(-math.log(uniform))

    return max(left, key=score)
