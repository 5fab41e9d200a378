"""Logits and parameters to tokens, and the model's own probabilities of tokens.

First what `sampling.processors` makes of the logits. Then filters in the order of transformers:
temperature, top_k, top_p, min_p, typical_p; `kernels.sample` says exactly what they keep, and how
one of the tokens that they leave is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels import heads as drafts
from lorastack.kernels import sample as kernel
from lorastack.kernels.best import best
from lorastack.kernels.sample import Sample
from lorastack.request import TokenLogprobs

NO_TOKEN = -1  # in place of an id
_ENTROPY_SLACK = 1e-5  # Medusa's, against the logarithm of 0


def sample(
    logits_XV: Tensor,
    best_X: Sequence[int],
    samples: Sequence[Sample],
    processed: Sequence[Tensor | None] = (),
) -> list[int]:
    """One token for each of `samples`.

    best_X: each row's best token, see `kernels.best`; temperature 0 takes it. processed: beside
    `samples` if given, what a processor made of the row's logits, or None; NO_TOKEN where that has
    no finite best: every token is forbidden, or some logit is too large or NaN. A token depends on
    its row's logits (float32 or float64), params and token_index alone. A model's own logits that
    are not finite give some id, never an error.
    """
    rows = [row_V for row_V in processed if row_V is not None]
    if rows:
        own_XV = torch.stack(rows)
        own = [each for each, row_V in zip(samples, processed, strict=True) if row_V is not None]
        plain = [each for each, row_V in zip(samples, processed, strict=True) if row_V is None]
        by_model = iter(sample(logits_XV, best_X, plain))
        by_own = iter(_sample_processed(own_XV, own))
        return [next(by_model if row_V is None else by_own) for row_V in processed]
    sampled = [each for each in samples if not each.params.greedy]
    if not sampled:
        return [best_X[row] for row, _, _ in samples]
    found = iter(kernel.sample(logits_XV, sampled))
    return [best_X[row] if params.greedy else next(found) for row, params, _ in samples]


def _sample_processed(logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
    """A token, or NO_TOKEN, for each of the rows."""
    peaks_X, best_X = (each_X.tolist() for each_X in best(logits_XV))
    sound = [row for row, peak in enumerate(peaks_X) if math.isfinite(peak)]
    moved = [samples[row]._replace(row=row) for row in sound]
    found = dict(zip(sound, sample(logits_XV, best_X, moved), strict=True))
    return [found.get(row, NO_TOKEN) for row in range(len(samples))]


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
