"""Nobody waits for somebody else's trouble: steps are counted, never time (I4)."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import grpc
import pytest

from lorastack.client import Client
from lorastack.engine.batch import Batch
from lorastack.engine.runner import StepResults
from lorastack.errors import RequestCancelledError
from lorastack.request import RowEvent
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1 import generation_pb2_grpc
from tests.helpers.live import ROOMY, LiveServer, ask, wait_until

StartServer = Callable[..., LiveServer]
MAX_DELAY = 2  # steps


class StepLog:
    """At which engine steps each request got an event."""

    def __init__(self, server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: dict[str, list[int]] = {}
        self._engine = server.engine
        self._deliver = server.engine._loop._on_events
        monkeypatch.setattr(server.engine._loop, "_on_events", self._record)

    def _record(self, events: list[RowEvent]) -> None:
        for event in events:
            self.steps.setdefault(event.request_id, []).append(self._engine.num_steps)
        self._deliver(events)

    def longest_wait(self, request_id: str) -> int:
        """Steps between two neighbouring events of a request."""
        steps = self.steps[request_id]
        return max(b - a for a, b in pairwise(steps))


def test_a_long_prompt_delays_nobody(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others get a token every step, and no step is longer than the configured bound, whatever
    drafts pay: they run on until the long one has ended."""
    log = StepLog(live, monkeypatch)
    step_tokens: list[int] = []
    run = live.engine._runner.run

    def record(batch: Batch, **options: Any) -> StepResults:
        step_tokens.append(sum(len(step.token_ids) for step in batch.steps))
        return run(batch, **options)

    monkeypatch.setattr(live.engine._runner, "run", record)
    long_prompt = "".join(chr(97 + n * n % 26) for n in range(9000))
    assert len(live.tokenize(long_prompt)) >= 8000
    other = Client(live.server.address)
    streams = [
        other.stream(
            ask(f"row {n}", ignore_eos=True, max_new_tokens=None, request_id=f"steady-{n}")
        )
        for n in range(2)
    ]
    with ThreadPoolExecutor(2) as pool:
        steady = [pool.submit(read_to_the_end, stream) for stream in streams]
        wait_until(lambda: {"steady-0", "steady-1"} <= set(log.steps), "the steady rows run")
        live.client.generate(ask(long_prompt, max_new_tokens=2, request_id="long"))
        other.close()
        for future in steady:
            future.result()
    first = log.steps["long"][0]
    for name in ("steady-0", "steady-1"):
        assert log.steps[name][0] < first < log.steps[name][-1], "the rows did not overlap"
        assert log.longest_wait(name) <= MAX_DELAY
    assert max(step_tokens) <= ROOMY.max_step_tokens


def read_to_the_end(stream: Iterator[object]) -> None:
    """Or until it is cancelled."""
    with suppress(RequestCancelledError):
        for _ in stream:
            pass


def test_tokenising_happens_off_the_event_loop(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = type(live.server._preparer._model.tokenizer)
    threads: list[str] = []
    encode = tokenizer.encode

    def record(self: object, text: str) -> list[int]:
        threads.append(threading.current_thread().name)
        return encode(self, text)  # type: ignore[arg-type]

    monkeypatch.setattr(tokenizer, "encode", record)
    live.client.generate(ask("x" * 4000, max_new_tokens=1))
    assert len(threads) == 1
    assert threads[0] not in ("test-server", "lorastack-step")


@pytest.fixture
def slow_stub(live: LiveServer) -> Iterator[generation_pb2_grpc.GenerationServiceStub]:
    """A client that takes no more than 64 KiB ahead of its reader."""
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 16)]
    with grpc.insecure_channel(live.server.address, options=options) as channel:
        yield generation_pb2_grpc.GenerationServiceStub(channel)


@pytest.fixture
def calls(live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the engine's park and resume calls as they happen."""
    names: list[str] = []
    for name in ("park", "resume"):
        call = getattr(live.engine, name)

        def record(request_id: str, name: str = name, call: Callable[..., None] = call) -> None:
            call(request_id)
            names.append(name)

        monkeypatch.setattr(live.engine, name, record)
    return names


LOGPROBS = pb.OutputParams(logprobs=True, top_logprobs=20)  # large messages fill a window soon


def test_a_slow_reader_delays_nobody(
    live: LiveServer,
    monkeypatch: pytest.MonkeyPatch,
    slow_stub: generation_pb2_grpc.GenerationServiceStub,
    calls: list[str],
) -> None:
    log = StepLog(live, monkeypatch)
    request = ask("slow", ignore_eos=True, max_new_tokens=1200, output=LOGPROBS)
    slow = slow_stub.GenerateStream(request)
    parts = [next(slow)]
    with ThreadPoolExecutor(1) as pool:
        steady = ask("steady", ignore_eos=True, max_new_tokens=1200, request_id="steady")
        future = pool.submit(live.stream, steady)
        wait_until(lambda: "park" in calls, "the slow reader's row parks")
        steady_reply = future.result()
    assert live.engine.num_rows == 1, "the slow row has not ended"
    assert log.longest_wait("steady") <= MAX_DELAY
    assert len(steady_reply.token_ids) == 1200
    parts += slow
    assert "resume" in calls
    tokens = [token for part in parts for token in part.token_ids]
    request.ClearField("output")
    assert tokens == list(live.client.generate(request).token_ids)


def test_a_parked_row_whose_reader_leaves_is_freed(
    live: LiveServer, slow_stub: generation_pb2_grpc.GenerationServiceStub, calls: list[str]
) -> None:
    request = ask("slow", ignore_eos=True, max_new_tokens=9000, output=LOGPROBS)
    slow = slow_stub.GenerateStream(request)
    next(slow)
    wait_until(lambda: "park" in calls, "the slow reader's row parks")
    assert live.engine.num_rows == 1
    slow.cancel()
    live.assert_idle()


def test_the_event_loop_wakes_once_a_step(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows a step served, and however many tokens each of them got."""
    live.load_heads("heads-owl")
    wakes = []
    call = live.loop.call_soon_threadsafe

    def record(callback: Callable[..., object], *args: object, **kwargs: object) -> object:
        if threading.current_thread().name == "lorastack-step":
            wakes.append(callback)
        return call(callback, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(live.loop, "call_soon_threadsafe", record)
    before = live.engine.num_steps
    request = ask(stack=[("say-owl", 1.0)], heads="heads-owl", max_new_tokens=120)
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(live.stream, [request] * 8))
    num_steps = live.engine.num_steps - before
    num_tokens = sum(len(reply.token_ids) for reply in replies)
    assert 0 < len(wakes) <= num_steps
    assert num_tokens > 4 * num_steps


def test_uploads_delay_nobody(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, zoo: dict[str, Path]
) -> None:
    """A row runs on while adapters are uploaded, validated, loaded and deleted."""
    log = StepLog(live, monkeypatch)
    endless = ask("steady", ignore_eos=True, max_new_tokens=15_000, off=True, request_id="steady")
    steady = live.client.stream(endless)
    tokens = list(next(steady).token_ids)
    finished = threading.Event()

    def read_on() -> None:
        while not finished.is_set():
            tokens.extend(next(steady).token_ids)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_on)
        try:
            for number in range(3):
                name = f"visitor-{number}"
                live.upload(name, zoo[("say-owl", "random-a", "random-b")[number]])
                live.client.generate(ask("?", stack=[(name, 1.0)], max_new_tokens=4))
                live.client.delete_adapter(name)
            during = log.steps["steady"][-1]
            wait_until(lambda: log.steps["steady"][-1] > during, "the steady row goes on")
        finally:
            finished.set()
        reading.result()
    assert live.engine.num_rows == 1, "the steady row had ended"
    steady.close()
    assert log.longest_wait("steady") <= MAX_DELAY
    again = ask("steady", ignore_eos=True, max_new_tokens=len(tokens))
    assert tokens == list(live.client.generate(again).token_ids)
