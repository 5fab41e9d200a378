"""Forced calls: the JSON schema by which a reply is a list of calls of the given tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from lorastack.errors import InvalidArgumentError

MAX_DEPTH = 64
# Keys whose values hold schemas by name, and keys whose values are no schemas.
_BY_NAME = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions")
_VALUES = ("const", "enum", "default", "examples", "required")


def forced_schema(tools: Sequence[Mapping[str, Any]], choice: str | None, parallel: bool) -> str:
    """The schema of the call of one tool, or of a list of one or more calls of any.

    tools: OpenAI's objects. choice: the name of the tool; None: any ("required"). parallel: whether
    a list may hold several. Raises InvalidArgumentError for a name that no tool has.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [each for each in functions if choice is None or each["name"] == choice]
    if not chosen:
        known = ", ".join(each["name"] for each in functions) or "none"
        raise InvalidArgumentError(
            f"tool_choice names {choice!r}, which is none of the tools ({known})",
            field="tool_choice",
        )
    calls, definitions = [], {}
    for index, function in enumerate(chosen):
        root = f"tool{index}"
        parameters = function.get("parameters")
        schema = {"type": "object"} if parameters is None else parameters
        definitions[root] = _rooted(schema, f"#/$defs/{root}", MAX_DEPTH)
        if isinstance(definitions[root], dict):
            # References are now absolute; a base of its own would turn them elsewhere.
            definitions[root].pop("$id", None)
            definitions[root].pop("$schema", None)
        calls.append(
            {
                "type": "object",
                "properties": {
                    "name": {"const": function["name"]},
                    "parameters": {"$ref": f"#/$defs/{root}"},
                },
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    wanted: dict[str, Any] = calls[0]
    if choice is None:
        items = calls[0] if len(calls) == 1 else {"anyOf": calls}
        wanted = {"type": "array", "minItems": 1, "items": items}
        if not parallel:
            wanted["maxItems"] = 1
    return json.dumps({**wanted, "$defs": definitions})


def _rooted(schema: Any, root: str, depth: int) -> Any:
    """A schema whose local references lead to where it now stands, `root`."""
    if depth == 0:
        raise InvalidArgumentError(
            f"the parameters of a tool nest deeper than {MAX_DEPTH}; flatten them", field="tools"
        )
    if isinstance(schema, list):
        return [_rooted(each, root, depth - 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    rooted: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "$ref" and isinstance(value, str) and (value == "#" or value.startswith("#/")):
            rooted[key] = root + value[1:]
        elif key in _BY_NAME and isinstance(value, dict):
            rooted[key] = {name: _rooted(each, root, depth - 1) for name, each in value.items()}
        else:
            rooted[key] = value if key in _VALUES else _rooted(value, root, depth - 1)
    return rooted
