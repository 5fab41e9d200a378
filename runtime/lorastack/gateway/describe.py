"""The gateway's OpenAPI description, made of its operations and their pydantic models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from pydantic.json_schema import models_json_schema

from lorastack import __version__
from lorastack.gateway.exchange import Operation

_REFERENCE = "#/components/schemas/{model}"
_PARAMETER = re.compile(r"{(\w+)(:\w+)?}")  # in a path, as starlette writes it


def description(operations: Sequence[Operation[Any]]) -> dict[str, Any]:
    """OpenAPI 3.1, as JSON."""
    bodies = {operation.body for operation in operations if operation.body}
    replies = {operation.reply for operation in operations if operation.reply}
    wanted = [(model, "validation") for model in bodies] + [
        (model, "serialization") for model in replies - bodies
    ]
    places, schemas = models_json_schema(wanted, ref_template=_REFERENCE)  # type: ignore[arg-type]
    by_model = {model: schema for (model, _), schema in places.items()}
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = _PARAMETER.sub(r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _one(operation, by_model)
    return {
        "openapi": "3.1.0",
        "info": {"title": "lorastack", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas.get("$defs", {})},
    }


def _one(operation: Operation[Any], schemas: dict[Any, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.reply is not None:
        content["application/json"] = {"schema": schemas[operation.reply]}
    if operation.streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    described: dict[str, Any] = {
        "summary": operation.summary,
        "responses": {
            "200": {"description": "done", **({"content": content} if content else {})},
            "default": {"description": "refused; the body says why"},
        },
    }
    names = [found[1] for found in _PARAMETER.finditer(operation.path)]
    if names:
        described["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": schemas[operation.body]}},
        }
    return described
