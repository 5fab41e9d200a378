"""Costs of steps that no machine decides, so that what is drafted depends on the text alone."""

from __future__ import annotations

from lorastack.engine.batch import Batch
from lorastack.engine.costs import Costs
from lorastack.speculation.cost import CostCurve


class CheapHeads(Costs):
    """Drafted tokens and heads cost next to nothing, whatever they took."""

    def __init__(self) -> None:
        super().__init__(CostCurve([(1, 1.0), (64, 1.2)]))
        self.heads = CostCurve([(1, 0.001)])

    def record(self, batch: Batch, seconds: float, heads_seconds: float) -> None:
        pass
