"""Pearson's test of counts against exact chances."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping

import torch

RARE = 10  # things expected less often share one cell


def p_value(samples: Iterable[tuple[Counter[Hashable], Mapping[Hashable, float]]]) -> float:
    """How likely counts are as far from their chances as these, all samples together.

    samples: how often each thing came, and its chance. 0 if one came that has none.
    """
    statistic, freedom = 0.0, 0
    for counts, chances in samples:
        if not counts.keys() <= chances.keys():
            return 0.0
        total = counts.total()
        cells = [(counts[key], total * p) for key, p in chances.items() if total * p >= RARE]
        seen, expected = (sum(column) for column in zip((0, 0.0), *cells, strict=True))
        if expected < total - 1e-6:
            cells.append((total - int(seen), total - expected))
        statistic += sum((count - wanted) ** 2 / wanted for count, wanted in cells)
        freedom += len(cells) - 1
    assert freedom >= 5, "too little to tell from"
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(*halves))
