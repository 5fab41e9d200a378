"""One token of a row of logits, drawn.

Contract. Each of `samples`, none of them greedy, gives a token of its row of logits_XV, float32 or
float64, each row contiguous. The token depends on that row, params and token_index alone; params'
seed and token_index choose the noise. Tokens rank by logit, ties by the lower id. With temperature
T above 0 the filters work in the order of transformers: top_k keeps the first k; top_p keeps the
shortest run of first tokens whose probabilities (after temperature, among what top_k left) reach
top_p; min_p keeps tokens at least min_p times as probable as the first. The token drawn is
argmax(logit / T + Gumbel noise) over what is left, in float64. Non-finite logits, or a T so near 0
that the best logit / T is infinite, give some id.

The vocabulary is never sorted, unless typical_p is asked for: whether a token is inside top_p's run
takes one sum over the tokens before it. Both ways take these sums in float64 but not in one order,
so they agree but for a sum within 1e-12 of top_p. The native kernel runs all rows as one parallel
region, and computes noise only for tokens that it could make the best; it has neither typical_p nor
float64. The plain reference is in `lorastack.sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lorastack.kernels.gumbel import gumbel, stream
from lorastack.kernels.native import library as native
from lorastack.kernels.native.isa import Isa
from lorastack.request import SamplingParams

_SLACK = 1 - 1e-6  # for rounding of float64 sums


class Sample(NamedTuple):
    """row: of the logits. token_index: of the generated token that it makes, from 0."""

    row: int
    params: SamplingParams
    token_index: int


def sample_torch(logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
    """See the module. logits_XV: on any device. One token after the other, up to a ms each."""
    return [_sample_row(logits_XV[row], params, index) for row, params, index in samples]


def _sample_row(logits_V: Tensor, params: SamplingParams, index: int) -> int:
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
    if params.typical_p < 1:
        enough = params.top_p * total if params.top_p < 1 else math.inf
        left = _typical(scaled, weights, enough, params.typical_p)
        return int(ids[score.masked_fill_(~left, -math.inf).argmax()])
    while True:
        best = int(score.argmax())
        before = (scaled > scaled[best]) | ((scaled == scaled[best]) & (ids < ids[best]))
        if params.top_p >= 1 or float(weights[before].sum()) < params.top_p * total:
            return int(ids[best])
        # Outside the run, and with it all that ranks behind it.
        score.masked_fill_(~before, -math.inf)


def _typical(scaled: Tensor, weights: Tensor, enough: float, mass: float) -> Tensor:
    """True for each token that top_p, whose run weighs `enough`, and typical_p, `mass`, leave."""
    run = torch.arange(len(scaled), device=scaled.device)
    if enough < math.inf:
        order = scaled.argsort(descending=True, stable=True)
        ranked = weights[order]
        run = order[ranked.cumsum(0) - ranked < enough]
    logprobs = scaled[run] - scaled[run].logsumexp(0)
    chances = logprobs.exp()
    distance = (logprobs + torch.special.entr(chances).sum()).abs()
    nearest = distance.argsort()
    num_before = (chances[nearest].cumsum(0) < mass).sum().clamp(max=len(run) - 1)
    left = torch.zeros_like(scaled, dtype=torch.bool)
    left[run[distance <= distance[nearest[num_before]]]] = True
    return left


def _top(logits_V: Tensor, num: int) -> Tensor:
    """The `num` first ids by logit, ties to the lowest; ids with equal logits rise."""
    cut = logits_V.topk(num).values[-1]
    above = (logits_V > cut).nonzero()[:, 0]
    level = (logits_V == cut).nonzero()[: num - len(above), 0]
    return torch.cat([above, level])


def sample_native(isa: Isa, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
    """See the module. logits_XV: float32 on a CPU that has `isa`, which computes in it; none of
    `samples` has typical_p."""
    structs = (native.Sample * len(samples))(
        *(
            native.Sample(
                stream(params.seed, index),
                params.temperature,
                params.top_p,
                params.min_p,
                row,
                min(params.top_k, logits_XV.shape[1]),
            )
            for row, params, index in samples
        )
    )
    tokens = torch.empty(len(samples), dtype=torch.int64)
    library = native.library()
    assert library is not None
    library.lorastack_sample_rows(
        isa,
        logits_XV.data_ptr(),
        logits_XV.stride(0),
        logits_XV.shape[1],
        structs,
        len(samples),
        tokens.data_ptr(),
        torch.get_num_threads(),
    )
    token_ids: list[int] = tokens.tolist()
    return token_ids
