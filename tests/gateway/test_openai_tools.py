"""Tools through OpenAI's own client: forced by grammar, or written by the model's own syntax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, ConfigDict

from lorastack.config import AdapterConfig, GatewayConfig
from tests.helpers.chat_templates import QWEN
from tests.helpers.live import ROOMY, LiveServer

ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds.",
        "parameters": {
            "type": "object",
            "properties": {"a": {"type": "boolean"}},
            "required": ["a"],
            "additionalProperties": False,
        },
    },
}
SUB: Any = {**ADD, "function": {**ADD["function"], "name": "sub"}}
CHAT: Any = [{"role": "user", "content": "Add."}]
CALL = '<tool_call>{"name": "add", "arguments": {"a": true}}</tool_call>'
CALL_REGEX = CALL.replace("{", r"\{").replace("}", r"\}")
LONG: Any = {"temperature": 0, "max_tokens": 300}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Iterator[LiveServer]:
    """A model whose template is Qwen's."""
    root = tmp_path_factory.mktemp("tools")
    folder = shutil.copytree(tiny_llama, root / "model")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": QWEN}))
    adapters, http = AdapterConfig(store=root / "store"), GatewayConfig(port=0)
    with LiveServer(folder, engine=ROOMY, adapters=adapters, http=http) as server:
        yield server


@pytest.fixture
def client(server: LiveServer) -> Iterator[OpenAI]:
    url = f"http://{server.server.http_address}/v1"
    with OpenAI(base_url=url, api_key="x", max_retries=0, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def model(server: LiveServer) -> str:
    return server.client.model_info().base_model


def streamed(client: OpenAI, **asked: Any) -> tuple[str, list[tuple[str, str]], str | None]:
    """(content, [(name, arguments)], finish reason)."""
    content, calls, reason = "", [], None
    for part in client.chat.completions.create(stream=True, **asked):
        choice = part.choices[0]
        content += choice.delta.content or ""
        for call in choice.delta.tool_calls or ():
            assert call.index == len(calls) and call.id and call.function is not None
            calls.append((call.function.name or "", call.function.arguments or ""))
        reason = choice.finish_reason or reason
    return content, calls, reason


def whole(client: OpenAI, **asked: Any) -> tuple[str | None, list[tuple[str, str]], str | None]:
    choice = client.chat.completions.create(**asked).choices[0]
    calls: list[Any] = list(choice.message.tool_calls or ())
    told = [(call.function.name, call.function.arguments) for call in calls]
    return choice.message.content, told, choice.finish_reason


def test_calls_are_forced(client: OpenAI, model: str) -> None:
    asked = {"model": model, "messages": CHAT, "tools": [ADD, SUB], **LONG}
    content, calls, reason = whole(client, tool_choice="required", **asked)
    assert content is None and reason == "tool_calls" and calls
    for name, arguments in calls:
        assert name in ("add", "sub") and isinstance(json.loads(arguments)["a"], bool)
    assert streamed(client, tool_choice="required", **asked) == ("", calls, reason)

    _, one, _ = whole(client, tool_choice="required", parallel_tool_calls=False, **asked)
    assert len(one) == 1

    named = {"type": "function", "function": {"name": "sub"}}
    content, calls, reason = whole(client, tool_choice=named, **asked)
    assert content is None and [name for name, _ in calls] == ["sub"] and reason == "stop"
    assert streamed(client, tool_choice=named, **asked) == ("", calls, reason)


def test_forced_calls_that_are_cut_short_are_text(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "messages": CHAT, "tools": [ADD], "tool_choice": "required"}
    asked |= {"temperature": 0, "max_tokens": 3}
    content, calls, reason = whole(client, **asked)
    assert content and not calls and reason == "length"
    assert streamed(client, **asked) == (content, calls, reason)


@pytest.mark.parametrize("written", [CALL, f"so: {CALL}", f"{CALL}\n{CALL}"])
def test_calls_that_the_model_writes_are_taken_out(
    client: OpenAI, model: str, written: str
) -> None:
    regex = written.replace(CALL, CALL_REGEX)
    asked: Any = {"model": model, "messages": CHAT, "tools": [ADD], **LONG}
    asked["extra_body"] = {"guided_regex": regex}
    content, calls, reason = whole(client, **asked)
    assert calls == [("add", '{"a": true}')] * written.count(CALL)
    assert (content or "").strip() == written.replace(CALL, "").strip() and reason == "tool_calls"
    text, in_parts, _ = streamed(client, **asked)
    assert in_parts == calls and text == (content or "")
    _, first, _ = whole(client, parallel_tool_calls=False, **asked)
    assert first == calls[:1]
    # With "none" nothing is taken for a call.
    content, calls, reason = whole(client, tool_choice="none", **asked)
    assert content == written and not calls and reason == "stop"


def test_a_conversation_with_calls_goes_on(client: OpenAI, model: str) -> None:
    asked: Any = {"model": model, "tools": [ADD], **LONG}
    made = client.chat.completions.create(
        messages=CHAT, extra_body={"guided_regex": CALL_REGEX}, **asked
    )
    message = made.choices[0].message
    assert message.tool_calls
    history = [
        *CHAT,
        message.model_dump(),
        {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "3"},
    ]
    again: Any = client.chat.completions.create(messages=history, **asked)
    assert again.usage.prompt_tokens > made.usage.prompt_tokens + 10  # type: ignore[union-attr]


class Sum(BaseModel):
    """Of two."""

    model_config = ConfigDict(extra="forbid")

    a: bool


def test_parse_reads_the_arguments(client: OpenAI, model: str) -> None:
    made = client.chat.completions.parse(
        model=model,
        messages=CHAT,
        tools=[openai.pydantic_function_tool(Sum)],
        tool_choice="required",
        **LONG,
    )
    calls = made.choices[0].message.tool_calls
    assert calls and isinstance(calls[0].function.parsed_arguments, Sum)


def test_template_variables(client: OpenAI, model: str) -> None:
    def tokens(**extra: Any) -> int:
        made = client.chat.completions.create(
            model=model, messages=CHAT, max_tokens=1, extra_body=extra
        )
        assert made.usage is not None
        return made.usage.prompt_tokens

    assert tokens(chat_template_kwargs={"enable_thinking": False}) > tokens()
    assert tokens(add_generation_prompt=False) < tokens()


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "mul"}}}, "tool_choice"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools"),
        ({"tools": [ADD, ADD]}, "tools"),
        (
            {"tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"extra_body": {"chat_template_kwargs": {"thinking": 1}}}, "chat_template_kwargs"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "a",
                                "type": "function",
                                "function": {"name": "add", "arguments": "{"},
                            }
                        ],
                    }
                ]
            },
            "messages",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(
    client: OpenAI, model: str, fields: dict[str, Any], param: str
) -> None:
    asked: Any = {"model": model, "messages": CHAT, "tools": [ADD], "max_tokens": 4, **fields}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**asked)
    assert raised.value.param == param
