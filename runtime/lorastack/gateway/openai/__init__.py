"""OpenAI's API."""

from __future__ import annotations

from typing import Any

from lorastack.gateway.exchange import Operation
from lorastack.gateway.openai import chat, completions, models
from lorastack.gateway.selection import Selector
from lorastack.gateway.upstream import Upstream


def operations(upstream: Upstream, selector: Selector) -> list[Operation[Any]]:
    """Models, completions, chats."""
    return [
        *models.operations(upstream),
        *completions.operations(upstream, selector),
        *chat.operations(upstream, selector),
    ]
