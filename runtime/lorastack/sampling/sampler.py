"""Logits and parameters to tokens, and the model's own probabilities of tokens.

Filters in the order of transformers: temperature, top_k, top_p, min_p; `kernels.draw` says exactly
what they keep, and how one of the tokens that they leave is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lorastack.kernels import drafts
from lorastack.kernels import draw as kernel
from lorastack.request import SamplingParams, TokenLogprobs


def draw(
    logits_XV: Tensor,
    best_X: Sequence[int],
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    indices: Sequence[int],
) -> list[int]:
    """One token for each of `rows`, which choose among the rows of logits_XV.

    best_X: each row's best token, see `kernels.best`; temperature 0 takes it. params, indices:
    beside `rows`; indices of the generated token that each draws, from 0. A token depends on its
    row's logits (float32), params and index alone. Non-finite logits give some id, never an error.
    """
    tokens = [best_X[row] for row in rows]
    drawn = [place for place, wanted in enumerate(params) if not wanted.greedy]
    if drawn:
        found = kernel.draw(
            logits_XV,
            [rows[place] for place in drawn],
            [params[place] for place in drawn],
            [indices[place] for place in drawn],
        )
        for place, token in zip(drawn, found, strict=True):
            tokens[place] = token
    return tokens


def token_logprobs(logits_V: Tensor, token_id: int, num_top: int) -> TokenLogprobs:
    """Of the model's own distribution: before temperature and filters. Ties to the lowest id."""
    total = logits_V.double().logsumexp(0)
    num_top = min(num_top, len(logits_V))
    ids = drafts.top(logits_V[None], num_top).ids_XR[0] if num_top else logits_V.new_empty(0).long()
    values = logits_V[ids].double() - total
    return TokenLogprobs(
        logprob=float(logits_V[token_id].double() - total),
        top=tuple(zip(ids.tolist(), values.tolist(), strict=True)),
    )
