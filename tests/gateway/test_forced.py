"""The schema of forced calls, by a validator that is not ours and by the grammar compiler."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from lorastack.errors import InvalidArgumentError
from lorastack.gateway.openai.forced import forced_schema

TREE = {
    "$id": "https://example.org/tree",
    "$defs": {"X": {"type": "integer"}},
    "definitions": {"node": {"type": "object", "properties": {"next": {"$ref": "#"}}}},
    "type": "object",
    "properties": {
        "x": {"$ref": "#/$defs/X"},
        "node": {"$ref": "#/definitions/node"},
        "also": {"$ref": "#/properties/x"},
        "$ref": {"const": {"$ref": "#/$defs/X"}},
    },
    "required": ["x"],
    "additionalProperties": False,
}
OTHER = {
    "type": "object",
    "properties": {"x": {"$ref": "#/$defs/X"}},
    "$defs": {"X": {"type": "string"}},
}


def tool(name: str, parameters: Any = None) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("tree", TREE), tool("other", OTHER), tool("free")]


def accepts(schema: str, value: object) -> bool:
    return bool(jsonschema.Draft202012Validator(json.loads(schema)).is_valid(value))


def call(name: str, **parameters: Any) -> dict[str, Any]:
    return {"name": name, "parameters": parameters}


def test_references_of_each_tool_stay_its_own() -> None:
    schema = forced_schema(TOOLS, None, parallel=True)
    deep = call("tree", x=1, node={"next": {"x": 2, "node": {"next": {"x": 3}}}}, also=4)
    assert accepts(schema, [deep, call("other", x="s"), call("free", any=[1])])
    assert accepts(schema, [call("tree", x=1, **{"$ref": {"$ref": "#/$defs/X"}})])
    for wrong in (
        [],
        deep,
        [call("tree", x="s")],
        [call("other", x=1)],
        [call("tree", x=1, also="s")],
        [call("tree", x=1, node={"next": {"x": "s"}})],
        [call("nobody")],
        [{"name": "free"}],
    ):
        assert not accepts(schema, wrong), wrong


def test_one_call() -> None:
    assert not accepts(forced_schema(TOOLS, None, parallel=False), [call("free"), call("free")])
    named = forced_schema(TOOLS, "other", parallel=True)
    assert accepts(named, call("other", x="s"))
    assert not accepts(named, call("free"))
    with pytest.raises(InvalidArgumentError, match=r"nobody.*tree, other, free"):
        forced_schema(TOOLS, "nobody", parallel=True)


def test_what_nests_too_deep_is_refused() -> None:
    schema: dict[str, Any] = {}
    for _ in range(5000):
        schema = {"items": schema}
    with pytest.raises(InvalidArgumentError, match="deeper"):
        forced_schema([tool("deep", schema)], None, parallel=True)
