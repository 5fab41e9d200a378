"""A step whose rows cannot hurt each other: a row that makes it raise ends alone."""

from __future__ import annotations

import logging
from collections.abc import Callable

from lorastack.engine.batch import Batch, RowResult
from lorastack.engine.runner import StepResults
from lorastack.errors import InternalError, Reason, breaks_device

log = logging.getLogger(__name__)


def run_apart(run: Callable[[Batch], StepResults], batch: Batch) -> StepResults:
    """`run(batch)`; if that raises, each half by itself, and so on.

    A row whose step fails alone gets the error STEP_FAILED. A step may be run again: it writes the
    same keys and values to the same places, and samples depend on their positions alone. An error
    that breaks the device is raised: no part of a step can run any more.
    """
    try:
        return run(batch)
    except Exception as error:
        if breaks_device(error):
            raise
        steps = batch.steps
        if len(steps) == 1:
            request_id = steps[0].request.request_id
            log.error("a step failed; request %s ends", request_id, exc_info=error)
            return StepResults([_failed()], whole=False)
    middle = len(steps) // 2
    halves = [run_apart(run, Batch(steps=part)) for part in (steps[:middle], steps[middle:])]
    return StepResults(
        rows=[row for half in halves for row in half.rows],
        heads_seconds=sum(half.heads_seconds for half in halves),
        failed_heads=[digest for half in halves for digest in half.failed_heads],
        whole=False,
    )


def _failed() -> RowResult:
    return RowResult(
        error=InternalError(
            "the step that ran this request failed; the server's log says why",
            reason=Reason.STEP_FAILED,
        )
    )
