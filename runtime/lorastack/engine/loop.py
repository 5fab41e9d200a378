"""The step loop: takes commands and runs steps until it is told to stop. Step thread only."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from lorastack.adapters.memory.pool import DevicePool
from lorastack.engine.apart import run_apart
from lorastack.engine.batch import Batch
from lorastack.engine.costs import Costs, try_step
from lorastack.engine.inbox import EngineState, Inbox
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages
from lorastack.engine.residency import Residency
from lorastack.engine.runner import Runner
from lorastack.engine.scheduler import Scheduler
from lorastack.engine.speculator import Speculator
from lorastack.errors import (
    InternalError,
    LorastackError,
    Reason,
    UnavailableError,
    breaks_device,
)
from lorastack.request import RowEvent

COPY_REST = 0.0005  # seconds between two looks at copies to the device while no row can run
MAX_FAULTS = 3  # faults that no row caused, without a step that went well in between

log = logging.getLogger(__name__)


class StepLoop:
    """Step by step: schedule a batch, run it, update the rows, catch up.

    Catching up is what no next step waits for: learning, and handing events out. Where the device
    works by itself it is done beside the next step, or at once if none follows. So trees and prompt
    chunks may be chosen knowing one step less, which changes no token, only speed.
    """

    def __init__(
        self,
        *,
        inbox: Inbox,
        scheduler: Scheduler,
        runner: Runner,
        pages: Pages,
        pool: DevicePool,
        pace: Pace,
        costs: Costs,
        speculator: Speculator,
        on_events: Callable[[list[RowEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        """on_events, on_failure: see `Engine`."""
        self.num_steps = 0
        self.residency = Residency(
            pool, in_use=scheduler.rows.uses, on_forgotten=self._forget_digest
        )
        self._inbox = inbox
        self._scheduler = scheduler
        self._runner = runner
        self._pages = pages
        self._pool = pool
        self._pace = pace
        self._costs = costs
        self._speculator = speculator
        self._on_events = on_events
        self._on_failure = on_failure
        self._timed: tuple[Batch, float, float] | None = None  # a step whose costs are not learnt
        self._unsent: list[RowEvent] = []  # events that `on_events` failed to take
        self._heads_failures: dict[str, int] = {}  # replaced, never changed: other threads read it
        self._num_faults = 0
        inbox.publish(self._state())

    @torch.inference_mode()
    def run(self) -> None:
        """Steps until the inbox is closed, or the loop cannot go on; all rows have ended then."""
        try:
            while not self._inbox.closed:
                try:
                    self.step()
                except Exception as error:
                    self._start_over(error)
            self._end_all(UnavailableError("the server shut down; send the request again"))
        except BaseException as error:
            log.critical("the step loop cannot go on", exc_info=error)
            self._inbox.close()
            try:
                self._end_all(InternalError("the server failed; its log says why"))
            finally:
                self._on_failure(error)

    def step(self) -> None:
        """Take commands and loaded adapters, run a batch, do orders, catch up; rest if idle."""
        self._inbox.carry_out(self._state)
        self._pool.poll()
        batch = self._scheduler.schedule()
        if batch is not None:
            self.num_steps += 1
            self._run(batch)
        self.residency.step()
        if batch is None or not self._runner.overlaps or not len(self._scheduler.rows):
            self._catch_up()
        if batch is None and not self._pool.blocked:
            self._rest()

    def _run(self, batch: Batch) -> None:
        faults: list[Exception] = []

        def catch_up() -> None:  # no row of this step is to blame for what it raises
            try:
                self._catch_up()
            except Exception as error:
                faults.append(error)

        began = time.monotonic()
        results = run_apart(partial(self._runner.run, meanwhile=catch_up), batch)
        if results.whole:
            self._timed = batch, time.monotonic() - began, results.heads_seconds
        self._note_failures(results.failed_heads)
        self._scheduler.update(results.rows)
        if not results.whole and all(row.error is not None for row in results.rows):
            try_step(self._runner, self._pages)  # is it these rows, or the device?
        if faults:
            raise faults[0]
        self._num_faults = 0

    def _start_over(self, error: Exception) -> None:
        """After a fault that no row alone caused: all rows end, and the loop goes on.

        Raises the error when that has not helped, or cannot: the device is broken.
        """
        self._num_faults += 1
        if self._num_faults > MAX_FAULTS or breaks_device(error):
            raise error
        log.error("the step loop failed; all rows end, and it goes on", exc_info=error)
        self._scheduler.end_all(
            InternalError("the server failed; its log says why", reason=Reason.STEP_FAILED)
        )

    def _catch_up(self) -> None:
        """What is left of earlier steps, once, however often this is called."""
        self._speculator.learn()
        timed, self._timed = self._timed, None
        if timed is not None:
            self._learn_costs(*timed)
        # Last, as events wake other threads: these run while this one waits for the device.
        self._publish()

    def _learn_costs(self, batch: Batch, seconds: float, heads_seconds: float) -> None:
        decoding = any(step.decodes for step in batch.steps)
        self._pace.record(prompt_tokens=batch.prompt_tokens, decoding=decoding, seconds=seconds)
        self._costs.record(batch, seconds, heads_seconds)

    def _note_failures(self, digests: Sequence[str]) -> None:
        if not digests:
            return
        counts = dict(self._heads_failures)
        for digest in digests:
            if digest not in counts:
                log.error("heads %s gave NaN or infinity; their rows go on undrafted", digest)
            counts[digest] = counts.get(digest, 0) + 1
        self._heads_failures = counts

    def _publish(self) -> None:
        self._unsent += self._scheduler.take_events()
        if self._unsent:
            self._on_events(self._unsent)
            self._unsent = []
        self._inbox.publish(self._state())

    def _state(self) -> EngineState:
        rows, pages = self._scheduler.rows, self._pages
        free = pages.num_available - pages.num_cached
        return EngineState(
            num_rows=len(rows),
            num_waiting=rows.num_waiting,
            num_parked=rows.num_parked,
            num_preemptions=rows.num_preemptions,
            num_pages={"held": pages.num_held, "cached": pages.num_cached, "free": free},
            heads_failures=self._heads_failures,
        )

    def _rest(self) -> None:
        """Sleep until a command, a loaded adapter or the next deadline.

        The end of a copy wakes nobody: it has to be looked for.
        """
        wake_time = self._scheduler.rows.wake_time()
        rest = None if wake_time is None else max(wake_time - time.monotonic(), 0.0)
        if self._pool.copying:
            rest = COPY_REST if rest is None else min(rest, COPY_REST)
        self._inbox.rest(rest)

    def _end_all(self, error: LorastackError) -> None:
        self._inbox.carry_out(self._state)
        self._scheduler.end_all(error)
        self.residency.end(error)
        self._publish()

    def _forget_digest(self, digest: str) -> None:
        self._pages.forget(digest)
        self._speculator.forget(digest)
