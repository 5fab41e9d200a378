"""A conversation as a chat template gets it: messages, tools, and further variables."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from lorastack.errors import InvalidArgumentError

MAX_JSON_CHARS = 1 << 18  # of one JSON text
MAX_JSON_DEPTH = 64
# Switches of the rendering itself, which templates need not read.
SWITCHES = ("add_generation_prompt", "continue_final_message")
# What a caller gives in other fields, or not at all.
_RESERVED = frozenset(
    ("messages", "tools", "conversations", "chat_template", "return_assistant_tokens_mask")
)
_SPECIAL_TOKENS = frozenset(
    f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """messages: with role, content and further keys. tools: OpenAI's objects; None: none given.

    variables: further ones for the template. add_generation_prompt: the text ends where the
    assistant's next message begins; continue_final_message: it ends inside the last message.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    def check_read(self, template: str, read: Iterable[str]) -> None:
        """Raises InvalidArgumentError for what is given and the template ignores.

        read: the names of the variables that the template reads.
        """
        names = set(read)
        remedy = "use another model, or a LoRA whose folder has a chat template with tools"
        if self.tools is not None and "tools" not in names:
            raise InvalidArgumentError(
                f"chat.tools_json: the chat template does not read tools; leave them out, {remedy}",
                field="chat.tools_json",
            )
        if any("tool_calls" in each for each in self.messages) and "tool_calls" not in template:
            raise InvalidArgumentError(
                "chat.messages.fields_json: the chat template does not read tool_calls; leave them "
                f"out, {remedy}",
                field="chat.messages.fields_json",
            )
        if ignored := sorted(self.variables.keys() - names):
            known = ", ".join(sorted(names - _RESERVED - _SPECIAL_TOKENS)) or "none"
            raise InvalidArgumentError(
                f"chat.variables_json holds {', '.join(map(repr, ignored))}, which the chat "
                f"template does not read; leave it out (the template reads: {known})",
                field="chat.variables_json",
            )


def conversation(
    messages: Iterable[tuple[str, str]],
    fields: Iterable[str],
    tools: str,
    variables: str,
    special_tokens: Mapping[str, str],
) -> Conversation:
    """Reads a conversation's JSON texts; "" is an absent one. fields: one text a message.

    special_tokens: names that a caller's variables must not take. Raises InvalidArgumentError
    naming the field.
    """
    given = _object(variables, "chat.variables_json")
    taken = sorted(given.keys() & (_RESERVED | _SPECIAL_TOKENS | special_tokens.keys()))
    if taken:
        _refuse("chat.variables_json", f"without {taken[0]!r}, which the server sets")
    switches = {name: given.pop(name) for name in SWITCHES if name in given}
    for name, value in switches.items():
        if not isinstance(value, bool):
            _refuse("chat.variables_json", f"an object whose {name!r} is true or false")
    if switches.get("continue_final_message") and switches.get("add_generation_prompt", True):
        _refuse(
            "chat.variables_json",
            "an object whose 'add_generation_prompt' is false beside 'continue_final_message': "
            "a text ends in one of both ways",
        )
    return Conversation(
        [
            _message(role, content, further)
            for (role, content), further in zip(messages, fields, strict=True)
        ],
        _tools(tools),
        given,
        **switches,
    )


def _message(role: str, content: str, fields: str) -> dict[str, Any]:
    """A field that is null counts as absent, as for transformers."""
    field = "chat.messages.fields_json"
    further = _object(fields, field)
    for name in ("role", "content"):
        if name in further:
            _refuse(field, f"an object without {name!r}, which has a field of its own")
    present = {name: value for name, value in further.items() if value is not None}
    return {"role": role, "content": content, **present}


def _tools(text: str) -> list[dict[str, Any]] | None:
    if not text:
        return None
    tools = _read(text, "chat.tools_json")
    sound = isinstance(tools, list) and tools and all(isinstance(tool, dict) for tool in tools)
    if not sound:
        _refuse("chat.tools_json", "a JSON list of at least one tool, each an object")
    return list(tools)


def _object(text: str, field: str) -> dict[str, Any]:
    if not text:
        return {}
    value = _read(text, field)
    if not isinstance(value, dict):
        _refuse(field, "a JSON object")
    return dict(value)


def _read(text: str, field: str) -> Any:
    if len(text) > MAX_JSON_CHARS:
        _refuse(field, f"at most {MAX_JSON_CHARS} characters long")
    try:
        value = json.loads(
            text, parse_float=_finite, parse_constant=_finite, object_pairs_hook=_distinct
        )
    except RecursionError:
        _refuse(field, f"nested at most {MAX_JSON_DEPTH} deep")
    except ValueError as error:
        _refuse(field, f"JSON ({error})")
    level, depth = [value], 0
    while level:
        level = [inner for each in level for inner in _parts(each)]
        depth += 1
        if depth > MAX_JSON_DEPTH:
            _refuse(field, f"nested at most {MAX_JSON_DEPTH} deep")
    return value


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is no finite number")
    return number


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    read = dict(pairs)
    if len(read) < len(pairs):
        raise ValueError("an object has one key twice")
    return read


def _refuse(field: str, rule: str) -> NoReturn:
    raise InvalidArgumentError(f"{field} must be {rule}", field=field)
