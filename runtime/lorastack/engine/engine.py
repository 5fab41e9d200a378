"""The engine: a thread that schedules, runs and updates until it is told to stop."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import torch

from lorastack.adapters.memory.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.apart import run_apart
from lorastack.engine.batch import Batch
from lorastack.engine.command import Command
from lorastack.engine.costs import Costs, try_step
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages
from lorastack.engine.residency import Residency
from lorastack.engine.row import Row
from lorastack.engine.runner import Runner
from lorastack.engine.scheduler import Scheduler
from lorastack.engine.speculator import Speculator
from lorastack.errors import (
    InternalError,
    InvalidArgumentError,
    LorastackError,
    Reason,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.request import Request, RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.text.stream import TextStream
from lorastack.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_FAULTS = 3  # that no row caused, without a row that got on in between
LONGEST_REST = 3600.0  # seconds; what a condition can wait for is bounded


class Engine:
    """Thread-safe door to the step loop.

    on_events gets each step's events in one call, from the step thread; it must not block.
    on_failure is called once, from the step thread, when the loop cannot go on: every request has
    ended by then and the process should exit.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        runner: Runner,
        tokenizer: Tokenizer,
        pages: Pages,
        pool: DevicePool,
        costs: Costs,
        calibrations: dict[str, Calibration],
        max_context: int,
        vocab_size: int,
        on_events: Callable[[list[RowEvent]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.max_context = max_context
        self.num_steps = 0
        self.heads_failures: Counter[str] = Counter()  # by digest: steps in which they gave NaN
        self._vocab_size = vocab_size
        self._config = config
        self._runner = runner
        self._tokenizer = tokenizer
        self._pages = pages
        self._pool = pool
        self._on_events = on_events
        self._on_failure = on_failure
        self._pace = Pace(config.max_step_tokens)
        self._costs = costs
        self._speculator = Speculator(costs, config.max_nodes, config.max_step_tokens, calibrations)
        self._scheduler = Scheduler(
            config, pages, pool, self._pace, self._speculator, tokenizer.eos_ids
        )
        self._residency = Residency(
            pool, in_use=self._scheduler.rows.uses, on_forgotten=self._forgotten
        )
        self._changed = threading.Condition()
        self._inbox: deque[Command] = deque()
        self._unsent: list[RowEvent] = []
        self._num_faults = 0
        self._num_submitted = 0  # in the inbox, not yet with the scheduler
        self._num_rows = 0  # with the scheduler, as of its last step
        self._num_waiting = 0
        self._num_parked = 0
        self._woken = False
        self._draining = False
        self._closed = False
        self._thread = threading.Thread(target=self._main, name="lorastack-step", daemon=True)

    # -- any thread -------------------------------------------------------------------------------

    def start(self) -> None:
        self._thread.start()

    def submit(self, request: Request) -> None:
        """Queue a request.

        Raises UnavailableError, ResourceExhaustedError or InvalidArgumentError.
        """
        wanted = len(request.prompt_ids) + request.stop.max_new_tokens
        if wanted > self.max_context:
            raise InvalidArgumentError(
                f"prompt and max_new_tokens make {wanted} tokens, the context holds "
                f"{self.max_context}; shorten one of them",
                reason=Reason.REQUEST_TOO_LARGE,
            )
        ids = request.prompt_ids
        if ids and (min(ids) < 0 or max(ids) >= self._vocab_size):
            raise InvalidArgumentError(
                f"the prompt holds a token id that the model lacks: it has {self._vocab_size}, and "
                "ids count from 0"
            )
        row = Row(
            request=request,
            text=TextStream(self._tokenizer, request.stop.stop_sequences, request.prompt_ids),
            submitted=time.monotonic(),
            rope_length=self._runner.rope_length(len(request.prompt_ids)),
        )
        with self._changed:
            if self._draining or self._closed:
                raise UnavailableError("the server is shutting down; try another one")
            if self._num_submitted + self._num_waiting >= self._config.max_queue:
                raise ResourceExhaustedError(
                    f"{self._config.max_queue} requests are waiting already; try again later",
                    retry_after=1.0,
                )
            self._num_submitted += 1
            self._inbox.append(Command(lambda: self._scheduler.add(row)))
            self._changed.notify()

    def cancel(self, request_id: str) -> None:
        """End a request at its next step; unknown ids are ignored (it may just have ended)."""
        self._set(request_id, cancelled=True)

    def park(self, request_id: str) -> None:
        """Its reader is slow: the row keeps its pages and takes no step until `resume`."""
        self._set(request_id, parked=True)

    def resume(self, request_id: str) -> None:
        self._set(request_id, parked=False)

    def load(self, digest: str, pin: bool) -> Future[None]:
        """Brings an adapter to the device, and keeps it there if `pin`; done when it is there.

        The future ends with what its load ended with, FailedPreconditionError ADAPTER_TOO_LARGE,
        or ResourceExhaustedError DEVICE_MEMORY_PINNED (metadata digests: those that hold the room).
        """
        future: Future[None] = Future()
        self._command(lambda: self._residency.load(digest, pin, future), future)
        return future

    def unload(self, digest: str) -> Future[None]:
        """Unpins an adapter; done when no row uses it and its copies in memory are gone."""
        future: Future[None] = Future()
        self._command(lambda: self._residency.unload(digest, future), future)
        return future

    def forget(self, digest: str) -> None:
        """The store has no id for this digest any more.

        Rows that use it finish on the old bytes; then its copies, its prefix-cache pages and what
        was learnt about it go.
        """
        self._command(lambda: self._residency.forget(digest))

    def learned(self) -> Future[dict[str, Calibration]]:
        """Copies of what has changed since the last call, by heads digest; see `build_engine`.

        After `close` they are there at once.
        """
        future: Future[dict[str, Calibration]] = Future()

        def take() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(self._speculator.take_learned())

        with self._changed:
            if not self._closed:
                self._inbox.append(Command(take, future))
                self._changed.notify()
                return future
        self.close()  # the thread may be about to end
        take()
        return future

    def wake(self) -> None:
        """Something the loop waits for may have happened (an adapter was loaded)."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    @property
    def num_rows(self) -> int:
        """Requests in the engine: waiting and running."""
        with self._changed:
            return self._num_submitted + self._num_rows

    @property
    def num_waiting(self) -> int:
        """Of these, the ones that have not started."""
        with self._changed:
            return self._num_submitted + self._num_waiting

    @property
    def num_parked(self) -> int:
        """Of these, the ones whose readers do not read."""
        with self._changed:
            return self._num_parked

    @property
    def num_preemptions(self) -> int:
        """Since the start: rows that gave up their pages."""
        return self._scheduler.rows.num_preemptions

    @property
    def num_pages_held(self) -> int:
        return self._pages.num_held

    @property
    def num_pages(self) -> dict[str, int]:
        """KV pages: held by rows, cached for later ones, free. A step may change them meanwhile."""
        held, cached = self._pages.num_held, self._pages.num_cached
        return {"held": held, "cached": cached, "free": self._pages.num_pages - held - cached}

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait up to `timeout` seconds for the others; True: all ended."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(
                lambda: self._closed or self._num_submitted + self._num_rows == 0,
                min(timeout, threading.TIMEOUT_MAX),
            )

    def close(self) -> None:
        """End what is left with UNAVAILABLE and stop the thread."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    # -- step thread ------------------------------------------------------------------------------

    @torch.inference_mode()
    def _main(self) -> None:
        try:
            while not self._closed:
                try:
                    self._step()
                except Exception as error:
                    self._start_over(error)
            self._end_all(UnavailableError("the server shut down; send the request again"))
        except BaseException as error:
            log.critical("the step loop cannot go on", exc_info=error)
            with self._changed:
                self._closed = True
            try:
                self._end_all(InternalError("the server failed; its log says why"))
            finally:
                self._on_failure(error)

    def _step(self) -> None:
        self._take_inbox()
        self._pool.poll()
        batch = self._scheduler.schedule()
        if batch is not None:
            self.num_steps += 1
            self._run(batch)
        self._residency.step()
        self._publish()
        if batch is None and not self._pool.blocked:
            self._rest()

    def _run(self, batch: Batch) -> None:
        began = time.monotonic()
        results = run_apart(self._runner.run, batch)
        if results.whole:
            self._record(batch, time.monotonic() - began, results.heads_seconds)
        self._note_failures(results.failed_heads)
        self._scheduler.update(results.rows)
        if not results.whole and all(row.error is not None for row in results.rows):
            try_step(self._runner, self._pages)  # is it these rows, or the device?
        self._num_faults = 0

    def _start_over(self, error: Exception) -> None:
        """After a fault that no row alone caused: all rows end, and the loop goes on.

        Raises the error when that has not helped.
        """
        self._num_faults += 1
        if self._num_faults > MAX_FAULTS:
            raise error
        log.error("the step loop failed; all rows end, and it goes on", exc_info=error)
        self._scheduler.end_all(
            InternalError("the server failed; its log says why", reason=Reason.STEP_FAILED)
        )

    def _forgotten(self, digest: str) -> None:
        self._pages.forget(digest)
        self._speculator.forget(digest)

    def _record(self, batch: Batch, seconds: float, heads_seconds: float) -> None:
        decoding = any(step.decodes for step in batch.steps)
        self._pace.record(prompt_tokens=batch.prompt_tokens, decoding=decoding, seconds=seconds)
        self._costs.record(batch, seconds, heads_seconds)

    def _note_failures(self, digests: Sequence[str]) -> None:
        for digest in digests:
            if digest not in self.heads_failures:
                log.error("heads %s gave NaN or infinity; their rows go on undrafted", digest)
            self.heads_failures[digest] += 1

    def _take_inbox(self) -> None:
        with self._changed:
            commands, self._inbox = self._inbox, deque()
            for command in commands:
                command.carry_out()
            self._num_submitted = 0
            self._count()

    def _publish(self) -> None:
        self._unsent += self._scheduler.take_events()
        if self._unsent:
            self._on_events(self._unsent)
            self._unsent = []
        with self._changed:
            self._count()
            self._changed.notify_all()

    def _count(self) -> None:
        rows = self._scheduler.rows
        self._num_rows, self._num_waiting = len(rows), rows.num_waiting
        self._num_parked = rows.num_parked

    def _rest(self) -> None:
        """Sleep until a command, a loaded adapter or the next deadline."""
        wake_time = self._scheduler.rows.wake_time()
        timeout = None
        if wake_time is not None:
            timeout = min(max(wake_time - time.monotonic(), 0.0), LONGEST_REST)
        with self._changed:
            if not (self._woken or self._inbox or self._closed):
                self._changed.wait(timeout)
            self._woken = False

    def _end_all(self, error: LorastackError) -> None:
        self._take_inbox()
        self._scheduler.end_all(error)
        self._residency.end(error)
        self._publish()

    def _set(self, request_id: str, **flags: bool) -> None:
        def apply() -> None:
            row = self._scheduler.rows.find(request_id)
            if row is not None:
                for name, value in flags.items():
                    setattr(row, name, value)

        self._command(apply)

    def _command(self, command: Callable[[], None], future: Future[None] | None = None) -> None:
        """Has the step thread run it. Too late for that, `future` says so."""
        with self._changed:
            if not self._closed:
                self._inbox.append(Command(command, future))
                self._changed.notify()
            elif future is not None:
                future.set_exception(UnavailableError("the server is shutting down"))
