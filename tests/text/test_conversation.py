"""A chat's JSON: read, or refused by name."""

from __future__ import annotations

import pytest

from lorastack.errors import InvalidArgumentError
from lorastack.text.conversation import MAX_JSON_CHARS, Conversation, conversation


def made(fields: str = "", tools: str = "", variables: str = "") -> Conversation:
    return conversation([("user", "hi")], [fields], tools, variables, {"image_token": "<i>"})


def test_what_is_given_arrives() -> None:
    got = made('{"name": "a", "x": null}', '[{"type": "function"}]', '{"k": [1.5]}')
    assert got.messages == [{"role": "user", "content": "hi", "name": "a"}]
    assert (got.tools, got.variables) == ([{"type": "function"}], {"k": [1.5]})
    assert made() == Conversation([{"role": "user", "content": "hi"}], None, {})


@pytest.mark.parametrize(
    ("name", "text", "rule"),
    [
        ("fields", "[]", "a JSON object"),
        ("fields", '{"content": "x"}', "without 'content'"),
        ("fields", '{"a": NaN}', "finite"),
        ("fields", '{"a": 1e999}', "finite"),
        ("fields", '{"a": 1, "a": 2}', "twice"),
        ("fields", '{"a": ' + "9" * 5000 + "}", "JSON"),
        ("tools", "[]", "at least one"),
        ("tools", "[1]", "an object"),
        ("tools", "[" * 100_000, "deep"),
        ("tools", "[" * 100 + "]" * 100, "deep"),
        ("tools", " " * (MAX_JSON_CHARS + 1), "characters"),
        ("variables", '{"messages": []}', "without 'messages'"),
        ("variables", '{"image_token": ""}', "without 'image_token'"),
        ("variables", '{"add_generation_prompt": 1}', "true or false"),
        ("variables", '{"continue_final_message": true}', "'add_generation_prompt' is false"),
    ],
)
def test_what_is_refused(name: str, text: str, rule: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"{name}_json must be .*{rule}"):
        made(**{name: text})
