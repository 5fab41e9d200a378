"""The engine: what any thread may ask of the step loop, which runs in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from lorastack.adapters.memory.pool import DevicePool
from lorastack.config import EngineConfig
from lorastack.engine.costs import Costs
from lorastack.engine.inbox import Inbox
from lorastack.engine.loop import StepLoop
from lorastack.engine.pace import Pace
from lorastack.engine.pages import Pages
from lorastack.engine.row import Row
from lorastack.engine.runner import Runner
from lorastack.engine.scheduler import Scheduler
from lorastack.engine.speculator import Speculator
from lorastack.errors import InvalidArgumentError, Reason, UnavailableError
from lorastack.request import Request, RowEvent
from lorastack.speculation.calibration import Calibration
from lorastack.text.stream import TextStream
from lorastack.text.tokenizer import Tokenizer


class Engine:
    """Thread-safe door to the step loop.

    on_events gets each step's events in one call, from the step thread; it must not block. Where
    the backend `overlaps` the call comes during the next step, or at once if none follows.
    on_failure is called once, from the step thread, when the loop cannot go on: every request has
    ended by then and the process should exit. calibrations: by heads digest, from an earlier run.
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
        self._vocab_size = vocab_size
        self._runner = runner
        self._tokenizer = tokenizer
        self._speculator = Speculator(costs, config.max_nodes, config.max_step_tokens, calibrations)
        pace = Pace(config.max_step_tokens)
        self._scheduler = Scheduler(config, pages, pool, pace, self._speculator, tokenizer.eos_ids)
        self._inbox = Inbox(config.max_queue)
        self._loop = StepLoop(
            inbox=self._inbox,
            scheduler=self._scheduler,
            runner=runner,
            pages=pages,
            pool=pool,
            pace=pace,
            costs=costs,
            speculator=self._speculator,
            on_events=on_events,
            on_failure=on_failure,
        )
        self._thread = threading.Thread(target=self._loop.run, name="lorastack-step", daemon=True)

    def start(self) -> None:
        """Start the step thread. Requests may be submitted before."""
        self._thread.start()

    # -- requests ---------------------------------------------------------------------------------

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
        self._inbox.submit(lambda: self._scheduler.add(row))

    def cancel(self, request_id: str) -> None:
        """End a request at its next step; unknown ids are ignored (it may just have ended)."""
        self._set(request_id, cancelled=True)

    def park(self, request_id: str) -> None:
        """Its reader is slow: the row keeps its pages and takes no step until `resume`."""
        self._set(request_id, parked=True)

    def resume(self, request_id: str) -> None:
        """Its reader has caught up: the row takes steps again."""
        self._set(request_id, parked=False)

    def _set(self, request_id: str, **flags: bool) -> None:
        def apply() -> None:
            row = self._scheduler.rows.find(request_id)
            if row is not None:
                for name, value in flags.items():
                    setattr(row, name, value)

        self._inbox.post(apply)

    # -- adapters ---------------------------------------------------------------------------------

    def load(self, digest: str, pin: bool, needs: Sequence[str] = ()) -> Future[None]:
        """Bring an adapter to the device, and keep it there if `pin`; done when it is there.

        needs: digests that come, and stay, together with it: heads that it corrects.
        The future's error: what loading raised, FailedPreconditionError ADAPTER_TOO_LARGE, or
        ResourceExhaustedError DEVICE_MEMORY_PINNED (metadata digests: those that hold the room).
        """
        return self._order(lambda future: self._loop.residency.load(digest, pin, future, needs))

    def unload(self, digest: str) -> Future[None]:
        """Unpin an adapter; done when no row uses it and its copies in memory are gone."""
        return self._order(lambda future: self._loop.residency.unload(digest, future))

    def forget(self, digest: str) -> None:
        """The store has no id for this digest any more.

        Rows that use it finish on the old bytes; then its copies, its prefix-cache pages and what
        was learnt about it go.
        """
        self._inbox.post(lambda: self._loop.residency.forget(digest))

    def wake(self) -> None:
        """Tell the loop that what it waits for may have happened: an adapter was loaded."""
        self._inbox.wake()

    def learned(self) -> Future[dict[str, Calibration]]:
        """Copies of the calibrations that changed since the last call, by heads digest.

        After `close` the future is done at once.
        """
        future: Future[dict[str, Calibration]] = Future()

        def take() -> None:
            if future.set_running_or_notify_cancel():
                future.set_result(self._speculator.take_learned())

        if not self._inbox.post(take, future):
            self.close()  # the thread may be about to end
            take()
        return future

    def _order(self, order: Callable[[Future[None]], None]) -> Future[None]:
        """A future that the step thread ends. UnavailableError if it is too late for that."""
        future: Future[None] = Future()
        if not self._inbox.post(lambda: order(future), future):
            future.set_exception(UnavailableError("the server is shutting down"))
        return future

    # -- state ------------------------------------------------------------------------------------

    @property
    def num_steps(self) -> int:
        """Steps since the start, failed ones included."""
        return self._loop.num_steps

    @property
    def num_rows(self) -> int:
        """Requests in the engine: waiting and running."""
        return self._inbox.num_rows

    @property
    def num_waiting(self) -> int:
        """Requests that have not started."""
        return self._inbox.num_waiting

    @property
    def num_parked(self) -> int:
        """Requests whose readers do not read."""
        return self._inbox.state.num_parked

    @property
    def num_preemptions(self) -> int:
        """Since the start: how often a row gave up its pages."""
        return self._inbox.state.num_preemptions

    @property
    def num_pages(self) -> Mapping[str, int]:
        """KV pages: held by rows, cached for later ones, free."""
        return self._inbox.state.num_pages

    @property
    def heads_failures(self) -> Mapping[str, int]:
        """By heads digest: steps in which they gave NaN or infinity."""
        return self._inbox.state.heads_failures

    # -- the end ----------------------------------------------------------------------------------

    def drain(self, timeout: float) -> bool:
        """Refuse new requests and wait up to `timeout` seconds for the others; True: all ended."""
        return self._inbox.drain(timeout)

    def close(self) -> None:
        """End what is left with UNAVAILABLE and stop the thread."""
        self._inbox.close()
        if self._thread.is_alive():
            self._thread.join()
