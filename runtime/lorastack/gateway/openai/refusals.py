"""OpenAI's error objects."""

from __future__ import annotations

import json
from typing import Any

from lorastack.errors import LorastackError, NotFoundError
from lorastack.gateway.exchange import event
from lorastack.gateway.statuses import http_status

DONE = event("[DONE]")
_TYPES = {
    403: "permission_error",
    404: "invalid_request_error",
    409: "invalid_request_error",
    400: "invalid_request_error",
    429: "rate_limit_error",
}
# What fields of GenerateRequest are called here.
_PREFIXES = ("sampling.", "stop.", "output.", "chat.")
_NAMES = {
    "max_new_tokens": "max_tokens",
    "stop_sequences": "stop",
    "tools_json": "tools",
    "variables_json": "chat_template_kwargs",
    "token_ids": "prompt",
    "prompt_logprobs": "echo",
    "lora_id": "model",
}


def refuse(error: LorastackError, status: int) -> dict[str, Any]:
    """The body of a refusal."""
    code = None
    if isinstance(error, NotFoundError):
        code = "model_not_found"
    elif status == 429:
        code = "rate_limit_exceeded"
    return {
        "error": {
            "message": error.message,
            "type": _TYPES.get(status, "server_error"),
            "param": _param(error.metadata.get("field", "")),
            "code": code,
        }
    }


def failed(error: LorastackError) -> bytes:
    """The end of a stream that broke."""
    return event(json.dumps(refuse(error, http_status(error)))) + DONE


def _param(field: str) -> str | None:
    """The body's field, of a path of the body or of GenerateRequest."""
    for prefix in _PREFIXES:
        field = field.removeprefix(prefix)
    name = field.partition(".")[0]
    return _NAMES.get(name, name) or None
