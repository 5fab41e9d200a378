"""Calls in what models write: by each family's syntax, however it is cut; junk stays content."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorastack.client import Token
from lorastack.gateway.openai.tools import ToolCall, ToolParser, new_id, parse_forced

Read = tuple[str, list[tuple[str, Any]]]

ADD = '{"name": "add", "arguments": {"a": 1, "b": "</tool_call> }\\" [TOOL_CALLS]"}}'
ARGUMENTS = {"a": 1, "b": '</tool_call> }" [TOOL_CALLS]'}
CALLED = ("add", ARGUMENTS)


def read(parts: list[tuple[str, list[Token]]]) -> Read:
    parser = ToolParser(["add", "sub"], make_id=lambda: "x")
    deltas = [delta for text, tokens in parts for delta in parser.feed(text, tokens)]
    deltas += parser.finish()
    calls = [delta for delta in deltas if isinstance(delta, ToolCall)]
    assert [call.index for call in calls] == list(range(len(calls)))
    content = "".join(delta for delta in deltas if isinstance(delta, str))
    return content, [(call.name, json.loads(call.arguments)) for call in calls]


def cut(text: str, places: list[int]) -> list[tuple[str, list[Token]]]:
    ends = sorted({min(place, len(text)) for place in places} | {len(text)})
    starts = [0, *ends[:-1]]
    return [(text[start:end], []) for start, end in zip(starts, ends, strict=True)]


def special(text: str) -> Token:
    return Token(text=text, special=True)


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("plain text < [TOOL", "plain text < [TOOL", []),
        (f"<tool_call>\n{ADD}\n</tool_call>", "", [CALLED]),
        (f"\n<tool_call>{ADD}", "", [CALLED]),
        (f"Well.\n<tool_call>\n{ADD}\n</tool_call>\nDone", "Well.\n\nDone", [CALLED]),
        (f"<tool_call>{ADD}</tool_call>\n<tool_call>{ADD}</tool_call>\n", "", [CALLED] * 2),
        (f"<tool_call>{ADD[:-2]}", f"<tool_call>{ADD[:-2]}", []),
        ("<tool_call>{'a': 1}</tool_call>", "<tool_call>{'a': 1}</tool_call>", []),
        (f"<tool_call>no <tool_call>{ADD}", "<tool_call>no ", [CALLED]),
        (f"[TOOL_CALLS] [{ADD}, {ADD}]", "", [CALLED] * 2),
        (f"[TOOL_CALLS][{ADD}, 3]", f"[TOOL_CALLS][{ADD}, 3]", []),
        ('[TOOL_CALLS]f-1[ARGS]{"x": []}', "", [("f-1", {"x": []})]),
        ('[TOOL_CALLS]f{"x": 1}[TOOL_CALLS]g{"y": 2}', "", [("f", {"x": 1}), ("g", {"y": 2})]),
        ('[TOOL_CALLS]f[CALL_ID]a1[ARGS]{"x": 1}', "", [("f", {"x": 1})]),
        ('[TOOL_CALLS]a [TOOL_CALLS]g{"y": 2}', "[TOOL_CALLS]a ", [("g", {"y": 2})]),
        ('{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        (
            '{"name": "add", "parameters": {}}; {"name": "sub", "parameters": {}}',
            "",
            [("add", {}), ("sub", {})],
        ),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1}}', "", [("add", {"a": 1})]),
        ("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
        ('{"name": "Ann", "parameters": {}}', '{"name": "Ann", "parameters": {}}', []),
        (' {"age": 3, "name": "add"}', ' {"age": 3, "name": "add"}', []),
        ('{"name": "add"}', '{"name": "add"}', []),
        ('{"name": "add", "arguments": {"a": NaN}}',) * 2 + ([],),
    ],
)
def test_every_syntax_however_it_is_cut(text: str, content: str, calls: list[Any]) -> None:
    wanted = (content, calls)
    assert read([(text, [])]) == wanted
    assert read(cut(text, list(range(len(text))))) == wanted
    for place in range(len(text)):
        assert read(cut(text, [place])) == wanted, place


def test_markers_that_the_text_does_not_show() -> None:
    arguments = '{"a": 1}'
    wanted = ("Hi", [("add", {"a": 1})])
    tokens = [Token(text="Hi"), special("[TOOL_CALLS]"), Token(text="add"), special("[ARGS]")]
    assert read([("Hiadd" + arguments, [*tokens, Token(text=arguments)])]) == wanted
    each = [("" if token.special else token.text, [token]) for token in tokens]
    assert read([*each, (arguments, [Token(text=arguments)])]) == wanted
    # What is no call shows no more than the text did.
    assert (
        read([("print(1)", [special("<|python_tag|>"), Token(text="print(1)")])])[0] == "print(1)"
    )
    assert read([("", [special("</s>")]), ("x", [Token(text="x")])]) == ("x", [])


def test_nothing_is_shown_that_becomes_a_call() -> None:
    parser = ToolParser(["add"])
    assert parser.feed("Sum: <tool") == ["Sum: "]
    assert parser.feed("box") == ["<toolbox"]
    assert parser.feed("<tool_call>" + ADD[:-1]) == []
    (call,) = parser.feed("}")
    assert isinstance(call, ToolCall)
    delta = call.delta()
    assert (delta["index"], delta["type"], delta["function"]["name"]) == (0, "function", "add")
    assert json.loads(delta["function"]["arguments"]) == ARGUMENTS
    assert len(delta["id"]) == 9


PIECES = st.sampled_from(
    [
        *("<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]", "[", "]", "{"),
        *("}", '"', "\\", ADD, '{"name": "add", "parameters": {}}', "[" + ADD + "]", "f", " ", ";"),
        *("\n", ",", '{"a": 1}', " " * 150, "x" * 150, '{"name": "\\ud800", "arguments": {}}'),
    ]
)


@given(st.lists(PIECES, max_size=12).map("".join), st.lists(st.integers(0, 600), max_size=12))
def test_any_cutting_gives_the_same(text: str, places: list[int]) -> None:
    whole = read([(text, [])])
    assert read(cut(text, places)) == whole
    assert read(cut(text, list(range(len(text))))) == whole


@given(st.lists(st.tuples(st.text(), st.lists(st.tuples(PIECES, st.booleans()), max_size=3))))
def test_junk_never_raises(parts: list[tuple[str, list[tuple[str, bool]]]]) -> None:
    made = [
        (text, [Token(text=each, special=is_special) for each, is_special in tokens])
        for text, tokens in parts
    ]
    content, calls = read(made)
    if not calls and not any(token.special for _, tokens in made for token in tokens):
        assert content == "".join(text for text, _ in made)
    parse_forced("".join(text for text, _ in parts))


def test_forced_calls_are_read() -> None:
    text = '[{"name": "add", "parameters": {"a": "é"}}, {"name": "sub", "parameters": {}}]'
    calls = parse_forced(text)
    assert [(call.index, call.name, call.arguments) for call in calls] == [
        (0, "add", '{"a": "é"}'),
        (1, "sub", "{}"),
    ]
    assert [call.name for call in parse_forced('{"name": "add", "parameters": {}}')] == ["add"]
    assert parse_forced(text[:-1]) == []
    assert len({new_id() for _ in range(100)}) == 100
