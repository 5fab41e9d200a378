"""Which rows run in a step, and what its results make of them. Never touches a tensor."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lorastack.adapters.memory.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.admission import LOOK_AHEAD, admission_order, is_overdue
from lorastack.engine.batch import Batch, RowAdapters, RowResult, RowStep
from lorastack.engine.chunks import ChunkBudget
from lorastack.engine.holds import Holds
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages
from lorastack.engine.queues import RowQueues
from lorastack.engine.row import Row
from lorastack.engine.speculator import Speculator, advisory
from lorastack.errors import DeadlineExceededError, InternalError, LorastackError, Reason
from lorastack.request import FinishReason, RowEvent
from lorastack.speculation.tree import Tree

NUM_CANDIDATES = 8  # tokens that each head proposes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """A row's place in the step at hand, before trees are made."""

    row: Row
    num_tokens: int
    adapters: RowAdapters

    @property
    def samples(self) -> bool:
        """True if no token is left without KV, so that the step samples the next one."""
        return self.num_tokens == self.row.num_pending


class Scheduler:
    """A step is schedule() -> Batch, the runner's work, then update().

    Adapters are pinned from schedule to update, so a row that takes no step pins none.

    An exception that one row causes ends that row. After any other, `end_all` frees everything.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: Pages,
        pool: DevicePool,
        pace: Pace,
        speculator: Speculator,
        eos_ids: frozenset[int],
    ) -> None:
        self._pool = pool
        self._holds = Holds(pages, pool)
        self.rows = RowQueues(config.max_rows, self._holds)
        self._pace = pace
        self._speculator = speculator
        self._eos_ids = eos_ids
        self._planned: list[Plan] = []
        self._scheduled: list[tuple[Row, RowStep]] = []
        self._events: list[RowEvent] = []

    # -- requests in, events out ------------------------------------------------------------------

    def add(self, row: Row) -> None:
        """Put a new row at the end of the queue."""
        self.rows.waiting.append(row)

    def take_events(self) -> list[RowEvent]:
        """All events since the last call."""
        events, self._events = self._events, []
        return events

    # -- one step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Pages, adapters and tokens for as many rows as fit; None when no row can run."""
        now = time.monotonic()
        self._end_overdue(now)
        decoding = [row for row in self.rows.running if row.decodes and not row.parked]
        with advisory():
            self._speculator.choose_heads(decoding)
        num_reading = self.rows.num_active - len(decoding)  # with prompt tokens left
        budget = ChunkBudget(self._pace.budget(decoding=len(decoding), waiting=num_reading))
        for row in list(self.rows.running):
            if row.parked or row not in self.rows.running:  # preempted by a row before it
                continue
            with self._blaming(row):
                self._schedule_row(row, budget, now)
        self._admit(budget, now)
        if not self._planned:
            return None
        plans, self._planned = self._planned, []
        trees = self._trees(plans)
        self._scheduled = [
            (p.row, self._step(p, tree)) for p, tree in zip(plans, trees, strict=True)
        ]
        # Rows of one stack side by side make one segment of each of its LoRAs.
        self._scheduled.sort(key=lambda pair: pair[1].stack)
        return Batch(steps=tuple(step for _, step in self._scheduled))

    def update(self, results: list[RowResult]) -> None:
        """Take in a step's results, in the order of its batch."""
        now = time.monotonic()
        scheduled, self._scheduled = self._scheduled, []
        for (row, step), result in zip(scheduled, results, strict=True):
            self._holds.unpin(row)
            with self._blaming(row):
                self._take_in(row, step, result, now)

    def end_all(self, error: LorastackError) -> None:
        """Every row ends with `error`, and what it held is free."""
        self._planned, self._scheduled = [], []
        for row in list(self.rows):
            self._end(row, error)

    # -- inside -----------------------------------------------------------------------------------

    @contextmanager
    def _blaming(self, row: Row) -> Iterator[None]:
        """An exception in the block ends this row, and no other."""
        try:
            yield
        except LorastackError as error:
            self._end(row, error)
        except Exception as error:
            log.error("request %s failed", row.request.request_id, exc_info=error)
            self._end(
                row,
                InternalError(
                    "the server failed on this request; its log says why",
                    reason=Reason.STEP_FAILED,
                ),
            )

    def _end_overdue(self, now: float) -> None:
        for row in list(self.rows):
            with self._blaming(row):
                self._end_if_overdue(row, now)

    def _end_if_overdue(self, row: Row, now: float) -> None:
        limit, deadline = row.request.stop.time_limit, row.request.deadline
        if row.cancelled:
            self._finish(row, FinishReason.CANCELLED, now)
        elif deadline is not None and now >= deadline:
            raise DeadlineExceededError("the deadline passed; allow more time")
        elif limit is not None and now >= row.submitted + limit:
            self._finish(row, FinishReason.TIME_LIMIT, now)

    def _schedule_row(self, row: Row, budget: ChunkBudget, now: float) -> None:
        """Plan one running row. Those that decode take nothing of the budget."""
        num_tokens = 1 if row.decodes else budget.chunk(row)
        adapters = self._pin(row, now)
        if adapters is None:
            return
        # A row without budget has asked all the same: one that does not ask loses its adapters.
        if num_tokens <= 0 or not self.rows.make_room(row, row.num_computed + num_tokens):
            self._holds.unpin(row)
            return
        self._planned.append(Plan(row, num_tokens, adapters))
        if not row.decodes:
            budget.take(row, num_tokens)

    def _admit(self, budget: ChunkBudget, now: float) -> None:
        """Start waiting rows. Others pass a row whose LoRAs are missing, until it is overdue.

        Then a slot is kept for it. No more rows ask for LoRAs than could start, as asking may take
        LoRAs from running rows.
        """
        num_slots = self.rows.num_slots
        num_asking = 0
        for place, row in enumerate(admission_order(self.rows.waiting, self.rows.running, now)):
            if row.parked:
                continue
            may_ask = num_asking < num_slots or self._pool.holds(row.lora_digests)
            if num_slots <= 0 or not may_ask:
                if place < LOOK_AHEAD:
                    with self._blaming(row):
                        self._prefetch(row)
                continue
            adapters: RowAdapters | None = None
            with self._blaming(row):
                adapters = self._pin(row, now)
            if adapters is None and is_overdue(row, now):
                num_slots -= 1
            elif adapters is None:
                num_asking += 1
            elif not budget.admits(row):
                self._holds.unpin(row)  # it had to ask, or it would lose its place in the queue
            elif self._start(row, adapters, budget, now):
                num_slots -= 1
            else:
                return

    def _prefetch(self, row: Row) -> None:
        """Load the adapters of a row that cannot start yet, as far as there is room."""
        self._pool.prefetch(row.lora_digests)
        if row.request.heads is not None and self._speculator.max_nodes(row):
            self._pool.prefetch(row.request.heads.digests, together=True)

    def _start(self, row: Row, adapters: RowAdapters, budget: ChunkBudget, now: float) -> bool:
        """Plan a waiting row's first chunk; False: too few pages."""
        if not self.rows.start(row, now):
            self._holds.unpin(row)
            return False
        num_tokens = budget.chunk(row)
        self._planned.append(Plan(row, num_tokens, adapters))
        budget.take(row, num_tokens)
        return True

    def _trees(self, plans: list[Plan]) -> list[Tree | None]:
        """Each plan's tree; None if the row does not decode, drafts nothing or lacks the pages."""
        decoding = [plan.row for plan in plans if plan.row.decodes]
        fixed_tokens = sum(plan.num_tokens for plan in plans)
        num_samples = sum(plan.samples for plan in plans)
        trees: dict[Row, Tree | None] = {}
        with advisory():
            drafted = self._speculator.trees(decoding, fixed_tokens, num_samples)
            trees = dict(zip(decoding, drafted, strict=True))
        grown = []
        for plan in plans:
            row = plan.row
            tree = trees.get(row)
            fits = tree is None or self.rows.grow(row, row.num_computed + tree.num_nodes)
            grown.append(tree if fits else None)
        return grown

    def _step(self, plan: Plan, tree: Tree | None) -> RowStep:
        row, start = plan.row, plan.row.num_computed
        chain = tuple(row.tokens[start : start + plan.num_tokens])
        return RowStep(
            request=row.request,
            token_ids=chain if tree is None else tree.tokens,
            block_table=tuple(row.pages),
            committed=start,
            num_generated=row.num_generated,
            samples=plan.samples,
            tree=tree,
            adapters=plan.adapters,
            num_candidates=NUM_CANDIDATES if plan.samples and plan.adapters.heads else 0,
            processor=row.processor,
            scored=row.scored(len(chain)),
        )

    def _take_in(self, row: Row, step: RowStep, result: RowResult, now: float) -> None:
        """Take in one row's result. An error ends the row behind the tokens that came before it."""
        self._commit(row, step, result)
        if listed := row.list_prompt(result.prompt_logprobs):
            event = RowEvent(request_id=row.request.request_id, prompt_tokens=listed)
            self._events.append(event)
        if result.tokens:
            event = row.append(result, self._eos_ids, now)
            if event.final is not None:
                self.rows.remove(row)
            self._events.append(event)
            if event.final is not None:
                return
        if result.error is not None:
            raise result.error

    def _commit(self, row: Row, step: RowStep, result: RowResult) -> None:
        """Count the KV of the step's own tokens and of the accepted nodes as the row's."""
        drafted = step.tree.sources[1:] if step.tree else ()
        if step.decodes:
            row.count_step(drafted)
            with advisory(row):
                self._speculator.note(row, result)
        if result.error is not None:
            return
        row.num_computed += len(step.token_ids) - len(drafted) + len(result.sources)
        row.proposal = result.proposal
        if not step.decodes and self._speculator.max_nodes(row):
            with advisory(row):
                row.read(row.num_computed)
        self._holds.publish(row, result.tokens)

    def _pin(self, row: Row, now: float) -> RowAdapters | None:
        """See `Holds.pin`."""
        return self._holds.pin(row, now, heads=self._speculator.wants_heads(row))

    # -- ends -------------------------------------------------------------------------------------

    def _finish(self, row: Row, reason: FinishReason, now: float) -> None:
        event = row.finish(reason, now)
        self.rows.remove(row)
        self._events.append(event)

    def _end(self, row: Row, error: LorastackError) -> None:
        self._events.append(RowEvent(request_id=row.request.request_id, error=error))
        self.rows.remove(row)
