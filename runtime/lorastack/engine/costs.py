"""What steps and drafts cost on this machine: measured at start, refined by every step since."""

from __future__ import annotations

import time

from lorastack.engine.batch import Batch, RowAdapters, RowStep
from lorastack.engine.pages import Pages
from lorastack.engine.runner import Runner
from lorastack.request import Request, SamplingParams, StopParams, TokenSource
from lorastack.speculation.cost import CostCurve
from lorastack.speculation.drafted import Drafted

STEP_TOKENS = (1, 4, 8, 16, 32, 64, 128)
_RUNS, _SECONDS = 3, 0.1  # of a step; one that takes long runs less often
# Drafting for one row and for each more, in steps of one token; what heads take corrects it.
_HEADS_FIRST, _HEADS_MORE = 0.15, 0.03


class Costs:
    """step: seconds over tokens, drafting left out. heads: seconds over the rows drafted for."""

    def __init__(self, step: CostCurve) -> None:
        self.step = step
        once = step.seconds(1)
        self.heads = CostCurve([(1, _HEADS_FIRST * once), (2, (_HEADS_FIRST + _HEADS_MORE) * once)])

    def record(self, batch: Batch, seconds: float, draft_seconds: float) -> None:
        """seconds: of the whole step."""
        self.step.record(sum(len(step.token_ids) for step in batch.steps), seconds - draft_seconds)
        if num_drafts := sum(step.num_candidates > 0 for step in batch.steps):
            self.heads.record(num_drafts, draft_seconds)


def measure(runner: Runner, pages: Pages) -> Costs:
    """Runs steps of one row's tree of several sizes, as large as the free pages hold."""
    points = []
    for tokens in STEP_TOKENS:
        table = pages.allocate(pages.pages_for(tokens))
        if table is None:
            break
        batch = Batch(steps=(_chain(tokens, table),))
        runs: list[float] = []
        while len(runs) < _RUNS and sum(runs) < _SECONDS:
            began = time.monotonic()
            runner.run(batch)
            runs.append(time.monotonic() - began)
        points.append((tokens, min(runs)))
        pages.free(table)
    return Costs(CostCurve(points))


def _chain(tokens: int, table: list[int]) -> RowStep:
    """A decoding row with a tree of one path."""
    request = Request(
        request_id="",
        prompt_ids=(0,),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=tokens),
    )
    tree = Drafted((0,) * tokens, tuple(range(-1, tokens - 1)), (TokenSource.MODEL,) * tokens)
    return RowStep(
        request=request,
        token_ids=tree.tokens,
        page_table=tuple(table),
        committed=0,
        num_generated=0,
        samples=True,
        tree=tree,
        adapters=RowAdapters(loras=(), heads=None),
        num_candidates=0,
    )
