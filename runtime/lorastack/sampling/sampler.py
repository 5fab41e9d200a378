"""Logits and parameters to tokens, on the host.

`sampling.processors` changes the logits first. Then filters work in the order of transformers:
temperature, top_k, top_p, min_p, typical_p; `kernels.sample` says exactly what they keep, and how
one of the tokens that they leave is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels.ops import Ops
from lorastack.kernels.sample import Sample

NO_TOKEN = -1  # in place of an id
_ENTROPY_SLACK = 1e-5  # Medusa's, against the logarithm of 0


def sample(
    ops: Ops,
    logits_XV: Tensor,
    best_X: Sequence[int],
    samples: Sequence[Sample],
    processed: Sequence[Tensor | None],
) -> list[int]:
    """One token for each of `samples`, as `Ops.sample` but for rows that have a processor.

    processed: beside `samples`, what a processor made of the row's logits, or None; NO_TOKEN where
    that has no finite best: every token is forbidden, or some logit is too large or NaN.
    """
    own = [each for each, row_V in zip(samples, processed, strict=True) if row_V is not None]
    plain = [each for each, row_V in zip(samples, processed, strict=True) if row_V is None]
    by_model = iter(ops.sample(logits_XV, best_X, plain))
    by_own = iter(_sample_processed(ops, [row_V for row_V in processed if row_V is not None], own))
    return [next(by_model if row_V is None else by_own) for row_V in processed]


def _sample_processed(ops: Ops, rows: Sequence[Tensor], samples: Sequence[Sample]) -> list[int]:
    """A token, or NO_TOKEN, for each of the rows."""
    if not rows:
        return []
    logits_XV = torch.stack(list(rows))
    peaks_X, best_X = (each_X.tolist() for each_X in ops.best(logits_XV))
    sound = [row for row, peak in enumerate(peaks_X) if math.isfinite(peak)]
    tokens = ops.sample(logits_XV, best_X, [samples[row]._replace(row=row) for row in sound])
    token_of = dict(zip(sound, tokens, strict=True))
    return [token_of.get(row, NO_TOKEN) for row in range(len(samples))]


def posterior(
    logits_V: Tensor, temperature: float, token_ids: Sequence[int]
) -> tuple[float, list[float]]:
    """What typical acceptance asks of a node: the entropy, and the probabilities of `token_ids`.

    Both are of the softmax at `temperature` above 0, without filters; the entropy has Medusa's
    form, -sum p log(p + 1e-5), natural logarithms. Non-finite logits give NaN or some number.
    """
    chances_V = (logits_V.double() / temperature).softmax(0)
    entropy = -(chances_V * (chances_V + _ENTROPY_SLACK).log()).sum()
    return float(entropy), chances_V[list(token_ids)].tolist()
