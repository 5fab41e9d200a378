"""What the routers of a cluster read of a replica, under vLLM's names (docs/routing.md).

They score by the ids that callers send as `model`, so adapters are named by id, not by digest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from lorastack.adapters.memory.pool import DevicePool
from lorastack.adapters.store.manifest import Record
from lorastack.adapters.store.registry import Registry
from lorastack.engine.engine import Engine

MAX_NAMES = 512  # in one list
ADAPTERS_AGE = 0.2  # seconds that the lists of adapters may be old: loads take longer
PREFIX = "vllm:"


class Names:
    """Which ids stand for a digest. Derived anew only after the store has changed."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._newest: tuple[Record, ...] = ()
        self._by_digest: dict[str, list[str]] = {}
        self._stored_bytes = 0

    def by_digest(self) -> Mapping[str, Sequence[str]]:
        """The ids whose newest revision has a content, sorted, by the content's digest."""
        self._follow()
        return self._by_digest

    def mean_stored_bytes(self) -> float:
        """Bytes of all stored adapters, equal content once, by the number of ids; 0 without any."""
        self._follow()
        return self._stored_bytes / max(len(self._newest), 1)

    def _follow(self) -> None:
        newest = self._registry.newest()
        if newest is self._newest:  # the same object until a revision comes or goes
            return
        by_digest: dict[str, list[str]] = {}
        for record in newest:
            by_digest.setdefault(record.digest, []).append(record.id)
        self._by_digest = by_digest
        self._stored_bytes = sum({r.digest: r.size_bytes for r in newest}.values())
        self._newest = newest


class RouterCollector(Collector):
    """Five gauges. One thread at a time may collect."""

    def __init__(
        self,
        *,
        engine: Engine,
        pool: DevicePool,
        registry: Registry,
        model_name: str,
        page_size: int,
        device_memory: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """page_size: tokens. device_memory: bytes for adapters on the device. clock: seconds since
        the epoch."""
        self._engine = engine
        self._pool = pool
        self._names = Names(registry)
        self._model_name = model_name
        self._clock = clock
        self._read = -inf  # when the adapters were
        self._read_adapters: dict[str, str] = {}
        self._page_size = page_size
        self._device_memory = device_memory

    def collect(self) -> Iterator[Metric]:
        """Reads the state as StateCollector does."""
        num_waiting = self._engine.num_waiting
        num_running = max(self._engine.num_rows - num_waiting, 0)
        pages = self._engine.num_pages
        num_pages = sum(pages.values())
        usage = pages.get("held", 0) / max(num_pages, 1)
        model = {"model_name": self._model_name}
        yield _gauge("num_requests_waiting", "Requests that have not started.", num_waiting, model)
        yield _gauge("num_requests_running", "Requests that have started.", num_running, model)
        yield _gauge("kv_cache_usage_perc", "Share of KV pages that rows hold.", usage, model)
        size = {"block_size": str(self._page_size), "num_gpu_blocks": str(num_pages)}
        yield _gauge("cache_config_info", "The KV cache.", 1, size)
        now = self._clock()
        if not self._read <= now < self._read + ADAPTERS_AGE:  # or the clock was set back
            self._read, self._read_adapters = now, self._adapters()
        about = "Adapters on the device and awaited, at this time in seconds."
        yield _gauge("lora_requests_info", about, self._read, self._read_adapters)

    def _adapters(self) -> dict[str, str]:
        sizes, awaited = self._pool.sizes(), self._pool.awaited()
        names = self._names.by_digest()
        return {
            "max_lora": str(self._max_names(sizes, names)),
            "running_lora_adapters": _listed(reversed(sizes), names),
            "waiting_lora_adapters": _listed(sorted(awaited.difference(sizes)), names),
        }

    def _max_names(self, sizes: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> int:
        """How many ids of mean size fit on the device, at least 1.

        The mean is of the ids on the device, in the bytes that they take there; while there are
        none, of all that are stored, in the bytes of their files.
        """
        num_names = sum(len(names.get(digest, ())) for digest in sizes)
        mean = sum(sizes.values()) / num_names if num_names else self._names.mean_stored_bytes()
        return max(int(self._device_memory / mean), 1) if mean else 1


def _listed(digests: Iterable[str], names: Mapping[str, Sequence[str]]) -> str:
    """The first MAX_NAMES ids of these digests, sorted."""
    listed: list[str] = []
    for digest in digests:
        listed += names.get(digest, ())
        if len(listed) >= MAX_NAMES:
            break
    return ",".join(sorted(listed[:MAX_NAMES]))


def _gauge(name: str, about: str, value: float, labels: Mapping[str, str]) -> Metric:
    family = GaugeMetricFamily(f"{PREFIX}{name}", about, labels=list(labels))
    family.add_metric(list(labels.values()), value)
    return family
