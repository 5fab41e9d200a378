"""Logits and parameters to tokens, and the model's own probabilities of tokens.

First what `sampling.processors` makes of the logits. Then filters in the order of transformers:
temperature, top_k, top_p, min_p, typical_p; `kernels.draw` says exactly what they keep, and how one
of the tokens that they leave is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels import drafts
from lorastack.kernels import draw as kernel
from lorastack.kernels.best import best
from lorastack.request import SamplingParams, TokenLogprobs

_ENTROPY_SLACK = 1e-5  # Medusa's, against the logarithm of 0


def draw(
    logits_XV: Tensor,
    best_X: Sequence[int],
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    processed: Sequence[Tensor | None] = (),
) -> list[int]:
    """One token for each of `rows`, which choose among the rows of logits_XV.

    best_X: each row's best token, see `kernels.best`; temperature 0 takes it. params, indices:
    beside `rows`; indices of the generated token that each draws, from 0. processed: beside `rows`
    if given, what a processor made of the row's logits, or None. A token depends on its row's
    logits (float32 or float64), params and index alone. Non-finite logits give some id, never an
    error.
    """
    own = {place: row_V for place, row_V in enumerate(processed) if row_V is not None}
    plain = [place for place in range(len(rows)) if place not in own]
    groups = [(plain, logits_XV, best_X, [rows[place] for place in plain])]
    if own:
        own_XV = torch.stack(list(own.values()))
        groups.append((list(own), own_XV, best(own_XV)[1].tolist(), list(range(len(own)))))
    tokens = [0] * len(rows)
    for places, from_XV, best_from, from_rows in groups:
        found = _draw(
            from_XV,
            best_from,
            from_rows,
            [params[place] for place in places],
            [indices[place] for place in places],
        )
        for place, token in zip(places, found, strict=True):
            tokens[place] = token
    return tokens


def _draw(
    logits_XV: Tensor,
    best_X: Sequence[int],
    rows: Sequence[int],
    params: Sequence[SamplingParams],
    indices: Sequence[int],
) -> list[int]:
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


def posterior(
    logits_V: Tensor, temperature: float, token_ids: Sequence[int]
) -> tuple[float, list[float]]:
    """What typical acceptance asks of a node: the entropy, and the probabilities of `token_ids`.

    Of the softmax at `temperature` above 0, without filters; the entropy in Medusa's form,
    -sum p log(p + 1e-5), natural logarithms. Non-finite logits give NaN or some number.
    """
    chances_V = (logits_V.double() / temperature).softmax(0)
    entropy = -(chances_V * (chances_V + _ENTROPY_SLACK).log()).sum()
    return float(entropy), chances_V[list(token_ids)].tolist()


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
