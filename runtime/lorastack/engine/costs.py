"""What steps and heads cost on this machine: measured at start, refined by every step since."""

from __future__ import annotations

import math
import time

from lorastack.engine.batch import Batch, RowAdapters, RowStep
from lorastack.engine.pages import Pages
from lorastack.engine.runner import Runner
from lorastack.request import Request, SamplingParams, StopParams, TokenSource
from lorastack.speculation.cost import CostCurve
from lorastack.speculation.tree import Tree

# Matrices are multiplied 16 rows at a time: the 17th token costs more than the 16th, and at 64
# rows the first node costs 7% of a step.
STEP_TOKENS = (1, 4, 8, 16, 17, 32, 33, 48, 49, 64, 65, 80, 96)
# A GPU reads its weights in the time of up to a few hundred tokens' arithmetic: the knee is far.
GPU_STEP_TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_ROUNDS, _SECONDS = 3, 2.0  # rounds over all sizes; seconds after which no further one begins
# First guesses, in times of a one-token step: the heads of one row; those of each further row.
_HEADS_FIRST, _HEADS_MORE = 0.15, 0.03


class Costs:
    """step: seconds over tokens, heads left out. heads: seconds over the rows whose heads run."""

    def __init__(self, step: CostCurve) -> None:
        self.step = step
        once = step.seconds(1)
        self.heads = CostCurve([(1, _HEADS_FIRST * once), (2, (_HEADS_FIRST + _HEADS_MORE) * once)])

    def record(self, batch: Batch, seconds: float, heads_seconds: float) -> None:
        """A step took `seconds`, `heads_seconds` of them for heads."""
        self.step.record(sum(len(step.token_ids) for step in batch.steps), seconds - heads_seconds)
        if num_proposals := sum(step.num_candidates > 0 for step in batch.steps):
            self.heads.record(num_proposals, heads_seconds)


def measure(runner: Runner, pages: Pages, max_context: int, on_gpu: bool = False) -> Costs:
    """Runs steps of one row's tree of several sizes, as large as the context and the free pages.

    It measures in rounds, so that what else runs for a while does not make one size look dear. On a
    GPU a first round is not counted: kernels are loaded when they first run.
    """
    sizes = [
        tokens
        for tokens in (GPU_STEP_TOKENS if on_gpu else STEP_TOKENS)
        if tokens <= max_context and pages.pages_for(tokens) <= pages.num_available
    ]
    table = pages.allocate(pages.pages_for(sizes[-1]))
    assert table is not None
    batches = [Batch(steps=(_chain(tokens, table),)) for tokens in sizes]
    for batch in batches if on_gpu else ():
        runner.run(batch)
    least = [math.inf] * len(sizes)
    began = time.monotonic()
    for number in range(_ROUNDS):
        if number and time.monotonic() - began > _SECONDS:
            break
        for index, batch in enumerate(batches):
            started = time.monotonic()
            runner.run(batch)
            least[index] = min(least[index], time.monotonic() - started)
    pages.free(table)
    return Costs(CostCurve(list(zip(sizes, least, strict=True))))


def try_step(runner: Runner, pages: Pages) -> None:
    """Runs a step without a request's values, if there is a page for it; raises its error."""
    if (table := pages.allocate(1)) is not None:
        try:
            runner.run(Batch(steps=(_chain(1, table),)))
        finally:
            pages.free(table)


def _chain(tokens: int, table: list[int]) -> RowStep:
    """A decoding row with a tree of one path."""
    request = Request(
        request_id="",
        prompt_ids=(0,),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=tokens),
    )
    tree = Tree((0,) * tokens, tuple(range(-1, tokens - 1)), (TokenSource.MODEL,) * tokens)
    return RowStep(
        request=request,
        token_ids=tree.tokens,
        block_table=tuple(table),
        committed=0,
        num_generated=0,
        samples=True,
        tree=tree,
        adapters=RowAdapters(loras=(), heads=None),
        num_candidates=0,
    )
