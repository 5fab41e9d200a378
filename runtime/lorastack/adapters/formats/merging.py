"""One tensor of several by the rules of ties, dare_linear and dare_ties, as PEFT computes them.

Source: peft 0.21 `peft.utils.merge_utils` and `LoraModel._generalized_task_arithmetic_weighted_
adapter`, compared with the real package in tests/adapters/test_merging.py. The papers: TIES-Merging
(Yadav et al. 2023), DARE (Yu et al. 2024). All is float32, in pieces that torch does not hand to
OpenMP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import torch
from torch import Tensor

GRAIN = 1 << 15  # elements: torch takes its OpenMP threads for more
_ALIGNED = 64  # elements; in pieces of multiples torch adds up as it does in the whole


class Strategy(StrEnum):
    """How values are pruned and combined."""

    TIES = "ties"  # the largest stay; the mean of those that have the majority's sign
    DARE_LINEAR = "dare_linear"  # random ones stay, divided by the density; the sum
    DARE_TIES = "dare_ties"  # random ones stay, divided by the density; combined as in ties


class MajoritySign(StrEnum):
    """Whose sign wins: the sum's, or that of most values."""

    TOTAL = "total"
    FREQUENCY = "frequency"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeRule:
    """density: the share of values that stays, above 0 and up to 1. DARE_LINEAR elects no sign."""

    strategy: Strategy
    density: float
    majority_sign: MajoritySign = MajoritySign.TOTAL


def part_weights(weights: Sequence[float]) -> tuple[list[float], list[float]]:
    """The weights of lora_A and of lora_B of adapters with these weights, scalings included.

    Each gets the root, so that a product of both has the weight; A takes the sign.
    """
    roots = [math.sqrt(abs(weight)) for weight in weights]
    signed = [root if weight >= 0 else -root for root, weight in zip(roots, weights, strict=True)]
    return signed, roots


def merge_tensors(
    tensors: Sequence[Tensor], weights: Sequence[float], rule: MergeRule, random: torch.Generator
) -> Tensor:
    """K float32 tensors of one shape as one of that shape; they may be overwritten.

    random: draws what DARE keeps, tensor after tensor.
    """
    shape, size = tensors[0].shape, tensors[0].numel()
    flat = [_pruned(tensor.reshape(-1), rule, random) for tensor in tensors]
    weights_K1 = torch.tensor(weights, dtype=torch.float32).unsqueeze(1)
    merged_N = torch.empty(size)
    width = GRAIN // len(flat) // _ALIGNED * _ALIGNED
    for start in range(0, size, width):
        values_KN = torch.stack([values_N[start : start + width] for values_N in flat])
        merged_N[start : start + width] = _combined(values_KN, weights_K1, rule)
    return merged_N.view(shape)


def _combined(values_KN: Tensor, weights_K1: Tensor, rule: MergeRule) -> Tensor:
    weighted_KN = values_KN * weights_K1
    if rule.strategy is Strategy.DARE_LINEAR:
        return weighted_KN.sum(dim=0)
    sign_KN = values_KN.sign()
    votes_KN = values_KN if rule.majority_sign is MajoritySign.TOTAL else sign_KN
    agree_KN = sign_KN == torch.where(votes_KN.sum(dim=0) >= 0, 1, -1)
    return (weighted_KN * agree_KN).sum(dim=0) / agree_KN.sum(dim=0).clamp(min=1.0)


def _pruned(values_N: Tensor, rule: MergeRule, random: torch.Generator) -> Tensor:
    if rule.density >= 1:
        return values_N
    if rule.strategy is Strategy.TIES:
        return _largest(values_N, rule.density)
    for piece in _pieces(values_N):
        kept = torch.bernoulli(torch.full_like(piece, rule.density), generator=random)
        piece.mul_(kept).div_(rule.density)
    return values_N


def _largest(values_N: Tensor, density: float) -> Tensor:
    """The values of the largest magnitudes in their places, 0 in all others."""
    magnitudes_N = torch.empty_like(values_N)
    for piece, target in zip(_pieces(values_N), _pieces(magnitudes_N), strict=True):
        torch.abs(piece, out=target)
    kept = torch.topk(magnitudes_N, k=int(density * len(values_N))).indices
    pruned_N = torch.from_numpy(np.zeros(len(values_N), dtype=np.float32))
    for places in _pieces(kept):
        pruned_N[places] = values_N[places]
    return pruned_N


def _pieces(values_N: Tensor) -> Iterator[Tensor]:
    return iter(torch.split(values_N, GRAIN))
