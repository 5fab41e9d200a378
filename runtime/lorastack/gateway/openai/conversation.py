"""A chat's messages and tools, as the server takes them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from lorastack.client import ChatMessage, ChatMessages
from lorastack.errors import InvalidArgumentError
from lorastack.gateway.openai.bodies import ChatBody, MadeCall, Message, NamedTool
from lorastack.gateway.openai.forced import forced_schema


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What the reply may call. names: of the tools; empty: the reply is text and nothing else.

    schema: of a reply that must be calls, else "". named: one certain tool must be called.
    """

    names: frozenset[str] = frozenset()
    schema: str = ""
    named: bool = False
    parallel: bool = True


def tool_use(body: ChatBody) -> ToolUse:
    """Raises InvalidArgumentError for a choice without tools, or of a tool that is not given."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise InvalidArgumentError("tool_choice needs tools", field="tool_choice")
        return ToolUse()
    if choice == "none":
        return ToolUse()
    names = frozenset(tool.function.name for tool in body.tools)
    if len(names) < len(body.tools):
        raise InvalidArgumentError("two tools have the same name; rename one", field="tools")
    parallel = body.parallel_tool_calls is not False
    if choice in (None, "auto"):
        return ToolUse(names, parallel=parallel)
    name = choice.function.name if isinstance(choice, NamedTool) else None
    schema = forced_schema(_tools(body), name, parallel)
    return ToolUse(names, schema, named=name is not None, parallel=parallel)


def chat_messages(body: ChatBody) -> ChatMessages:
    """With tool_choice "none" the model does not see the tools, so that it cannot call them."""
    variables = dict(body.chat_template_kwargs or {})
    for switch in ("add_generation_prompt", "continue_final_message"):
        if (value := getattr(body, switch)) is not None:
            variables[switch] = value
    shown = body.tools and body.tool_choice != "none"
    return ChatMessages(
        messages=[_message(each) for each in body.messages],
        tools_json=_json(_tools(body)) if shown else "",
        variables_json=_json(variables) if variables else "",
    )


def _tools(body: ChatBody) -> list[dict[str, Any]]:
    return [tool.model_dump(exclude_unset=True) for tool in body.tools or ()]


def _message(given: Message) -> ChatMessage:
    content = given.content or ""
    if not isinstance(content, str):
        content = "\n".join(part.text for part in content)
    fields: dict[str, Any] = {}
    if given.name is not None:
        fields["name"] = given.name
    if given.tool_call_id is not None:
        fields["tool_call_id"] = given.tool_call_id
    if given.tool_calls:
        fields["tool_calls"] = [_made(each) for each in given.tool_calls]
    return ChatMessage(
        # OpenAI's newer word; templates know the older one.
        role="system" if given.role == "developer" else given.role,
        content=content,
        fields_json=_json(fields) if fields else "",
    )


def _made(call: MadeCall) -> dict[str, Any]:
    """Templates read the arguments as an object."""
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidArgumentError(
            f"the arguments of the call of {call.function.name[:100]!r} are no JSON object",
            field="messages",
        )
    function = {"name": call.function.name, "arguments": arguments}
    made = {"type": call.type, "function": function}
    return made if call.id is None else {"id": call.id, **made}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
