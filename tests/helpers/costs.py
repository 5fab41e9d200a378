"""Costs of steps that no machine decides, so that what is drafted depends on the text alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from lorastack.engine.batch import Batch
from lorastack.engine.costs import Costs
from lorastack.speculation.cost import CostCurve
from lorastack.startup import engine as startup_engine


class CheapHeads(Costs):
    """Drafted tokens and heads cost next to nothing, whatever they took."""

    def __init__(self) -> None:
        super().__init__(CostCurve([(1, 1.0), (64, 1.2)]))
        self.heads = CostCurve([(1, 0.001)])

    def record(self, batch: Batch, seconds: float, heads_seconds: float) -> None:
        pass


@contextmanager
def cheap_drafts() -> Iterator[None]:
    """Engines that are opened meanwhile measure no steps and take these costs."""
    with patch.object(startup_engine, "measure", lambda *_: CheapHeads()):
        yield
