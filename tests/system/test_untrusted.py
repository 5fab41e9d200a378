"""Hostile templates and grammars on a live server: refused, and nobody notices."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from lorastack.config import AdapterConfig
from lorastack.errors import InvalidArgumentError, Reason
from lorastack.layout import ModelShapes
from lorastack.text.tokenizer import Tokenizer
from lorastack.v1 import generation_pb2 as pb
from lorastack.v1 import generation_pb2_grpc
from tests.helpers.adapters import write_lora
from tests.helpers.live import PATIENCE, ROOMY, LiveServer, ask, wait_until

FOR_EVER = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
TEMPLATES = {
    "power": "{{ 9**(9**(9)) }}",
    "loop": FOR_EVER,
    "memory": "{{ ('a' * 10**10) | length }}",
    "shout": "{{ messages[-1]['content'] | upper }}",
}
SCHEMAS = (
    {"type": "integer", "minimum": -1e20, "maximum": -1e20},
    {"type": "integer", "multipleOf": 9_999_991},
)
REGEXES = ("((a{1000}){1000}){1000}", "b{2}((a{100}){100}){100}")


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, tiny_llama_shapes: ModelShapes
) -> Iterator[LiveServer]:
    """A server with LoRAs of such templates."""
    root = tmp_path_factory.mktemp("untrusted")
    adapters = AdapterConfig(store=root / "store")
    with LiveServer(tiny_llama, engine=ROOMY, adapters=adapters) as server:
        for name, template in TEMPLATES.items():
            folder = write_lora(root / name, tiny_llama_shapes, targets=("q_proj",))
            (folder / "chat_template.jinja").write_text(template)
            server.upload(name, folder)
        yield server


@pytest.fixture
def server(hostile: LiveServer) -> Iterator[LiveServer]:
    untrusted = hostile.server._untrusted
    usual = untrusted._template_limits
    yield hostile
    untrusted._template_limits = usual
    hostile.assert_idle()
    assert (untrusted.pool.num_running, untrusted.pool.num_waiting) == (0, 0)


def chat(lora_id: str) -> pb.TokenizeRequest:
    message = pb.ChatMessage(role="user", content="hi")
    return pb.TokenizeRequest(chat=pb.ChatMessages(messages=[message]), lora_id=lora_id)


def formatted(**fields: str) -> pb.GenerateRequest:
    return ask("x", max_new_tokens=4, response_format=pb.ResponseFormat(**fields))


def test_hostile_programs_are_refused_while_others_are_served(server: LiveServer) -> None:
    untrusted = server.server._untrusted
    untrusted._template_limits = replace(untrusted._template_limits, cpu=0.3)
    grammars = [
        *(formatted(json_schema=json.dumps(schema)) for schema in SCHEMAS),
        *(formatted(regex=regex) for regex in REGEXES),
    ]
    steady = server.client.stream(ask("steady", max_new_tokens=16_000, ignore_eos=True))
    next(steady)
    for name in ("power", "loop", "memory"):
        before = server.engine.num_steps
        with pytest.raises(InvalidArgumentError, match="chat template"):
            server.client.tokenize(chat(name))
        assert server.engine.num_steps > before
    for request in grammars:
        for _ in range(2):  # refused for what the worker found, and then by heart
            with pytest.raises(InvalidArgumentError) as refusal:
                server.client.generate(request)
            assert refusal.value.reason is Reason.INVALID_GRAMMAR
    assert server.client.generate(formatted(regex="the end")).text.startswith("t")
    assert server.client.tokenize(chat("shout")) == server.tokenize("HI")[1:]
    next(steady)
    steady.close()


def test_callers_who_give_up_leave_nothing_behind(server: LiveServer) -> None:
    """Only that can free the workers here."""
    untrusted = server.server._untrusted
    untrusted._template_limits = replace(untrusted._template_limits, cpu=1e6, wall=1e6)
    with grpc.insecure_channel(server.server.address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        calls = [stub.Tokenize.future(chat("loop")) for _ in range(8)]
        wait_until(lambda: untrusted.pool.num_waiting == 6, "two run and six wait")
        assert server.client.generate(ask("x", max_new_tokens=4)).token_ids
        for call in calls[:4]:
            call.cancel()
        for call in calls[4:]:
            call.cancel()
        wait_until(lambda: untrusted.pool.num_running == 0, "the workers are free")
        assert untrusted.pool.num_waiting == 0
    assert server.client.tokenize(chat("shout")) == server.tokenize("HI")[1:]


def test_a_template_that_does_not_compile_is_refused_at_upload(
    server: LiveServer, tiny_llama_shapes: ModelShapes, tmp_path: Path
) -> None:
    folder = write_lora(tmp_path, tiny_llama_shapes, targets=("q_proj",))
    (folder / "chat_template.jinja").write_text("{% for m in messages %}")
    with pytest.raises(InvalidArgumentError, match=r"chat_template.*endfor") as refusal:
        server.upload("broken", folder)
    assert refusal.value.reason is Reason.INVALID_ADAPTER


def test_long_prompts_leave_threads_for_others(
    server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More of them than there are threads."""
    most, let_go = server.server._model.max_text, threading.Event()
    encode = Tokenizer._encode

    def slow(self: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
        assert len(text) < most // 2 or let_go.wait(PATIENCE)
        return encode(self, text, add_special_tokens=add_special_tokens)

    monkeypatch.setattr(Tokenizer, "_encode", slow)
    with ThreadPoolExecutor(6) as pool:
        long = [pool.submit(server.tokenize, "ab " * (most // 3)) for _ in range(6)]
        wait_until(lambda: server.server._intake.num_waiting == 4, "two run and four wait")
        assert server.client.generate(ask("x", max_new_tokens=4)).token_ids
        assert server.client.model_info()
        let_go.set()
        assert len({len(each.result()) for each in long}) == 1
    with pytest.raises(InvalidArgumentError) as refusal:
        server.tokenize("a" * (most + 1))
    assert refusal.value.reason is Reason.REQUEST_TOO_LARGE
