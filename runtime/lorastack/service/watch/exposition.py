"""The text of a scrape: our own names, kept for seconds, and the routers' ones, for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from enum import Enum, auto
from threading import Lock

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

OWN_AGE = 5.0  # seconds that a rendering of our own names may be old
ROUTERS_AGE = 0.02  # seconds, likewise: the usual router asks every 0.05 s
MAX_KEPT = 8  # renderings, by content type: callers choose these
_END = b"# EOF\n"  # of OpenMetrics; it ends the whole


class Part(Enum):
    """Which names are asked for."""

    ALL = auto()
    OWN = auto()
    ROUTERS = auto()


class Exposition:
    """Any thread may render; however many do, one at a time works."""

    def __init__(
        self,
        own: CollectorRegistry,
        routers: Collector,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """clock: seconds."""
        registry = CollectorRegistry()
        registry.register(routers)
        self._lock = Lock()
        self._own = _Rendered(own, OWN_AGE, clock)
        self._routers = _Rendered(registry, ROUTERS_AGE, clock)

    def render(self, accept: str, part: Part = Part.ALL) -> tuple[str, bytes]:
        """(content type, body). accept: as HTTP's; what it has no word for gives classic text."""
        with self._lock:
            if part is Part.ROUTERS:
                return self._routers.text(accept)
            content_type, own = self._own.text(accept)
            if part is Part.OWN:
                return content_type, own
            return content_type, own.removesuffix(_END) + self._routers.text(accept)[1]


class _Rendered:
    """One registry's text by content type, up to max_age seconds old."""

    def __init__(
        self, registry: CollectorRegistry, max_age: float, clock: Callable[[], float]
    ) -> None:
        self._registry = registry
        self._max_age = max_age
        self._clock = clock
        self._kept: dict[str, tuple[float, bytes]] = {}  # with the time of rendering

    def text(self, accept: str) -> tuple[str, bytes]:
        try:
            encode, content_type = choose_encoder(accept)
        except (ValueError, TypeError):  # a version that is no number
            encode, content_type = choose_encoder("")
        now = self._clock()
        kept = self._kept.get(content_type)
        if kept is not None and now - kept[0] < self._max_age:
            return content_type, kept[1]
        body = encode(self._registry)
        if len(self._kept) >= MAX_KEPT:
            self._kept.clear()
        self._kept[content_type] = now, body
        return content_type, body
