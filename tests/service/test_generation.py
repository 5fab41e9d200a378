"""Generate and GenerateStream through a real channel, around a fake engine."""

from __future__ import annotations

import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from lorastack.client import Client
from lorastack.errors import (
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    Reason,
    RequestCancelledError,
    ResourceExhaustedError,
)
from lorastack.service.calls import generation
from lorastack.service.calls.generation import _deadline
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1 import generation_pb2_grpc
from tests.service.conftest import StartFake
from tests.service.fakes import FINGERPRINT, MAX_CONTEXT, PATIENCE, RunningServer


def ask(prompt: str = "hello", num_new: int = 8, **fields: object) -> pb.GenerateRequest:
    return pb.GenerateRequest(prompt=prompt, stop=pb.StopParams(max_new_tokens=num_new), **fields)


def test_unary_is_the_joined_stream(client: Client) -> None:
    output = pb.OutputParams(logprobs=True, top_logprobs=2, prompt_logprobs=True)
    request = ask(num_new=20, output=output)
    whole = client.generate(request)
    *parts, last = client.stream(request)
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == list(whole.token_ids)
    assert [token for part in parts for token in part.tokens] == list(whole.tokens)
    assert [token for part in parts for token in part.prompt_tokens] == list(whole.prompt_tokens)
    assert whole.prompt_tokens and not last.prompt_tokens
    assert not any(part.HasField("final") for part in parts)
    assert (last.text, list(last.token_ids), list(last.tokens)) == ("", [], [])
    for message in (whole, last.final):
        message.ClearField("text")
        message.ClearField("token_ids")
        message.ClearField("tokens")
        message.ClearField("prompt_tokens")
        message.ClearField("request_id")
    assert last.final == whole


def test_what_a_reply_holds(client: Client, tokenizer: Tokenizer) -> None:
    request = ask(
        num_new=6,
        sampling=pb.SamplingParams(temperature=0.5, seed=7),
        output=pb.OutputParams(logprobs=True, top_logprobs=2, return_prompt=True),
        request_id="my-id",
    )
    reply = client.generate(request)
    prompt_ids = tokenizer.encode("hello")
    assert len(reply.token_ids) == 6
    assert list(reply.token_ids)[: len(prompt_ids)] == prompt_ids
    assert (reply.finish_reason, reply.seed, reply.request_id) == (reply.LENGTH, 7, "my-id")
    assert reply.prompt == "hello"
    assert (reply.usage.prompt_tokens, reply.usage.generated_tokens) == (len(prompt_ids), 6)
    stats = reply.speculation
    assert list(stats.accepted_by_head) == [2, 1]
    assert (stats.drafted_tokens, stats.accepted_tokens) == (11, 3)
    assert [(s.source, s.drafted_tokens, s.accepted_tokens) for s in stats.by_source] == [
        (pb.Token.HEADS, 7, 3),
        (pb.Token.PROMPT_LOOKUP, 4, 0),
    ]
    assert reply.timings.total_ms == pytest.approx(3)
    token = reply.tokens[0]
    assert (token.id, token.source, token.logprob) == (prompt_ids[0], token.MODEL, -0.5)
    assert [(top.id, top.logprob) for top in token.top] == [(0, -1), (1, -2)]
    assert token.top[1].text == tokenizer.token_text(1)


def test_without_logprobs_none_are_sent(client: Client) -> None:
    assert not any(token.HasField("logprob") for token in client.generate(ask()).tokens)


def test_an_empty_request_id_is_replaced(client: Client, fake: RunningServer) -> None:
    ids = {client.generate(ask()).request_id for _ in range(3)}
    assert len(ids) == 3
    assert all(len(request_id) == 32 for request_id in ids)
    assert {request.request_id for request in fake.engine.submitted} == ids


def test_an_id_is_refused_while_it_runs_and_free_afterwards(
    client: Client, fake: RunningServer
) -> None:
    fake.engine.hold()
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(client.generate, ask(request_id="twice"))
        fake.engine.wait(lambda: "twice" in fake.engine.rows)
        with pytest.raises(InvalidArgumentError, match="twice"):
            client.generate(ask(request_id="twice"))
        fake.engine.go_on()
        assert running.result(PATIENCE).request_id == "twice"
    assert client.generate(ask(request_id="twice")).request_id == "twice"


def test_a_cancelled_call_cancels_its_row(client: Client, fake: RunningServer) -> None:
    fake.engine.hold(2)
    stream = client.stream(ask(request_id="gone"))
    next(stream)
    stream.close()
    fake.engine.wait(lambda: ("cancel", "gone") in fake.engine.calls)
    fake.engine.wait(lambda: not fake.engine.rows)


def test_a_cancelled_unary_call_cancels_its_row(fake: RunningServer) -> None:
    fake.engine.hold()
    with grpc.insecure_channel(fake.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        call = stub.Generate.future(ask(request_id="gone"))
        fake.engine.wait(lambda: "gone" in fake.engine.rows)
        call.cancel()
        fake.engine.wait(lambda: ("cancel", "gone") in fake.engine.calls)
    fake.engine.go_on()


def test_a_lost_connection_cancels_its_rows(fake: RunningServer) -> None:
    client = Client(fake.address)
    fake.engine.hold(2)
    streams = [client.stream(ask(request_id=name)) for name in ("a", "b")]
    for stream in streams:
        next(stream)
    client.close()
    fake.engine.wait(lambda: {("cancel", "a"), ("cancel", "b")} <= set(fake.engine.calls))
    for stream in streams:
        with pytest.raises(RequestCancelledError):
            list(stream)


def test_a_deadline_reaches_the_engine_and_cancels(client: Client, fake: RunningServer) -> None:
    fake.engine.hold()
    before = time.monotonic()
    with pytest.raises(DeadlineExceededError):
        client.generate(ask(request_id="late"), timeout=1.0)
    fake.engine.wait(lambda: ("cancel", "late") in fake.engine.calls)
    arrived_by = time.monotonic()
    deadline = fake.engine.submitted[0].deadline
    assert deadline is not None
    assert before < deadline <= arrived_by + 1.0
    fake.engine.go_on()
    client.generate(ask())
    assert fake.engine.submitted[-1].deadline is None


def test_refusals_and_failures_have_details(client: Client, fake: RunningServer) -> None:
    fake.engine.refusal = ResourceExhaustedError("5 wait already", retry_after=1.5)
    with pytest.raises(ResourceExhaustedError) as full:
        client.generate(ask(request_id="x"))
    assert full.value.reason is Reason.QUEUE_FULL
    assert full.value.retry_after == 1.5
    assert full.value.metadata == {"request_id": "x"}
    fake.engine.failure = InternalError("the step failed", reason=Reason.STEP_FAILED)
    with pytest.raises(InternalError, match="the step failed") as failed:
        list(client.stream(ask(request_id="y")))
    assert failed.value.reason is Reason.STEP_FAILED
    assert failed.value.metadata == {"request_id": "y"}


def test_a_bug_is_internal_and_shows_nothing(
    client: Client, fake: RunningServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr(fake.server._preparer, "prepare", broken)
    with pytest.raises(InternalError) as caught:
        client.generate(ask(request_id="z"))
    assert "secret" not in caught.value.message
    assert "z" in caught.value.message
    assert caught.value.reason is Reason.INTERNAL


def test_a_bad_request_id_is_not_echoed(fake: RunningServer) -> None:
    """It would go into logs and trailers; the refusal has an id of ours."""
    with grpc.insecure_channel(fake.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        with pytest.raises(grpc.RpcError) as caught:
            stub.Generate(ask(request_id="a\nb"))
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert len(info.metadata["request_id"]) == 32


def test_a_long_tokenisation_delays_nobody(
    client: Client, fake: RunningServer, monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer
) -> None:
    """Tokenising blocks a worker; other calls, streams and look-ups go on meanwhile."""
    release, blocked = threading.Event(), threading.Event()
    real = tokenizer.encode

    def slow(text: str) -> list[int]:
        if text == "slow":
            blocked.set()
            assert release.wait(PATIENCE)
        return real(text)

    monkeypatch.setattr(tokenizer, "encode", slow)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(client.generate, ask("slow", 2))
        assert blocked.wait(PATIENCE)
        assert len(client.generate(ask("quick", 5)).token_ids) == 5
        assert client.list_adapters() == []
        assert not waiting.done()
        release.set()
        assert len(waiting.result(PATIENCE).token_ids) == 2


def test_a_slow_reader_parks_its_row_alone_and_gets_everything(start_fake: StartFake) -> None:
    fake = start_fake(max_buffered=4)
    num_new = MAX_CONTEXT - 12
    # The transport buffers as well: more must come than it takes unread.
    output = pb.OutputParams(logprobs=True, top_logprobs=20)
    with (
        Client(fake.address) as client,
        grpc.insecure_channel(fake.address, [("grpc.http2.bdp_probe", 0)]) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        stream = stub.GenerateStream(ask("slow", num_new, output=output, request_id="slow"))
        parts = [next(stream)]
        row = fake.engine.rows["slow"]
        fake.engine.wait(lambda: row.parked)
        quick = client.generate(ask("quick", 100))
        assert len(quick.token_ids) == 100
        fake.engine.wait(lambda: row.parked)
        assert row.num_done < num_new
        parts.extend(stream)
    assert {("park", "slow"), ("resume", "slow")} <= set(fake.engine.calls)
    ids = [token for part in parts for token in part.token_ids]
    assert ids == list(fake.engine.submitted[0].prompt_ids * num_new)[:num_new]


def test_tokenize(client: Client, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("hello there")
    assert client.tokenize(pb.TokenizeRequest(prompt="hello there")) == ids
    assert client.tokenize(pb.TokenizeRequest(token_ids=pb.TokenIds(ids=ids))) == ids
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="hi")])
    assert client.tokenize(pb.TokenizeRequest(chat=chat)) == tokenizer.chat([("user", "hi")])
    with pytest.raises(InvalidArgumentError):
        client.tokenize(pb.TokenizeRequest())


def test_model_info(client: Client, tokenizer: Tokenizer) -> None:
    info = client.model_info()
    assert (info.base_model, info.fingerprint) == ("tests/tiny", FINGERPRINT)
    assert info.tokenizer_digest == tokenizer.digest
    assert info.limits.max_context == MAX_CONTEXT
    assert (info.backend, info.device, info.dtype) == ("fake", "cpu", "float32")
    assert (info.default_medusa_id, info.default_medusa_digest) == ("", "")
    assert {"lora_stack", "response_format", "lossless"} <= set(info.features)
    assert info.version


@pytest.mark.parametrize("remaining", [None, 1e8, 3e6 * 3600, 1e300, math.inf, math.nan])
def test_a_deadline_too_far_off_to_wait_for_is_none(remaining: float | None) -> None:
    assert _deadline(remaining) is None


def test_deadlines_of_days_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: 100.0))
    assert _deadline(7 * 86_400.0) == 100.0 + 7 * 86_400
