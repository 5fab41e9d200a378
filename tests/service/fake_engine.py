"""A step loop without a model: every row echoes its prompt. The pool and host cache beside it."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace

from lorastack.adapters.memory.stats import AdapterStats, PoolStats
from lorastack.errors import LorastackError, UnavailableError
from lorastack.request import (
    Final,
    FinishReason,
    GeneratedToken,
    PromptToken,
    Request,
    RowEvent,
    SpeculationStats,
    Timings,
    TokenLogprobs,
    TokenSource,
)
from lorastack.speculation.calibration import Calibration
from lorastack.text.tokenizer import Tokenizer

PATIENCE = 120.0  # seconds


class FakePool:
    """What the edge reads of the pool."""

    def __init__(self) -> None:
        self.residents: dict[str, AdapterStats] = {}
        self.last_used: dict[str, float] = {}
        self.waited_for: frozenset[str] = frozenset()
        self.counts: dict[str, float] = dict.fromkeys(
            ("num_waiting", "host_hits", "disk_loads", "load_seconds", "evictions"), 0
        )

    def put(
        self, digest: str, nbytes: int = 2000, *, in_use: int = 0, pinned: bool = False
    ) -> None:
        self.residents[digest] = AdapterStats(
            digest=digest, nbytes=nbytes, in_use=in_use, pinned=pinned
        )

    def drop(self, digest: str) -> None:
        self.residents.pop(digest, None)

    def sizes(self) -> dict[str, int]:
        return {digest: each.nbytes for digest, each in self.residents.items()}

    def awaited(self) -> frozenset[str]:
        return self.waited_for

    def stats(self) -> PoolStats:
        return PoolStats(
            adapters=tuple(self.residents.values()),
            last_used=self.last_used,
            **self.counts,
        )

    def close(self) -> None:
        pass


@dataclass
class FakeRow:
    request: Request
    num_done: int = 0
    parked: bool = False
    cancelled: bool = False


@dataclass
class FakeEngine:
    """Each step gives every row that is not parked one token of its own prompt, again and again.

    hold(n) stops every row after n tokens until go_on(). refusal: raised by the next submit, load
    or unload. Adapters get onto the device, which is `pool`, at once.
    """

    tokenizer: Tokenizer
    on_events: Callable[[list[RowEvent]], None]
    on_failure: Callable[[BaseException], None]
    pool: FakePool
    submitted: list[Request] = field(default_factory=list)
    calls: list[tuple[str, str]] = field(default_factory=list)  # (park|resume|cancel, request id)
    num_deliveries: int = 0
    refusal: LorastackError | None = None
    failure: LorastackError | None = None  # ends the next row
    forgotten: list[str] = field(default_factory=list)
    num_waiting: int = 0
    num_parked: int = 0
    num_preemptions: int = 0
    heads_failures: dict[str, int] = field(default_factory=dict)
    learnt: dict[str, Calibration] = field(default_factory=dict)  # what `learned` will give

    def __post_init__(self) -> None:
        self.rows: dict[str, FakeRow] = {}
        self.changed = threading.Condition()
        self.limit: int | None = None
        self.stopping = False
        self.draining = False
        self.dying = False
        self.thread = threading.Thread(target=self._main, name="fake-step", daemon=True)

    def start(self) -> None:
        self.thread.start()

    def submit(self, request: Request) -> None:
        with self.changed:
            if self.draining:
                raise UnavailableError("draining")
            if self.refusal is not None:
                refusal, self.refusal = self.refusal, None
                raise refusal
            assert request.request_id not in self.rows
            self.submitted.append(request)
            self.rows[request.request_id] = FakeRow(request)
            self.changed.notify_all()

    @property
    def num_rows(self) -> int:
        return len(self.rows)

    @property
    def num_pages(self) -> dict[str, int]:
        return {"held": 3, "cached": 2, "free": 1}

    def load(self, digest: str, pin: bool, needs: Sequence[str] = ()) -> Future[None]:
        def put() -> None:
            for each in {digest, *needs}:
                self.pool.put(each, pinned=pin)

        return self._page(put)

    def unload(self, digest: str) -> Future[None]:
        return self._page(lambda: self.pool.drop(digest))

    def forget(self, digest: str) -> None:
        self.forgotten.append(digest)
        self.pool.drop(digest)

    def learned(self) -> Future[dict[str, Calibration]]:
        done: Future[dict[str, Calibration]] = Future()
        done.set_result(self.learnt)
        self.learnt = {}
        return done

    def _page(self, work: Callable[[], None]) -> Future[None]:
        done: Future[None] = Future()
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            done.set_exception(refusal)
        else:
            work()
            done.set_result(None)
        return done

    def cancel(self, request_id: str) -> None:
        self._set("cancel", request_id, "cancelled", True)

    def park(self, request_id: str) -> None:
        self._set("park", request_id, "parked", True)

    def resume(self, request_id: str) -> None:
        self._set("resume", request_id, "parked", False)

    def hold(self, num_tokens: int = 0) -> None:
        with self.changed:
            self.limit = num_tokens

    def go_on(self) -> None:
        with self.changed:
            self.limit = None
            self.changed.notify_all()

    def die(self) -> None:
        """The loop cannot go on."""
        with self.changed:
            self.dying = True
            self.changed.notify_all()

    def drain(self, timeout: float) -> bool:
        with self.changed:
            self.draining = True
            return self.changed.wait_for(lambda: self.stopping or not self.rows, timeout)

    def close(self) -> None:
        with self.changed:
            self.draining = self.stopping = True
            self.changed.notify_all()
        if self.thread.is_alive():
            self.thread.join()

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until a condition over the engine's state holds; fails after PATIENCE seconds."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE)

    def _set(self, call: str, request_id: str, name: str, value: bool) -> None:
        with self.changed:
            self.calls.append((call, request_id))
            if request_id in self.rows:
                setattr(self.rows[request_id], name, value)
            self.changed.notify_all()

    def _runs(self, row: FakeRow) -> bool:
        held = self.limit is not None and row.num_done >= self.limit
        return row.cancelled or not (row.parked or held)

    def _ready(self) -> bool:
        return self.stopping or self.dying or any(map(self._runs, self.rows.values()))

    def _main(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self._ready)
                if self.dying or self.stopping:
                    break
                running = [row for row in self.rows.values() if self._runs(row)]
                events = [self._step(row) for row in running]
                self.changed.notify_all()
            self._deliver(events)
        with self.changed:
            left, self.rows = list(self.rows), {}
            self.stopping = True
            self.changed.notify_all()
        if left:
            error = UnavailableError("the server shut down")
            self._deliver([RowEvent(request_id=name, error=error) for name in left])
        if self.dying:
            self.on_failure(RuntimeError("died"))

    def _deliver(self, events: list[RowEvent]) -> None:
        self.num_deliveries += 1
        self.on_events(events)

    def _step(self, row: FakeRow) -> RowEvent:
        request = row.request
        if row.cancelled:
            return self._end(row, FinishReason.CANCELLED)
        if self.failure is not None:
            error, self.failure = self.failure, None
            del self.rows[request.request_id]
            return RowEvent(request_id=request.request_id, error=error)
        token_id = request.prompt_ids[row.num_done % len(request.prompt_ids)]
        row.num_done += 1
        event = RowEvent(
            request_id=request.request_id,
            text=self.tokenizer.token_text(token_id),
            tokens=(self._token(token_id, request.num_logprobs),),
            prompt_tokens=() if row.num_done > 1 else self._prompt_tokens(request),
        )
        if row.num_done < request.stop.max_new_tokens:
            return event
        return replace(event, final=self._end(row, FinishReason.LENGTH).final)

    def _prompt_tokens(self, request: Request) -> tuple[PromptToken, ...]:
        if request.num_prompt_logprobs is None:
            return ()
        found = [self._token(each, request.num_prompt_logprobs) for each in request.prompt_ids]
        return tuple(
            PromptToken(id=token.id, logprobs=token.logprobs if index else None)
            for index, token in enumerate(found)
        )

    def _token(self, token_id: int, num_logprobs: int | None) -> GeneratedToken:
        logprobs = None
        if num_logprobs is not None:
            top = tuple((index, -float(index + 1)) for index in range(num_logprobs))
            logprobs = TokenLogprobs(logprob=-0.5, top=top)
        return GeneratedToken(id=token_id, source=TokenSource.MODEL, logprobs=logprobs)

    def _end(self, row: FakeRow, reason: FinishReason) -> RowEvent:
        request = row.request
        del self.rows[request.request_id]
        final = Final(
            finish_reason=reason,
            stop_match="",
            prompt_tokens=len(request.prompt_ids),
            cached_prompt_tokens=0,
            generated_tokens=row.num_done,
            speculation=SpeculationStats(
                steps=row.num_done,
                drafted=Counter({TokenSource.HEADS: 7, TokenSource.PROMPT_LOOKUP: 4}),
                accepted=Counter({TokenSource.HEADS: 3}),
                accepted_by_head=[2, 1],
            ),
            timings=Timings(queue=0.001, adapter_wait=0.0, time_to_first_token=0.002, total=0.003),
        )
        return RowEvent(request_id=request.request_id, final=final)


class FakeHost:
    """What the edge reads of the host cache."""

    def __init__(self) -> None:
        self.copies: dict[str, int] = {}

    def snapshot(self) -> dict[str, int]:
        return self.copies
