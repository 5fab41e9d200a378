"""The APIs of LoRAX and TGI, which share routes, bodies and errors."""

from __future__ import annotations

from typing import Any

from lorastack.gateway.exchange import Operation
from lorastack.gateway.lorax.generate import operations as generating
from lorastack.gateway.lorax.info import operations as informing
from lorastack.gateway.selection import Selector
from lorastack.gateway.upstream import Upstream


def operations(upstream: Upstream, selector: Selector) -> list[Operation[Any]]:
    """POST /, /generate, /generate_stream, /tokenize; GET /info."""
    return [*generating(upstream, selector), *informing(upstream)]
