"""A backend as the engine sees one whose device works by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lorastack.model.backends.base import Backend
from lorastack.model.context import ForwardBatch, Outputs
from lorastack.model.kv import KVCache


class OverlappingBackend:
    """Another one, in whose steps the host does what it is given meanwhile."""

    overlaps = True

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def forward(
        self, batch: ForwardBatch, kv: KVCache, meanwhile: Callable[[], None] | None = None
    ) -> Outputs:
        """See `Backend`."""
        if meanwhile is not None:
            meanwhile()
        return self._backend.forward(batch, kv)
