"""Who runs: queues, deadlines, page and adapter holds. Never touches a tensor."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from lorastack.adapters.device import DeviceAdapter
from lorastack.adapters.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.admission import LOOK_AHEAD, admission_order, is_overdue
from lorastack.engine.batch import Batch, RowAdapters, RowResult, RowStep
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages, chain_hash
from lorastack.engine.row import Row
from lorastack.engine.speculator import Speculator
from lorastack.errors import DeadlineExceededError, InternalError, LorastackError, Reason
from lorastack.request import (
    FinishReason,
    GeneratedToken,
    RowEvent,
    TokenLogprobs,
    TokenSource,
)
from lorastack.speculation.drafted import Drafted

Describe = Callable[[int, TokenSource, TokenLogprobs | None], GeneratedToken]
NUM_CANDIDATES = 8  # that a head proposes


@dataclass(frozen=True, slots=True)
class Plan:
    """A row's place in the step at hand, before drafts are shared out."""

    row: Row
    num_tokens: int
    adapters: RowAdapters

    @property
    def draws(self) -> bool:
        """Its tokens are the last without KV, so that the next one is drawn."""
        return self.num_tokens == self.row.num_pending


class Scheduler:
    """Waiting and running rows.

    A step is schedule() -> Batch, the runner's work, then update() or fail(). Adapters are pinned
    from schedule to update: a pin's quantum is one step, so a row that does not run holds none.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: Pages,
        pool: DevicePool,
        pace: Pace,
        speculator: Speculator,
        eos_ids: frozenset[int],
        describe: Describe,
    ) -> None:
        self.num_preemptions = 0
        self._config = config
        self._pages = pages
        self._pool = pool
        self._pace = pace
        self._speculator = speculator
        self._eos_ids = eos_ids
        self._describe = describe
        self._waiting: deque[Row] = deque()
        self._running: list[Row] = []  # in order of admission
        self._planned: list[Plan] = []
        self._scheduled: list[tuple[Row, RowStep]] = []
        self._events: list[RowEvent] = []

    # -- requests in, events out ------------------------------------------------------------------

    def add(self, row: Row) -> None:
        self._waiting.append(row)

    def find(self, request_id: str) -> Row | None:
        return next((row for row in self._rows() if row.request.request_id == request_id), None)

    def uses(self, digest: str) -> bool:
        """Whether any row, waiting or running, is to run with this adapter."""
        return any(row.uses(digest) for row in self._rows())

    def take_events(self) -> list[RowEvent]:
        """What happened since the last call."""
        events, self._events = self._events, []
        return events

    @property
    def num_rows(self) -> int:
        return len(self._waiting) + len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_parked(self) -> int:
        return sum(row.parked for row in self._rows())

    def wake_time(self) -> float | None:
        """When the next deadline or time limit falls due."""
        times = [row.wake_time for row in self._rows()]
        return min((at for at in times if at is not None), default=None)

    # -- one step ---------------------------------------------------------------------------------

    def schedule(self) -> Batch | None:
        """Pages, adapters and tokens for as many rows as fit; None when no row can run."""
        now = time.monotonic()
        self._end_overdue(now)
        decoding = [row for row in self._running if row.num_pending == 1 and not row.parked]
        self._speculator.choose_heads(decoding)
        budget = self._pace.budget(decoding=len(decoding), waiting=self._num_unread(decoding))
        for row in list(self._running):
            if row.parked or row not in self._running:  # preempted by a row before it
                continue
            budget -= self._schedule_row(row, budget, now)
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
            self._release(step.adapters)
            if result.error is not None:
                self._end(row, error=result.error)
                continue
            self._commit(row, step, result)
            if not step.samples:
                continue
            event = row.append(result, self._eos_ids, self._describe, now)
            self._events.append(event)
            if event.final is not None:
                self._remove(row)
            elif row.matcher is not None and row.matcher.error:
                self._end(row, InternalError(row.matcher.error, reason=Reason.GRAMMAR_FAILED))

    def fail(self, error: LorastackError) -> None:
        """The step raised: its rows end, everything they held is free."""
        scheduled, self._scheduled = self._scheduled, []
        for row, step in scheduled:
            self._release(step.adapters)
            self._end(row, error=error)

    def end_all(self, error: LorastackError) -> None:
        """Every row ends with `error`."""
        self.fail(error)
        for row in list(self._rows()):
            self._end(row, error=error)

    # -- inside -----------------------------------------------------------------------------------

    def _rows(self) -> Iterator[Row]:
        yield from self._running
        yield from self._waiting

    def _end_overdue(self, now: float) -> None:
        for row in list(self._rows()):
            limit, deadline = row.request.stop.time_limit, row.request.deadline
            if row.cancelled:
                self._finish(row, FinishReason.CANCELLED, now)
            elif deadline is not None and now >= deadline:
                self._end(row, error=DeadlineExceededError("the deadline passed; allow more time"))
            elif limit is not None and now >= row.submitted + limit:
                self._finish(row, FinishReason.TIME_LIMIT, now)

    def _num_unread(self, decoding: list[Row]) -> int:
        """Rows beside these that run, or could, and have prompt tokens left."""
        num_active = sum(not row.parked for row in self._rows())
        return min(num_active, self._config.max_rows) - len(decoding)

    def _schedule_row(self, row: Row, budget: int, now: float) -> int:
        """Plan one running row; returns how much of the prompt budget it took."""
        decoding = row.num_pending == 1
        num_tokens = 1 if decoding else min(row.num_pending, budget)
        adapters = self._acquire(row, now)
        if adapters is None:
            return 0
        if num_tokens <= 0:
            self._release(adapters)  # asked for none the less: a row that does not ask loses them
            return 0
        if not self._make_room(row, row.num_computed + num_tokens):
            self._release(adapters)
            return 0
        self._planned.append(Plan(row, num_tokens, adapters))
        return 0 if decoding else num_tokens

    def _admit(self, budget: int, now: float) -> None:
        """Start waiting rows; one whose LoRAs are missing waits aside, and others go before it.

        That is, until it is overdue: then a slot is kept for it. No more rows ask for LoRAs than
        could start, as that may take them from running rows.
        """
        num_slots = self._config.max_rows - sum(not row.parked for row in self._running)
        num_asking = 0
        for place, row in enumerate(admission_order(self._waiting, self._running, now)):
            if row.parked:
                continue
            may_ask = num_asking < num_slots or self._pool.holds(row.lora_digests)
            if num_slots <= 0 or not may_ask:
                if place < LOOK_AHEAD:
                    self._prefetch(row)
                continue
            adapters = self._acquire(row, now)
            if adapters is None and is_overdue(row, now):
                num_slots -= 1
            elif adapters is None:
                num_asking += 1
            elif budget <= 0:
                self._release(adapters)  # it had to ask, or it would lose its place in the queue
            elif self._start(row, adapters, budget, now):
                budget -= self._planned[-1].num_tokens
                num_slots -= 1
            else:
                return

    def _prefetch(self, row: Row) -> None:
        """The adapters of a row that cannot start yet are brought as near as there is room."""
        self._pool.prefetch(row.lora_digests)
        if row.request.heads is not None and self._speculator.max_nodes(row):
            self._pool.prefetch([row.request.heads.digest])

    def _start(self, row: Row, adapters: RowAdapters, budget: int, now: float) -> bool:
        """Plan a waiting row's first chunk; False: not enough pages."""
        if not self._has_slot():
            self._preempt_parked()
        cached, hashes = self._pages.match(row.kv_root, row.tokens)
        missing = self._pages.pages_for(len(row.tokens)) - len(cached)
        while (fresh := self._pages.allocate(missing)) is None and self._preempt_parked():
            pass
        if fresh is None:
            self._pages.free(cached)
            self._release(adapters)
            return False
        self._waiting.remove(row)
        self._running.append(row)
        row.admit(cached + fresh, hashes, len(cached) * self._pages.page_size, now)
        self._planned.append(Plan(row, min(row.num_pending, budget), adapters))
        return True

    def _trees(self, plans: list[Plan]) -> list[Drafted | None]:
        """Of each plan's row, if it decodes, something is proposed, and pages are left for it."""
        decoding = [plan.row for plan in plans if plan.row.num_pending == 1]
        fixed_tokens = sum(plan.num_tokens for plan in plans)
        num_drawing = sum(plan.draws for plan in plans)
        trees = iter(self._speculator.draft(decoding, fixed_tokens, num_drawing))
        grown = []
        for plan in plans:
            row = plan.row
            tree = next(trees) if row.num_pending == 1 else None
            fits = tree is None or self._grow(row, row.num_computed + tree.num_nodes)
            grown.append(tree if fits else None)
        return grown

    def _step(self, plan: Plan, tree: Drafted | None) -> RowStep:
        row, start = plan.row, plan.row.num_computed
        chain = tuple(row.tokens[start : start + plan.num_tokens])
        return RowStep(
            request=row.request,
            token_ids=chain if tree is None else tree.tokens,
            page_table=tuple(row.pages),
            committed=start,
            num_generated=row.num_generated,
            samples=plan.draws,
            tree=tree,
            adapters=plan.adapters,
            num_candidates=NUM_CANDIDATES if plan.draws and plan.adapters.heads else 0,
            processor=row.processor,
        )

    def _commit(self, row: Row, step: RowStep, result: RowResult) -> None:
        """KV of the step's own tokens and of the accepted nodes now counts as the row's."""
        drafted = step.tree.sources[1:] if step.tree else ()
        if row.num_pending == 1:
            row.count_step(drafted)
            self._speculator.learn(row, result)
        row.num_computed += len(step.token_ids) - len(drafted) + len(result.sources)
        row.draft = result.draft
        if not step.decodes and self._speculator.max_nodes(row):
            row.read(row.num_computed)
        size = self._pages.page_size
        tokens = row.tokens + list(result.tokens)
        for index in range(len(row.page_hashes), row.num_computed // size):
            parent = row.page_hashes[-1] if row.page_hashes else row.kv_root
            page_hash = chain_hash(parent, tokens[index * size : (index + 1) * size])
            row.page_hashes.append(page_hash)
            self._pages.publish(row.pages[index], page_hash, row.lora_digests)

    # -- adapters ---------------------------------------------------------------------------------

    def _acquire(self, row: Row, now: float) -> RowAdapters | None:
        """The row's LoRAs, all of them, and its heads if they are on the device; None: not now.

        A row never waits for heads: it goes on undrafted while they load.
        """
        try:
            loras = self._pool.acquire(row.lora_digests)
            if loras is None:
                row.wait_for_adapters(now)
                return None
            row.got_adapters(now)
            heads = None
            if row.request.heads is not None and self._speculator.wants_heads(row):
                heads = self._acquire_heads(row.request.heads.digest, loras)
        except LorastackError as error:
            self._end(row, error=error)
            return None
        return RowAdapters(loras=loras, heads=heads)

    def _acquire_heads(self, digest: str, loras: tuple[DeviceAdapter, ...]) -> DeviceAdapter | None:
        try:
            return self._pool.try_acquire(digest)
        except LorastackError:
            self._pool.release([lora.digest for lora in loras])
            raise

    def _release(self, adapters: RowAdapters) -> None:
        self._pool.release(adapters.digests)

    # -- pages ------------------------------------------------------------------------------------

    def _grow(self, row: Row, num_slots: int) -> bool:
        """Pages for `num_slots` tokens, if that many are available."""
        missing = self._pages.pages_for(num_slots) - len(row.pages)
        fresh = self._pages.allocate(max(missing, 0))
        if fresh is None:
            return False
        row.pages.extend(fresh)
        return True

    def _make_room(self, row: Row, num_slots: int) -> bool:
        """Pages for `num_slots` tokens, taken from later rows if need be; False: it had to yield.

        Rows are planned from the oldest, so that a victim, parked or younger, has no step planned.
        """
        while not self._grow(row, num_slots):
            if self._preempt_parked():
                continue
            victim = self._running[-1]
            self._preempt(victim)
            if victim is row:
                return False
        return True

    def _has_slot(self) -> bool:
        return len(self._running) < self._config.max_rows

    def _preempt_parked(self) -> bool:
        """Take back the pages of the latest parked row; False: there is none."""
        parked = next((row for row in reversed(self._running) if row.parked), None)
        if parked is not None:
            self._preempt(parked)
        return parked is not None

    def _preempt(self, row: Row) -> None:
        """Back to the head of the queue, pages given up; its tokens stay and are computed again."""
        self.num_preemptions += 1
        self._running.remove(row)
        self._pages.free(row.pages)
        row.preempt()
        self._waiting.appendleft(row)

    # -- ends -------------------------------------------------------------------------------------

    def _finish(self, row: Row, reason: FinishReason, now: float) -> None:
        self._events.append(row.finish(reason, now))
        self._remove(row)

    def _end(self, row: Row, error: LorastackError) -> None:
        self._events.append(RowEvent(request_id=row.request.request_id, error=error))
        self._remove(row)

    def _remove(self, row: Row) -> None:
        if row in self._running:
            self._running.remove(row)
        else:
            self._waiting.remove(row)
        self._pages.free(row.pages)
        row.pages = []
