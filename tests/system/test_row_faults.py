"""Whatever a request brings or hits ends that request, with a status; the others' tokens stay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn

import grpc
import pytest
import torch

from lorastack.engine.batch import Batch
from lorastack.engine.loop import MAX_FAULTS
from lorastack.engine.runner import StepResults
from lorastack.errors import InternalError, InvalidArgumentError, LorastackError, Reason
from lorastack.request import Request, SamplingParams, StopParams
from lorastack.service.edge import limits
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1 import generation_pb2_grpc
from tests.helpers.live import LiveServer, ask, wait_until
from tests.helpers.tiny import VOCAB_SIZE

StartServer = Callable[..., LiveServer]


@contextmanager
def bystander(live: LiveServer) -> Iterator[None]:
    """A row that runs beside what the block does, from before it to behind it, as if alone."""
    request = ask("steady", ignore_eos=True, max_new_tokens=None)
    running = live.client.stream(request)
    tokens = list(next(running).token_ids)
    yield
    for _ in range(3):
        tokens += next(running).token_ids
    running.close()
    request.stop.max_new_tokens = len(tokens)
    assert tokens == list(live.client.generate(request).token_ids)


def refusal(live: LiveServer, request: pb.GenerateRequest) -> tuple[str, LorastackError]:
    """The text that came before a status, and the status."""
    text = ""
    with pytest.raises(LorastackError) as caught:
        for part in live.client.stream(request):
            text += part.text
    return text, caught.value


def test_a_row_that_makes_its_steps_fail_ends_alone(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = live.engine._runner.run

    def fail(batch: Batch, **options: Any) -> StepResults:
        results = run(batch, **options)  # it has written its keys and values by then
        if any(s.request.request_id == "bad" and s.num_generated > 2 for s in batch.steps):
            raise RuntimeError("boom")
        return results

    monkeypatch.setattr(live.engine._runner, "run", fail)
    with bystander(live):
        _, error = refusal(live, ask(request_id="bad", ignore_eos=True))
    assert isinstance(error, InternalError) and error.reason is Reason.STEP_FAILED
    assert "boom" not in error.message


@pytest.fixture
def lax(monkeypatch: pytest.MonkeyPatch) -> None:
    """What no request may ask for; adapters can bring such logits, whatever is asked."""
    monkeypatch.setattr(limits, "MAX_REPETITION_PENALTY", float("inf"))
    monkeypatch.setattr(limits, "MIN_REPETITION_PENALTY", 0.0)
    monkeypatch.setattr(limits, "MAX_LORA_SCALE", float("inf"))


SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 1e-45, "seed": 3},
    {"temperature": 3e38, "typical_p": 0.5, "seed": 3},
    {"temperature": 0.7, "min_p": 1.0, "top_p": 1e-45, "top_k": 2, "seed": 3},
]


@pytest.mark.usefixtures("lax")
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("typical", [False, True])
def test_a_grammar_whose_only_token_is_infinitely_unlikely(
    live: LiveServer, sampling: dict[str, Any], typical: bool
) -> None:
    """The text up to there comes all the same, whether it was drafted or not."""
    text = "abcdefgh"
    (last,) = live.tokenize("h")[-1:]
    request = ask(
        "h",
        sampling={"repetition_penalty": 3e38, "logit_bias": {last: -100.0}, **sampling},
        response_format=pb.ResponseFormat(regex=text),
        output=pb.OutputParams(logprobs=True, top_logprobs=3),
    )
    if typical:
        request.speculation.acceptance = pb.TYPICAL
    with bystander(live):
        for mode in (pb.AUTO, pb.OFF):
            request.speculation.mode = mode
            before, error = refusal(live, request)
            assert before == text[:-1]
            assert isinstance(error, InvalidArgumentError)
            assert error.reason is Reason.NON_FINITE_LOGITS
            assert "penalties" in error.message


@pytest.mark.usefixtures("lax")
def test_penalties_that_make_a_logit_infinite(live: LiveServer) -> None:
    request = ask("steady", sampling={"repetition_penalty": 1e-45, "temperature": 1.0, "seed": 1})
    request.sampling.logit_bias.update({live.tokenize("steady")[-1]: 100.0})
    with bystander(live):
        _, error = refusal(live, request)
    assert error.reason is Reason.NON_FINITE_LOGITS


@pytest.mark.usefixtures("lax")
@pytest.mark.parametrize("scale", [1e30, 3.4e38, -3.4e38])
def test_an_absurd_scale(live: LiveServer, scale: float) -> None:
    with bystander(live):
        _, error = refusal(live, ask("?", stack=[("random-a", scale), ("random-b", 1.0)]))
    assert error.reason is Reason.NON_FINITE_LOGITS
    assert "random-a" in error.message


@pytest.mark.parametrize("token", [VOCAB_SIZE, 2**40, -1])
def test_a_prompt_that_the_model_has_no_row_for(live: LiveServer, token: int) -> None:
    """A tokenizer with more tokens than its model makes such a prompt."""
    request = Request(
        request_id="odd",
        prompt_ids=(1, token, 2),
        sampling=SamplingParams(),
        stop=StopParams(max_new_tokens=1),
    )
    with pytest.raises(InvalidArgumentError, match=str(VOCAB_SIZE)):
        live.engine.submit(request)


def test_a_grammar_that_takes_long_ends_its_row(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorastack.text.allowance.MOST_SECONDS", -1.0)  # whatever it takes
    request = ask("x", response_format=pb.ResponseFormat(regex="abc"))
    with bystander(live):
        _, error = refusal(live, request)
    assert isinstance(error, InvalidArgumentError) and error.reason is Reason.GRAMMAR_FAILED
    assert error.metadata["field"] == "response_format"
    monkeypatch.undo()
    assert live.client.generate(request).text == "abc"


def explode(*args: object, **options: object) -> None:
    raise ValueError("boom")


def test_a_fault_of_the_scheduler_ends_all_rows_and_the_loop_goes_on(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = live.engine._scheduler.schedule
    faults = [ValueError("boom")] * MAX_FAULTS

    def fail() -> Batch | None:
        if faults and live.engine.num_rows == 3:
            raise faults.pop()
        return schedule()

    monkeypatch.setattr(live.engine._scheduler, "schedule", fail)
    for _ in range(MAX_FAULTS):  # in between, rows get on
        with ThreadPoolExecutor(3) as pool:
            request = ask("go on", ignore_eos=True, max_new_tokens=None)
            for future in [pool.submit(refusal, live, request) for _ in range(3)]:
                error = future.result()[1]
                assert isinstance(error, InternalError) and error.reason is Reason.STEP_FAILED
        live.assert_idle()
    assert not faults
    assert live.client.generate(ask()).token_ids


def test_a_fault_that_stays_ends_the_process(start: StartServer) -> None:
    server = start()
    running = server.client.stream(ask("go on", ignore_eos=True, max_new_tokens=None))
    next(running)
    server.pool.poll = explode  # type: ignore[assignment, method-assign]
    server.engine.wake()
    wait_until(server.server._dispatcher.failed.is_set, "the engine gives up")
    with pytest.raises(LorastackError):
        list(running)
    assert server.engine.num_rows == 0 and server.engine.num_pages["held"] == 0


def test_a_device_that_fails_every_step_ends_the_process(start: StartServer) -> None:
    """Where a step without anybody's values fails too, it is no row's fault."""
    server = start()
    server.engine._runner.run = explode  # type: ignore[assignment, method-assign]
    for _ in range(MAX_FAULTS + 1):
        assert not server.server._dispatcher.failed.is_set()
        with pytest.raises(LorastackError):
            server.client.generate(ask())
    wait_until(server.server._dispatcher.failed.is_set, "the engine gives up")


@pytest.mark.parametrize("place", ["a step", "a load"])
def test_an_error_that_breaks_the_device_ends_the_process_at_once(
    start: StartServer, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Rows that wait or run end, and no second step is tried."""
    server = start()
    runs = []

    def broken(*args: object, **options: object) -> NoReturn:
        runs.append(args)
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    running = server.client.stream(ask("go on", ignore_eos=True, max_new_tokens=None))
    next(running)
    if place == "a step":
        monkeypatch.setattr(server.engine._runner, "run", broken)
    else:
        server.pool._pipeline._loads.submit("sha256:0", broken)
    wait_until(server.server._dispatcher.failed.is_set, "the engine gives up")
    with pytest.raises(LorastackError):
        list(running)
    assert len(runs) == 1
    assert server.engine.num_rows == 0 and server.engine.num_pages["held"] == 0


def test_an_order_that_fails_is_nobody_elses(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live.engine._loop.residency, "load", explode)
    with bystander(live):
        with pytest.raises(InternalError):
            live.engine.load("sha256:0", pin=False).result(30)
        live.engine._inbox.post(explode)
        with pytest.raises(InternalError):
            live.engine.load("sha256:0", pin=False).result(30)


@pytest.mark.parametrize("far", [1e12, 1e300, float("inf")])
def test_a_deadline_longer_than_anything_can_wait(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch, far: float
) -> None:
    """While no row can run, the step thread waits for the next deadline."""
    waits: list[float | None] = []
    changed = live.engine._inbox._changed
    wait = changed.wait

    def record(timeout: float | None = None) -> bool:
        waits.append(timeout)
        return wait(timeout)

    monkeypatch.setattr(changed, "wait", record)
    monkeypatch.setattr(live.engine._scheduler.rows, "wake_time", lambda: far)
    for _ in range(2):
        live.client.generate(ask(max_new_tokens=1))
        wait_until(lambda: bool(waits), "the loop rests")
        waits.clear()


LOGPROBS = pb.OutputParams(logprobs=True, top_logprobs=20)  # large messages fill a window soon


def test_readers_that_do_not_read_are_in_nobodys_way(start: StartServer) -> None:
    """Neither slots nor places in the queue, and no more of them than are let."""
    server = start(max_rows=2, max_queue=2, max_parked=2, max_buffered_events=4)
    options = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1 << 12)]
    request = ask("slow", ignore_eos=True, max_new_tokens=None, output=LOGPROBS)
    hi = ask("hi", max_new_tokens=2)
    with grpc.insecure_channel(server.server.address, options=options) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        slow = []
        for _ in range(5):
            slow.append(stub.GenerateStream(request))
            next(slow[-1])
            assert server.client.generate(hi).token_ids
        wait_until(lambda: server.client.generate(hi) and server.engine.num_rows <= 2, "they end")
        with pytest.raises(grpc.RpcError) as ended:
            for _ in slow[0]:
                pass
        assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    server.assert_idle()
