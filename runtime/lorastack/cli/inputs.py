"""What `lorastack generate` reads: prompts, conversations, token ids, schemas."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

import typer

from lorastack.cli.options import UINT32
from lorastack.client import (
    ChatMessage,
    ChatMessages,
    GenerateRequest,
    LoraRef,
    ResponseFormat,
    TokenIds,
)
from lorastack.config import MIB

LARGEST = 16 * MIB  # characters; a server takes no larger message
# ID[:SCALE]; a revision (ID@sha256:...) has a colon of its own.
_LORA = re.compile(r"(?P<id>[^:@]+(?:@sha256:[^:]+)?)(?::(?P<scale>[^:]+))?")


def set_input(
    request: GenerateRequest,
    *,
    prompt: str | None,
    messages: str,
    token_ids: str,
    chat: bool,
    system: str,
) -> None:
    """Puts the input into the request. Raises BadParameter unless exactly one is given."""
    given = [prompt is not None, bool(messages), bool(token_ids)]
    if sum(given) != 1:
        raise typer.BadParameter(
            "give one of PROMPT, --messages and --token-ids", param_hint="PROMPT"
        )
    if prompt is None and (chat or system):
        raise typer.BadParameter(
            "it goes with PROMPT only", param_hint="--system" if system else "--chat"
        )
    if messages:
        request.chat.CopyFrom(_conversation(messages))
    elif token_ids:
        request.token_ids.CopyFrom(_ids(token_ids))
    else:
        text = read_text("-", "PROMPT") if prompt == "-" else prompt
        if chat or system:
            entries = [("system", system)] if system else []
            request.chat.CopyFrom(_chat([*entries, ("user", text)]))
        else:
            request.prompt = text or ""


def lora_ref(text: str) -> LoraRef:
    """Parses ID or ID:SCALE. Raises BadParameter."""
    match = _LORA.fullmatch(text)
    try:
        if match is None:
            raise ValueError(text)
        scale = match["scale"]
        return LoraRef(lora_id=match["id"], scale=None if scale is None else float(scale))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not ID or ID:SCALE, such as lora-gsm8k:0.5", param_hint="--lora"
        ) from None


def response_format(json_schema: str, regex: str) -> ResponseFormat | None:
    """None without both. json_schema: a file's path, or the schema itself, which begins with {."""
    if json_schema and regex:
        raise typer.BadParameter("give one of --json-schema and --regex", param_hint="--regex")
    if regex:
        return ResponseFormat(regex=regex)
    if not json_schema:
        return None
    inline = json_schema.lstrip().startswith("{")
    return ResponseFormat(
        json_schema=json_schema if inline else read_text(json_schema, "--json-schema")
    )


def _conversation(name: str) -> ChatMessages:
    text = read_text(name, "--messages")
    try:
        entries = json.loads(text)
        return _chat([(entry["role"], entry["content"]) for entry in entries])
    except (ValueError, TypeError, KeyError, RecursionError):
        raise typer.BadParameter(
            f'{name} is not a JSON list of {{"role": "user", "content": "text"}}',
            param_hint="--messages",
        ) from None


def _chat(entries: Sequence[tuple[str, str | None]]) -> ChatMessages:
    return ChatMessages(messages=[ChatMessage(role=role, content=text) for role, text in entries])


def _ids(text: str) -> TokenIds:
    parts = text.split(",")
    if not all(re.fullmatch("[0-9]{1,10}", part, re.ASCII) for part in parts):
        raise typer.BadParameter("write ids such as 1,15043,29892", param_hint="--token-ids")
    ids = [int(part) for part in parts]
    if max(ids) > UINT32:
        raise typer.BadParameter(f"{max(ids)} is no token id", param_hint="--token-ids")
    return TokenIds(ids=ids)


def read_text(name: str, option: str) -> str:
    """Reads a text file; - is stdin. Raises BadParameter if it is no text or too long to send."""
    try:
        if name == "-":
            return _whole(sys.stdin, "stdin", option)
        with Path(name).open(encoding="utf-8") as file:
            return _whole(file, name, option)
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a NUL in the name
        what = getattr(error, "strerror", None) or "is not UTF-8 text"
        place = "stdin" if name == "-" else repr(name)
        raise typer.BadParameter(f"{place}: {what}", param_hint=option) from None


def _whole(file: TextIO, name: str, option: str) -> str:
    text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise typer.BadParameter(f"{name} is longer than any request", param_hint=option)
    text.encode()  # stdin lets bytes that are not UTF-8 pass as surrogates
    return text
