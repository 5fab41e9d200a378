"""Logits and parameters to tokens.

Filters in the order of transformers: temperature, top_k, top_p, min_p. Tokens rank by logit, ties
by the lower id. top_k keeps the first k; top_p keeps the shortest run of first tokens whose
probabilities (after temperature, among what top_k left) reach top_p; min_p keeps tokens at least
min_p times as probable as the first. The token drawn is argmax(logit / T + Gumbel noise) over what
is left.

The vocabulary is never sorted: whether a token is inside top_p's run takes one sum over the tokens
before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.request import SamplingParams, TokenLogprobs
from lorastack.sampling.gumbel import gumbel

_SLACK = 1 - 1e-6  # for rounding of float64 sums


def draw(logits_BV: Tensor, params: Sequence[SamplingParams], indices: Sequence[int]) -> list[int]:
    """One token a row. indices: of the generated token that each row draws, from 0.

    A row's token depends on its own logits (float32), params and index alone. Temperature 0 takes
    the best logit, ties to the lowest id. Non-finite logits give some id, never an error.
    """
    greedy = [row for row, wanted in enumerate(params) if wanted.greedy]
    if len(greedy) == len(params):
        return _best_ids(logits_BV)
    tokens = dict(zip(greedy, _best_ids(logits_BV[greedy]), strict=True))
    for row, wanted in enumerate(params):
        if not wanted.greedy:
            tokens[row] = _draw_row(logits_BV[row], wanted, indices[row])
    return [tokens[row] for row in range(len(params))]


def token_logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Of the model's own distribution: before temperature and filters. Ties to the lowest id."""
    total = logits_V.double().logsumexp(0)
    ids = _top(logits_V, min(num_top, len(logits_V)))
    values = logits_V[ids].double() - total
    order = values.argsort(descending=True, stable=True)
    return TokenLogprobs(
        logprob=float(logits_V[token_id].double() - total),
        top=tuple(zip(ids[order].tolist(), values[order].tolist(), strict=True)),
    )


def _best_ids(logits_BV: Tensor) -> list[int]:
    ids: list[int] = logits_BV.argmax(dim=-1).tolist()  # torch promises the first maximum
    return ids


def _draw_row(logits_V: Tensor, params: SamplingParams, index: int) -> int:
    peak = float(logits_V.max()) / params.temperature
    if not math.isfinite(peak):
        # NaN or infinite: nothing to draw from, and the caller's other rows must go on. Or the
        # temperature is next to 0.
        return int(logits_V.argmax())
    if 0 < params.top_k < len(logits_V):
        ids = _top(logits_V, params.top_k)
    else:
        ids = torch.arange(len(logits_V), device=logits_V.device)
    scaled = logits_V[ids].double() / params.temperature
    weights = (scaled - peak).exp()
    # A token inside top_p's run has more than 1 - top_p at and behind it, shared among at most all
    # tokens, none above its own. Lighter ones need no noise.
    total = float(weights.sum())
    least = (1 - params.top_p) * total / len(ids) * _SLACK
    kept = (weights >= max(params.min_p, least)).nonzero()[:, 0]
    ids, scaled, weights = ids[kept], scaled[kept], weights[kept]
    score = scaled + gumbel(params.seed, index, ids)
    while True:
        best = int(score.argmax())
        before = (scaled > scaled[best]) | ((scaled == scaled[best]) & (ids < ids[best]))
        if params.top_p >= 1 or float(weights[before].sum()) < params.top_p * total:
            return int(ids[best])
        # Outside the run, and with it all that ranks behind it.
        score.masked_fill_(~before, -math.inf)


def _top(logits_V: Tensor, num: int) -> Tensor:
    """The `num` first ids by logit, ties to the lowest; in rising order within equal logits."""
    if num == 0:
        return torch.empty(0, dtype=torch.int64, device=logits_V.device)
    cut = logits_V.topk(num).values[-1]
    above = (logits_V > cut).nonzero()[:, 0]
    level = (logits_V == cut).nonzero()[: num - len(above), 0]
    return torch.cat([above, level])
