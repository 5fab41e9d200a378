"""Losses and their gradients by states, by hand: a slice of the logits is all that is alive.

The heads' softmax covers exactly the N tokens that they choose from when they are served. Sums are
float32; matmuls run in the dtype of the states.

Shape suffixes: P positions, C positions of a slice, H hidden, N tokens to choose from, J tokens of
the base's own that are kept a position, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Logits alive at once: on a CPU what its caches hold, on other devices enough to keep them busy.
_CPU_LOGITS = 1 << 21
_DEVICE_LOGITS = 1 << 26
_LEAST_POSITIONS = 64  # of a slice: fewer would read the output matrix too often
_TINY = 1e-30


@dataclass(frozen=True, slots=True)
class SoftTargets:
    """What the base itself held likely: J tokens a position, and all others together.

    columns_PJ: places among the N tokens, each once a position; where the token is none of them,
    any place, and a probability of 0. probs_PJ, rest_P: float32; they may add up to less than 1,
    which is how much the position weighs.
    """

    columns_PJ: Tensor
    probs_PJ: Tensor
    rest_P: Tensor


def slices(num_positions: int, rows_NH: Tensor) -> Iterator[slice]:
    """Of positions whose logits may be alive together."""
    budget = _CPU_LOGITS if rows_NH.device.type == "cpu" else _DEVICE_LOGITS
    size = max(_LEAST_POSITIONS, budget // len(rows_NH))
    for begin in range(0, num_positions, size):
        yield slice(begin, min(begin + size, num_positions))


def hard_loss(r_PH: Tensor, rows_NH: Tensor, columns_P: Tensor) -> tuple[Tensor, Tensor]:
    """Cross entropy: its sum over the positions, float32, and the sum's gradient by r, [P, H].

    columns_P: the targets' places among the rows.
    """
    gradient_PH = torch.empty_like(r_PH)
    total = torch.zeros((), device=r_PH.device)
    for part in slices(len(r_PH), rows_NH):
        probs_CN = torch.softmax((r_PH[part] @ rows_NH.T).float(), -1)
        column_C1 = columns_P[part, None]
        right_C1 = probs_CN.gather(1, column_C1)
        total -= right_C1.clamp_min(_TINY).log().sum()
        probs_CN.scatter_(1, column_C1, right_C1 - 1)
        torch.mm(probs_CN.to(r_PH.dtype), rows_NH, out=gradient_PH[part])
    return total, gradient_PH


def soft_loss(r_PH: Tensor, rows_NH: Tensor, soft: SoftTargets) -> tuple[Tensor, Tensor]:
    """As `hard_loss`, of the divergence KL(base || head) over J tokens and the rest as one.

    With q of mass s, of which q_rest is the rest's, the gradient by logit i is s p_i - q_i for a
    token of its own, and p_i (s - q_rest / p_rest) for one of the rest.
    """
    gradient_PH = torch.empty_like(r_PH)
    total = torch.zeros((), device=r_PH.device)
    for part in slices(len(r_PH), rows_NH):
        probs_CN = torch.softmax((r_PH[part] @ rows_NH.T).float(), -1)
        columns_CJ, wanted_CJ = soft.columns_PJ[part], soft.probs_PJ[part]
        rest_C1 = soft.rest_P[part, None]
        mass_C1 = wanted_CJ.sum(-1, keepdim=True) + rest_C1
        own_CJ = probs_CN.gather(1, columns_CJ)
        known_CJ = wanted_CJ > 0
        own_rest_C1 = 1 - (own_CJ * known_CJ).sum(-1, keepdim=True)
        own_rest_C1 = own_rest_C1.clamp_min(1e-6)
        divergence_CJ = wanted_CJ * _log_ratio(wanted_CJ, own_CJ)
        total += divergence_CJ.sum() + (rest_C1 * _log_ratio(rest_C1, own_rest_C1)).sum()
        scaled_C1 = mass_C1 - rest_C1 / own_rest_C1
        # A place that stands for no token may be another one's too, so differences are added.
        change_CJ = own_CJ * (mass_C1 - scaled_C1) - wanted_CJ
        probs_CN.mul_(scaled_C1).scatter_add_(1, columns_CJ, change_CJ * known_CJ)
        torch.mm(probs_CN.to(r_PH.dtype), rows_NH, out=gradient_PH[part])
    return total, gradient_PH


def drift_loss(x_PH: Tensor, base_PH: Tensor, rows_VH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(base || adapted) of what two states say next: its sum over the positions, float32, that
    sum's gradient by x, [P, H], and at how many positions both hold the same token likeliest.

    x_PH, base_PH: the adapted model's states and the base's. rows_VH: the whole lm_head.
    """
    gradient_PH = torch.empty_like(x_PH)
    total = torch.zeros((), device=x_PH.device)
    same = torch.zeros((), dtype=torch.int64, device=x_PH.device)
    for part in slices(len(x_PH), rows_VH):
        wanted_CV = torch.log_softmax((base_PH[part] @ rows_VH.T).float(), -1)
        own_CV = torch.log_softmax((x_PH[part] @ rows_VH.T).float(), -1)
        same += (wanted_CV.argmax(-1) == own_CV.argmax(-1)).sum()
        difference_CV = wanted_CV - own_CV
        wanted_CV.exp_()
        total += (wanted_CV * difference_CV).sum()
        change_CV = own_CV.exp_().sub_(wanted_CV)
        torch.mm(change_CV.to(x_PH.dtype), rows_VH, out=gradient_PH[part])
    return total, gradient_PH, same


def _log_ratio(wanted: Tensor, own: Tensor) -> Tensor:
    return wanted.clamp_min(_TINY).log() - own.clamp_min(_TINY).log()
