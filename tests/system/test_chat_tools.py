"""Chats with tools against a live server: its prompts are what transformers makes of the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from transformers import AutoTokenizer

from lorastack.config import AdapterConfig
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.openai.forced import forced_schema
from lorastack.gateway.openai.tools import parse_forced
from lorastack.layout import ModelShapes
from lorastack.v1 import generation_pb2 as pb
from tests.helpers.adapters import write_lora
from tests.helpers.chat_templates import LLAMA, MISTRAL, QWEN
from tests.helpers.live import ROOMY, LiveServer, ask
from tests.helpers.tiny import CHATML

TEMPLATES = {"": QWEN, "llama": LLAMA, "mistral": MISTRAL, "plain": CHATML}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
ADD = {
    "type": "function",
    "function": {"name": "add", "description": "Adds, é & <b>.", "parameters": PARAMETERS},
}
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": True, "é": "<"}},
}
MESSAGES: list[dict[str, Any]] = [
    {"role": "user", "content": "Add."},
    {"role": "assistant", "content": "", "tool_calls": [CALL], "name": None},
    {"role": "tool", "content": "3", "tool_call_id": "abcdefghi", "name": "add"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "Again."},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A model whose own template is Qwen's."""
    folder = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny_llama, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": QWEN}))
    return folder


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, folder: Path, tiny_llama_shapes: ModelShapes
) -> Iterator[LiveServer]:
    root = tmp_path_factory.mktemp("adapters")
    with LiveServer(folder, engine=ROOMY, adapters=AdapterConfig(store=root / "store")) as server:
        for name, template in TEMPLATES.items():
            if name:
                lora = write_lora(root / name, tiny_llama_shapes, targets=("q_proj",))
                (lora / "chat_template.jinja").write_text(template)
                server.upload(name, lora)
        yield server


def chat(
    messages: list[dict[str, Any]], tools: object = None, variables: object = None
) -> pb.ChatMessages:
    def message(given: dict[str, Any]) -> pb.ChatMessage:
        further = {key: value for key, value in given.items() if key not in ("role", "content")}
        fields = json.dumps(further) if further else ""
        return pb.ChatMessage(role=given["role"], content=given["content"], fields_json=fields)

    return pb.ChatMessages(
        messages=map(message, messages),
        tools_json="" if tools is None else json.dumps(tools),
        variables_json="" if variables is None else json.dumps(variables),
    )


def tokenize(server: LiveServer, lora_id: str, given: pb.ChatMessages) -> list[int]:
    return list(server.client.tokenize(pb.TokenizeRequest(chat=given, lora_id=lora_id)))


@pytest.mark.parametrize("lora_id", ["", "llama", "mistral"])
@pytest.mark.parametrize("tools", [None, [ADD], [ADD, ADD]])
@pytest.mark.parametrize(
    "messages", [MESSAGES, MESSAGES[:1], MESSAGES[3:]], ids=["calls", "one", "plain"]
)
def test_prompts_are_transformers(
    server: LiveServer, folder: Path, lora_id: str, tools: Any, messages: list[dict[str, Any]]
) -> None:
    hf = AutoTokenizer.from_pretrained(folder)
    variables = {
        "": {"enable_thinking": False},
        "llama": {"date_string": "1 May 2025"},
        "mistral": {},
    }[lora_id]
    for given in (None, variables):
        for ending in (
            {},
            {"add_generation_prompt": False},
            {"add_generation_prompt": False, "continue_final_message": True},
        ):
            text = hf.apply_chat_template(
                messages,
                tools=tools,
                chat_template=TEMPLATES[lora_id],
                tokenize=False,
                **{"add_generation_prompt": True, **ending, **(given or {})},
            )
            wanted = hf(text, add_special_tokens=False).input_ids
            sent = {**ending, **given} if given is not None else ending or None
            assert tokenize(server, lora_id, chat(messages, tools, sent)) == wanted


@pytest.mark.parametrize(
    ("lora_id", "given", "message"),
    [
        ("plain", chat(MESSAGES[:1], [ADD]), r"tools_json.*does not read tools.*LoRA"),
        ("plain", chat(MESSAGES), r"fields_json.*does not read tool_calls"),
        ("", chat(MESSAGES, None, {"thinking": 1}), r"'thinking'.*enable_thinking, pace"),
        ("llama", chat(MESSAGES[:1], None, {"range": 1}), r"'range', which.*not read"),
        ("llama", chat(MESSAGES[:1], None, {"bos_token": ""}), r"without 'bos_token'"),
        ("llama", chat(MESSAGES[:1], None, {"tools": []}), r"without 'tools'"),
        ("mistral", chat([{**MESSAGES[1], "tool_calls": [{}]}]), "refused the messages"),
        ("", chat(MESSAGES, None, {"pace": 99_999}), "more than 0.5 s of processor time"),
    ],
)
def test_what_the_template_ignores_or_refuses(
    server: LiveServer, lora_id: str, given: pb.ChatMessages, message: str
) -> None:
    with pytest.raises(InvalidArgumentError, match=message):
        tokenize(server, lora_id, given)


def test_calls_are_forced_by_a_grammar(server: LiveServer) -> None:
    request = ask(
        "x",
        max_new_tokens=200,
        response_format=pb.ResponseFormat(json_schema=forced_schema([ADD], "add", parallel=False)),
    )
    reply = server.client.generate(request)
    (call,) = parse_forced(reply.text)
    assert call.name == "add"
    jsonschema.validate(json.loads(call.arguments), PARAMETERS)
