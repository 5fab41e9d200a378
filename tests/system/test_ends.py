"""Every request ends, in tokens or in a status, and leaves nothing held (I6)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lorastack.client import Client
from lorastack.config import KIB
from lorastack.engine.batch import Batch
from lorastack.engine.runner import StepResults
from lorastack.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InvalidArgumentError,
    Reason,
    RequestCancelledError,
    ResourceExhaustedError,
    UnavailableError,
)
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.live import LiveServer, ask, wait_until

StartServer = Callable[..., LiveServer]
ENDLESS = ask("go on", ignore_eos=True, heads="none", max_new_tokens=15_000)


def count_steps_to_cancel(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The engine's step count at each cancel."""
    steps: list[int] = []
    cancel = server.engine.cancel

    def record(request_id: str) -> None:
        steps.append(server.engine.num_steps)
        cancel(request_id)

    monkeypatch.setattr(server.engine, "cancel", record)
    return steps


@pytest.mark.parametrize("stack", [(), (("random-a", 1.0), ("random-b", 0.5))])
def test_cancelling_frees_everything_within_one_step(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, stack: tuple[tuple[str, float], ...]
) -> None:
    steps = count_steps_to_cancel(live, monkeypatch)
    request = ask("go on", stack=stack, heads="heads-5", ignore_eos=True, max_new_tokens=15_000)
    running = live.client.stream(request)
    for _ in range(3):
        next(running)
    assert live.engine.num_rows == 1 and live.engine.num_pages["held"] > 0
    running.close()
    live.assert_idle()
    # The step that runs at the moment of the cancel, and none after it.
    assert len(steps) == 1 and live.engine.num_steps - steps[0] <= 1


def test_a_client_that_hangs_up_is_a_cancel(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_steps_to_cancel(live, monkeypatch)
    other = Client(live.server.address)
    streams = [other.stream(ENDLESS) for _ in range(3)]
    for stream in streams:
        next(stream)
    with ThreadPoolExecutor(1) as pool:
        unary = pool.submit(other.generate, ENDLESS)
        wait_until(lambda: live.engine.num_rows == 4, "the unary call runs")
        other.close()
        with pytest.raises(RequestCancelledError):
            unary.result()
    live.assert_idle()
    assert len(steps) == 4 and live.engine.num_steps - max(steps) <= 1


def test_a_cancel_in_the_prompt_frees_everything(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = count_steps_to_cancel(live, monkeypatch)
    before = live.engine.num_steps
    run = live.engine._runner.run

    def hold_the_third(batch: Batch, **options: Any) -> StepResults:
        if live.engine.num_steps == before + 2:
            wait_until(lambda: bool(steps), "the cancel arrives")
        return run(batch, **options)

    monkeypatch.setattr(live.engine._runner, "run", hold_the_third)
    other = Client(live.server.address)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(other.generate, ask([9, 8, 7] * 5000, ignore_eos=True))
        wait_until(lambda: live.engine.num_steps == before + 2, "the prompt is being read")
        other.close()
        with pytest.raises(RequestCancelledError):
            waiting.result()
    live.assert_idle()
    assert live.engine.num_steps <= before + 4, "the prompt was read on"


def test_deadline(live: LiveServer) -> None:
    with pytest.raises(DeadlineExceededError):
        live.client.generate(ENDLESS, timeout=0.2)
    live.assert_idle()


def test_time_limit_returns_a_prefix(live: LiveServer) -> None:
    request = ask("go on", ignore_eos=True, heads="heads-5", max_new_tokens=15_000)
    count, limit = 0, 100
    while not count:  # a busy machine may need a longer one for the first token
        limit *= 2
        request.stop.time_limit_ms = limit
        limited = live.client.generate(request)
        assert limited.finish_reason == pb.GenerateResponse.TIME_LIMIT
        count = len(limited.token_ids)
    request = ask("go on", ignore_eos=True, max_new_tokens=count)
    assert live.client.generate(request).token_ids == limited.token_ids


def test_queue_full(start: StartServer) -> None:
    server = start(max_rows=1, max_queue=2)
    alone = server.client.generate(ask("steady", ignore_eos=True, max_new_tokens=600))
    running = server.client.stream(ask("steady", ignore_eos=True, max_new_tokens=600))
    tokens = list(next(running).token_ids)
    with ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(server.client.generate, ask(f"row {n}")) for n in range(2)]
        wait_until(lambda: server.engine.num_rows == 3, "two requests wait")
        with pytest.raises(ResourceExhaustedError) as refusal:
            server.client.generate(ask("one too many"))
        tokens += [token for part in running for token in part.token_ids]
        assert all(future.result().usage.generated_tokens for future in waiting)
    assert refusal.value.reason is Reason.QUEUE_FULL
    assert refusal.value.retry_after is not None and refusal.value.retry_after > 0
    assert tokens == list(alone.token_ids)
    server.assert_idle()


def test_a_deadline_ends_a_waiting_request(start: StartServer) -> None:
    server = start(max_rows=1)
    running = server.client.stream(ask("steady", ignore_eos=True, max_new_tokens=8000))
    next(running)
    with pytest.raises(DeadlineExceededError):
        server.client.generate(ask("never starts"), timeout=0.2)
    wait_until(lambda: server.engine.num_rows == 1, "the waiting row ends")
    running.close()
    server.assert_idle()


def test_a_request_id_is_used_once_at_a_time(live: LiveServer) -> None:
    request = pb.GenerateRequest()
    request.CopyFrom(ENDLESS)
    request.request_id = "mine"
    running = live.client.stream(request)
    next(running)
    with pytest.raises(InvalidArgumentError, match="mine"):
        live.client.generate(request)
    running.close()
    live.assert_idle()
    assert live.client.generate(ask(request_id="mine")).request_id == "mine"


def test_rows_that_cannot_finish_in_time_end_unavailable(start: StartServer) -> None:
    """close() drains for no time at all: running rows end UNAVAILABLE, none hangs."""
    server = start()
    running = server.client.stream(ENDLESS)
    next(running)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, running)
        asyncio.run_coroutine_threadsafe(server.server.stop(0.0), server.loop).result(30)
        with pytest.raises(UnavailableError):
            rest.result()
    assert server.engine.num_rows == 0 and server.engine.num_pages["held"] == 0


def test_an_adapter_larger_than_the_device_budget(start: StartServer, zoo: dict[str, Path]) -> None:
    server = start(device_memory=32 * KIB)
    server.upload("small", zoo["say-owl"])
    server.upload("large", zoo["random-a"])
    with pytest.raises(FailedPreconditionError) as refusal:
        server.client.generate(ask("?", stack=[("large", 1.0)]))
    assert refusal.value.reason is Reason.ADAPTER_TOO_LARGE
    assert server.client.generate(ask("?", stack=[("small", 1.0)])).text == "owl" * 8
    server.assert_idle()
