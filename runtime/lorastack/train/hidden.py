"""What heads are trained and measured on, in memory.

Shape suffixes: T answer positions of all samples, one after the other, K heads, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NO_TARGET = -1


@dataclass(frozen=True, slots=True)
class HiddenCorpus:
    """What heads are trained and measured on.

    A position is a token after which the base spoke: the last prompt token and every answer token
    but the last. Samples lie one after the other; sample i owns positions starts[i]:starts[i + 1].
    """

    hidden_TH: Tensor
    targets_TK: Tensor  # column k - 1: the token head k must guess there, or NO_TARGET
    starts: list[int]

    @property
    def num_samples(self) -> int:
        return len(self.starts) - 1


def targets_of(answer_ids: Sequence[int], num_heads: int) -> Tensor:
    """[len(answer), K]: head k, at the position that emits answer[i], guesses answer[i + k].

    lm_head at that position already gives answer[i] (t + 1), so head 1 gives the token after it.
    """
    length = len(answer_ids)
    padded = torch.tensor(list(answer_ids) + [NO_TARGET] * num_heads)
    return torch.stack([padded[k : k + length] for k in range(1, num_heads + 1)], dim=1)
