"""The tokens that heads choose from: so few that drafting is cheap, and still nearly all they need.

What heads may propose never changes the output, so a token that is left out costs a missed guess
where the base says it, and nothing else.

Shape suffixes: V vocabulary, N tokens to choose from, H hidden, P positions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lorastack.errors import InvalidArgumentError
from lorastack.layout import MAX_DRAFT_VOCABULARY, MAX_RANK
from lorastack.train.corpus import NO_TARGET


def count_tokens(tokens: Iterable[Tensor], vocab_size: int) -> Tensor:
    """int64 [V]: how often each token comes in these lists of tokens."""
    count_V = torch.zeros(vocab_size, dtype=torch.int64)
    for part in tokens:
        count_V += torch.bincount(part, minlength=vocab_size)
    return count_V


def choose_vocabulary(count_V: Tensor, size: int) -> Tensor | None:
    """int64 [N]: the `size` most frequent of the base's tokens, rising; None, for all, if size is 0
    or there are no more.

    Equally frequent tokens are taken by id: tokenizers number their merges from the most frequent
    on. Raises InvalidArgumentError for a size that no server takes.
    """
    if size == 0 or size >= len(count_V):
        return None
    if not MAX_RANK <= size <= MAX_DRAFT_VOCABULARY:
        raise InvalidArgumentError(
            f"a draft vocabulary of {size} tokens: it must have {MAX_RANK} to "
            f"{MAX_DRAFT_VOCABULARY}, or 0 for all of the model's",
            field="draft_vocabulary",
        )
    return count_V.argsort(descending=True, stable=True)[:size].sort().values


def coverage(ids_N: Tensor, count_V: Tensor) -> float:
    """The share of the counted tokens that the vocabulary holds."""
    return float(count_V[ids_N].sum() / count_V.sum())


@dataclass(frozen=True, slots=True)
class Output:
    """The rows of lm_head that heads choose from. ids_N: their tokens, rising; None for all.

    column_V: each token's place among the rows, or NO_TARGET.
    """

    rows_NH: Tensor
    ids_N: Tensor | None
    column_V: Tensor

    def columns(self, tokens_P: Tensor) -> Tensor:
        """int64, in the shape of the tokens: their places, NO_TARGET for what is none of them."""
        return self.column_V[tokens_P.clamp(min=0)].masked_fill(tokens_P == NO_TARGET, NO_TARGET)


def output_of(
    lm_head_VH: Tensor, ids_N: Tensor | None, *, device: torch.device, dtype: torch.dtype
) -> Output:
    """Copies the rows to the device, in the dtype that their matmuls run in.

    lm_head_VH: whichever the server applies, a LoRA's changes included.
    """
    if ids_N is None:
        column_V = torch.arange(len(lm_head_VH))
        return Output(lm_head_VH.detach().to(device, dtype), None, column_V.to(device))
    column_V = torch.full((len(lm_head_VH),), NO_TARGET)
    column_V[ids_N] = torch.arange(len(ids_N))
    rows_NH = lm_head_VH.detach()[ids_N.to(lm_head_VH.device)]
    return Output(rows_NH.to(device, dtype), ids_N, column_V.to(device))
