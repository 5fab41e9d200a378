"""Random logits of several kinds, for whatever draws from them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOGITS_KINDS = ("normal", "wide", "2 levels", "5 levels", "holes")


def make_logits(seed: int, rows: int, size: int, kind: str = "normal") -> Tensor:
    """Random; `levels` are few different values, so that ties are everywhere."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    if kind.endswith("levels"):
        return torch.randint(int(kind[0]), (rows, size), generator=generator).float()
    logits_XV = torch.randn(rows, size, generator=generator) * (30 if kind == "wide" else 3)
    if kind == "holes":
        holes = torch.rand(rows, size, generator=generator) < 0.8
        holes[:, size // 2] = False
        logits_XV[holes] = -math.inf
    return logits_XV
