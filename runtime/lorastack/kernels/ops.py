"""Who runs which kernel, chosen once when a backend is made.

The modules of the kernels have the contracts. Every way keeps them, so that tokens are the same
whichever runs; the ops of another device are one more subclass.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lorastack.kernels.best import best_native, best_torch
from lorastack.kernels.heads import (
    HeadsGroup,
    TopTokens,
    propose_native,
    propose_torch,
    states_native,
    states_torch,
    top_native,
    top_torch,
)
from lorastack.kernels.native.isa import Isa, isa_of
from lorastack.kernels.native.matrix import PAD
from lorastack.kernels.quantize import Kind, Quantised, quantise_native, quantise_torch
from lorastack.kernels.sample import Sample, sample_native, sample_torch
from lorastack.request import TokenLogprobs

LOGPROB_ROWS = 16  # rows of logits that are weighed at once: what that takes beside stays small


class Ops:
    """Everything in plain torch, on any device."""

    def best(self, logits_XV: Tensor) -> tuple[Tensor, Tensor]:
        """See `kernels.best`."""
        return best_torch(logits_XV)

    def top(self, logits_XV: Tensor, num: int) -> TopTokens:
        """See `kernels.heads`."""
        return top_torch(logits_XV, num)

    def states(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
        """See `kernels.heads`. hidden_BH: contiguous, of the model's dtype."""
        return states_torch(hidden_BH, groups)

    def propose(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int) -> TopTokens:
        """See `kernels.heads`. hidden_BH: as in `states`; num: 1 to MAX_RANK; all have outputs."""
        return propose_torch(hidden_BH, groups, num, self.top)

    def quantise(self, weight_OI: Tensor, kind: Kind) -> Quantised:
        """See `kernels.quantize`. Raises NotFiniteError."""
        return quantise_torch(weight_OI, kind)

    def sample(
        self, logits_XV: Tensor, best_X: Sequence[int], samples: Sequence[Sample]
    ) -> list[int]:
        """One token for each of `samples`: its row's best token if it is greedy, else as
        `kernels.sample` says.

        best_X: each row's best token, see `kernels.best`. Non-finite logits give some id, never an
        error.
        """
        sampled = [each for each in samples if not each.params.greedy]
        tokens = iter(self._sample(logits_XV, sampled) if sampled else ())
        return [best_X[each.row] if each.params.greedy else next(tokens) for each in samples]

    def logprobs(
        self, logits_XV: Tensor, rows: Sequence[int], token_ids: Sequence[int], num_top: int
    ) -> list[TokenLogprobs]:
        """Natural log-probabilities before temperature and filters, one result for each of `rows`:
        of its token in `token_ids` and of its `num_top` best, ties to the lowest id."""
        num_top = min(num_top, logits_XV.shape[1])
        results = []
        for start in range(0, len(rows), LOGPROB_ROWS):
            piece = slice(start, start + LOGPROB_ROWS)
            logits_NV = logits_XV[list(rows[piece])]
            ids_NR = torch.tensor(token_ids[piece], device=logits_NV.device)[:, None]
            if num_top:
                ids_NR = torch.cat((ids_NR, self.top(logits_NV, num_top).ids_XR), dim=1)
            totals_N1 = logits_NV.double().logsumexp(1, keepdim=True)
            values_NR = logits_NV.gather(1, ids_NR).double() - totals_N1
            for (_, *ids), (logprob, *best) in zip(
                ids_NR.tolist(), values_NR.tolist(), strict=True
            ):
                top = tuple(zip(ids, best, strict=True))
                results.append(TokenLogprobs(logprob=logprob, top=top))
        return results

    def _sample(self, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
        """None of `samples` is greedy."""
        return sample_torch(logits_XV, samples)


class NativeOps(Ops):
    """What the native library has for float32 logits; torch does the rest."""

    def __init__(self, isa: Isa, heads: Isa | None) -> None:
        """isa: computes in float32. heads: for heads of the model's dtype and size; None: torch
        runs them."""
        self._isa = isa
        self._heads = heads

    def best(self, logits_XV: Tensor) -> tuple[Tensor, Tensor]:
        return best_native(self._isa, logits_XV)

    def top(self, logits_XV: Tensor, num: int) -> TopTokens:
        return top_native(self._isa, logits_XV, num)

    def states(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup]) -> Tensor:
        if self._heads is None:
            return super().states(hidden_BH, groups)
        return states_native(self._heads, hidden_BH, groups)

    def propose(self, hidden_BH: Tensor, groups: Sequence[HeadsGroup], num: int) -> TopTokens:
        if self._heads is None:
            return super().propose(hidden_BH, groups, num)
        return propose_native(self._heads, hidden_BH, groups, num)

    def quantise(self, weight_OI: Tensor, kind: Kind) -> Quantised:
        if weight_OI.dtype != torch.bfloat16:
            return super().quantise(weight_OI, kind)
        return quantise_native(self._isa, weight_OI, kind)

    def _sample(self, logits_XV: Tensor, samples: Sequence[Sample]) -> list[int]:
        plain = [each for each in samples if each.params.typical_p >= 1]
        typical = [each for each in samples if each.params.typical_p < 1]
        by_library = iter(sample_native(self._isa, logits_XV, plain) if plain else ())
        by_torch = iter(sample_torch(logits_XV, typical))
        return [next(by_torch if each.params.typical_p < 1 else by_library) for each in samples]


def fastest_ops(
    dtype: torch.dtype, hidden_size: int, device: torch.device, at_most: Isa | None = None
) -> Ops:
    """The ops that run fastest here for a model of this dtype, whose logits are float32, or float64
    of a float64 model.

    at_most: no better instruction set than it.
    """
    isa = isa_of(torch.float32, at_most)
    if device.type != "cpu" or dtype == torch.float64 or isa is None:
        return Ops()
    return NativeOps(isa, None if hidden_size % PAD else isa_of(dtype, at_most))
